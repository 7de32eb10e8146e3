"""What all commands share: output, progress, how they stop, the numbers they take, the threads they use."""

import argparse
import contextlib
import functools
import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol, TextIO

from tqdm import tqdm

from nanotoolrl.gpu import distributed

MOST_THREADS = 1024
STOPPING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Main(Protocol):
    """A command: arguments (default: those of the process) -> exit code."""

    def __call__(self, argv: list[str] | None = None) -> int: ...


def command(main: Main) -> Main:
    """Decorator of a command's `main`: what it prints can neither fail nor end it (see `Output`)."""

    @functools.wraps(main)
    def wrapped(argv: list[str] | None = None) -> int:
        with lasting_output():
            return main(argv)

    return wrapped


def printer(module: str, about: str, page: Callable[[], str]) -> Main:
    """The command of a module that prints a page, and takes nothing but --help."""

    @command
    def main(argv: list[str] | None = None) -> int:
        argparse.ArgumentParser(prog=f"python -m {module}", description=about).parse_args(argv)
        print(page(), end="")
        return 0

    return main


class Output:
    """A text stream that cannot fail. What its encoding lacks is printed as "?". When nobody reads any more
    (a closed pipe, a terminal that is gone) the rest is thrown away."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")

    def write(self, text: str) -> int:
        """Write what can be written; returns the length of the text."""
        self._try(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def _try(self, what: Callable, *arguments: str) -> None:
        try:
            what(*arguments)
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())  # what is still in the stream's buffer goes there, too
            os.close(nowhere)

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)


@contextlib.contextmanager
def lasting_output() -> Iterator[None]:
    """stdout and stderr as `Output` while it is open; one that was closed before the start prints nowhere."""
    before = sys.stdout, sys.stderr
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        sys.stdout, sys.stderr = (Output(stream or nowhere) for stream in before)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            sys.stdout, sys.stderr = before


@contextlib.contextmanager
def one_voice() -> Iterator[None]:
    """Of several processes, only the first says what it does; all say what goes wrong."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        silence = contextlib.nullcontext() if distributed.first() else contextlib.redirect_stdout(nowhere)
        with silence:
            yield


def progress(things: Iterable | None = None, what: str | None = None, **settings: Any) -> tqdm:
    """A progress bar over `things`, or one to be counted up; of several processes only the first shows it.

    One over things goes away when it is done, and is left out where nobody sits at a terminal, or by
    TQDM_DISABLE=1.
    """
    unseen = os.environ.get("TQDM_DISABLE", "0") not in ("", "0") or None  # None: tqdm asks the terminal
    passing = {} if things is None else {"leave": False, "disable": unseen}
    hidden = {} if distributed.first() else {"disable": True}
    return tqdm(things, what, **{"dynamic_ncols": True} | passing | settings | hidden)


class StopSignal:
    """While it is open, Ctrl-C, SIGTERM (Slurm, docker stop) and SIGHUP (a closed terminal) raise
    KeyboardInterrupt with their number.

    In `after_the_step` the first one only asks the loop to save after the current step: `signal` is its
    number, else 0. What was ignored at the start (nohup) stays so.
    """

    def __enter__(self) -> "StopSignal":
        self.signal, self.patient = 0, False
        self.old: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():  # elsewhere they stay as they are
            for number in STOPPING:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self.old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.old.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def after_the_step(self) -> Iterator[None]:
        self.patient = True
        yield
        self.patient = False

    def _handle(self, number: int, _: object) -> None:
        if self.signal or not self.patient:
            raise KeyboardInterrupt(number)
        self.signal = number
        if distributed.first():
            print("\nfinishing this step, then saving; once more stops at once", file=sys.stderr)


def number(kind: type, **bounds: float) -> Callable[[str], float]:
    """A type for argparse: an int or a float within bounds (see `out_of_bounds`)."""

    def read(text: str) -> float:
        value = kind(text)
        if problem := out_of_bounds(value, **bounds):
            raise argparse.ArgumentTypeError(f"{problem}; it is {text}")
        return value

    read.__name__ = kind.__name__  # argparse says "invalid int value"
    return read


def out_of_bounds(
    value: float,
    above: float = -math.inf,
    least: float = -math.inf,
    most: float = math.inf,
    below: float = math.inf,
) -> str:
    """What a number must be and is not, or "". NaN and infinity are out of any bounds."""
    if above > -math.inf and not value > above:
        return "must be positive" if above == 0 else f"must be above {above:g}"
    if least == 0 and most == 1 and not 0 <= value <= 1:
        return "must be from 0 to 1"
    if least > -math.inf and not value >= least:
        return "must not be negative" if least == 0 else f"must be at least {least:g}"
    if isinstance(value, float) and not math.isfinite(value):
        return "must be finite"
    if value > most:
        return f"must be at most {most}"
    return "" if value < below or below == math.inf else f"must be below {below}"


def refuse_unheard(
    parser: argparse.ArgumentParser, args: argparse.Namespace, names: Iterable[str], where: str
) -> None:
    """Raise ValueError for a flag that was given and says nothing: it is refused, not ignored."""
    for name in names:
        if getattr(args, name) != parser.get_default(name):
            raise ValueError(f"--{name.replace('_', '-')} says nothing {where}")


# ---------------------------------------------------------------------------------------------------- threads
def cpu_threads(processes: int = 1) -> int:
    """CPU threads for one of so many processes on this machine: OMP_NUM_THREADS if it is set, else the cores
    that this process may use."""
    wanted = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if wanted.isdecimal() and 0 < int(wanted) <= MOST_THREADS:
        return int(wanted)
    return max(1, available_cores() // processes)


def available_cores(root: Path = Path("/")) -> int:
    """Cores that this process may use: its affinity (taskset, Slurm) and the CPU quota of its control groups
    (docker --cpus), rounded up. root: where /proc and /sys are."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, math.ceil(min([cores, *map(_quota_of, control_groups(root, "cpu"))])))


def control_groups(root: Path, controller: str) -> Iterator[Path]:
    """Folders that may hold a controller's limits ("cpu", "memory") of this process's control groups and of
    those above them, in version 2 and in version 1. root: where /proc and /sys are."""
    try:
        groups = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:  # no Linux
        return
    home = root / "sys/fs/cgroup"
    for line in groups:
        _, names, path = line.split(":", 2)
        mounts = (home, home / names, home / controller) if controller in names.split(",") else (home,)
        folder = Path(path.lstrip("/"))
        yield from (mount / place for place in (folder, *folder.parents) for mount in mounts)


def _quota_of(group: Path) -> float:
    """CPU quota of one control group, in cores: version 2 has cpu.max with quota and period, version 1 a file
    for each."""
    try:
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text(encoding="utf-8").split()
        else:
            names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
            quota, period = ((group / name).read_text(encoding="utf-8").strip() for name in names)
        return float(quota) / float(period) if float(quota) > 0 else math.inf
    except (OSError, ValueError, ZeroDivisionError):  # none there, "max", or a kernel of another kind
        return math.inf
