"""What every row is made of: arms that are timed in turns, memory, limits, tables."""

import ctypes
import gc
import importlib.metadata
import importlib.util
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

OURS = "nanotoolrl"


ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Arm:
    """One implementation of a row, and what was measured of it."""

    name: str
    seconds: list[float] = field(default_factory=list)
    work: float = 0.0  # tokens per run; 0: seconds say it all
    peak_mb: float | None = None  # beyond inputs and returned gradients
    error: float | None = None
    tolerance: float | None = None
    gradient_error: float | None = None  # as a share of the largest gradient
    gradient_tolerance: float | None = None
    note: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def wrong(self) -> bool:
        """Whether an error is known and not within its tolerance (nan is not)."""
        pairs = ((self.error, self.tolerance), (self.gradient_error, self.gradient_tolerance))
        return any(None not in pair and not pair[0] <= pair[1] for pair in pairs)


@dataclass
class Row:
    """One line of work: its arms, ours first, and the limit in seconds that this machine allows."""

    name: str
    arms: list[Arm]
    limit: float | None = None
    error_of: str = "log-prob, nats"
    missing: list[str] = field(default_factory=list)  # how to install the peers that are not there
    length: float | None = None  # mean tokens of the rollouts
    axis: str = ""  # what grows from row to row, and how much of it is here
    at: float = 0.0


def timed(
    row: Row,
    runs: dict[str, Callable[[], object]],
    repeats: int,
    device: torch.device,
    warm_up: bool = True,
) -> None:
    """Time every arm in turns, after one warm-up each. A run that returns a float has timed itself."""
    arms = {arm.name: arm for arm in row.arms}
    for turn in tqdm(range(1 - warm_up, repeats + 1), row.name, unit="turn", leave=False, disable=None):
        for name, run in runs.items():
            gc.collect()
            _synchronize(device)
            started = time.perf_counter()
            own = run()
            _synchronize(device)
            if turn:
                seconds = own if isinstance(own, float) else time.perf_counter() - started
                arms[name].seconds.append(seconds)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


@contextmanager
def peak_memory(arm: Arm, device: torch.device, returned: int) -> Iterator[None]:
    """Measure the memory a block takes on top of what there is, less `returned` bytes that it gives back."""
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # memory that was freed but kept would hide what the block takes
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield
        arm.peak_mb = (torch.cuda.max_memory_allocated() - before - returned) / 2**20
        return
    clear, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not os.access(clear, os.W_OK):  # not Linux
        yield
        return

    def read(key: str) -> int:
        return next(
            int(line.split()[1])
            for line in status.read_text(encoding="utf-8").splitlines()
            if line.startswith(key)
        )

    clear.write_text("5", encoding="utf-8")  # the high-water mark starts anew
    before = read("VmRSS")
    yield
    arm.peak_mb = (read("VmHWM") - before) / 2**10 - returned / 2**20


def installed(module: str, package: str, missing: list[str]) -> str | None:
    """Version of a package, or None, with how to get it noted."""
    if importlib.util.find_spec(module):
        return importlib.metadata.version(package)
    missing.append(f"{package}: not installed (pip install {package})")
    return None


def best_seconds(run: Callable[[], object], device: torch.device) -> float:
    """Of 5 runs."""
    best = float("inf")
    for _ in range(5):
        _synchronize(device)
        started = time.perf_counter()
        run()
        _synchronize(device)
        best = min(best, time.perf_counter() - started)
    return best


def bytes_per_second(device: torch.device) -> float:
    """Of a large copy, reads and writes."""
    source = torch.ones(2**28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * len(source) / best_seconds(lambda: target.copy_(source), device)


def machine(device: torch.device) -> dict[str, str]:
    """What a result was measured on."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [
            line
            for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
            if "model name" in line
        ]
        cpu = names[0].split(":")[1].strip() if names else cpu
    facts = {"cpu": cpu, "cores": str(os.cpu_count()), "threads": str(torch.get_num_threads())}
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return facts | versions | {"python": platform.python_version()}


HEADER = ["", "median (range)", "time, ours = 1", "of the limit", "peak memory", "error", ""]


def cells(row: Row, arm: Arm) -> list[str]:
    """What a table says of an arm: name, seconds with spread, against ours, limit, memory, error, note."""
    ours, spread = row.arms[0].median, f"{min(arm.seconds):.2f} to {max(arm.seconds):.2f}"
    time_or_rate = f"{arm.median:.2f} s ({spread})"
    if arm.work:
        time_or_rate += f", {arm.work / arm.median:.0f} tok/s"
    return [
        arm.name,
        time_or_rate,
        f"{arm.median / ours:.2f}x",
        f"{row.limit / arm.median:.0%}" if row.limit else "",
        f"{arm.peak_mb:.0f} MB" if arm.peak_mb is not None else "",
        ", ".join(f"{x:.0e}" for x in (arm.error, arm.gradient_error) if x is not None)
        + " WRONG" * arm.wrong,
        arm.note,
    ]


def table(rows: list[Row]) -> str:
    """The rows for a terminal."""
    lines = []
    for row in rows:
        body = [HEADER, *(cells(row, arm) for arm in row.arms)]
        widths = [max(len(line[k]) for line in body) for k in range(len(HEADER))]
        lines += [f"{row.name} (error: {row.error_of})"]
        lines += ["  " + "  ".join(cell.ljust(n) for cell, n in zip(line, widths)).rstrip() for line in body]
        lines += [f"  {text}" for text in row.missing]
    return "\n".join(lines)


def markdown(result: dict) -> str:
    """The table of a result file for docs/speed.md."""
    lines = ["| " + " | ".join(HEADER) + " |", "|" + "---|" * len(HEADER)]
    for raw in result["rows"]:
        row = Row(**raw | {"arms": [Arm(**arm) for arm in raw["arms"]]})
        lines.append(f"| **{row.name}** |" + " |" * (len(HEADER) - 1))
        lines += ["| " + " | ".join(cells(row, arm)) + " |" for arm in row.arms]
    return "\n".join(lines)
