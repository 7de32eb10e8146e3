"""nanotoolrl: multi-turn tool use by reinforcement learning, small enough to read.

Import it before torch: it decides how torch's threads wait for each other. By default they spin for
milliseconds, which beside any other work makes a run many times slower. Here they spin for some microseconds,
which loses nothing on an idle machine. Where others are at work at the start they sleep at once: an idle
machine would lose a third of its speed by that, beside others it is the fastest. How they wait changes no
result, so the load of the machine may decide it. `python -m nanotoolrl.bench busy` measures all of this.
"""

import os
import time
from pathlib import Path

SPINS = 10_000  # of libgomp, before a waiting thread sleeps; fewer cost an idle machine time


def others_at_work(load: Path = Path("/proc/loadavg"), looks: int = 50, pause: float = 0.02) -> bool:
    """Whether another process runs whenever one looks, for a second (Linux; elsewhere nobody seems to). The
    first look that finds none ends it: an idle machine loses no time."""
    try:
        for _ in range(looks):
            running = load.read_text(encoding="utf-8").split()[3].partition("/")[0]
            if int(running) < 2:  # this one is among them
                return False
            time.sleep(pause)
    except (OSError, ValueError, IndexError):
        return False
    return True


if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.environ["GOMP_SPINCOUNT"] = "0" if others_at_work() else str(SPINS)
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # large tensors in large pages, on Linux
