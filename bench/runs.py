"""Whole commands: beside other work, and beside an older revision of the source."""

import csv
import functools
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch

from bench.measure import OURS, ROOT, Arm, Row, timed
from nanotoolrl.cli import available_cores
from nanotoolrl.config import Refused

LIBGOMP_SPINS = "300000"  # what libgomp takes where no variable says anything


def whole(device: torch.device, repeats: int, small: bool) -> list[Row]:
    """The commands that people type first, from beginning to end: the default run and the collapse."""
    flags = ["--preset smoke"] if small else ["--scheme hint", "--preset collapse"]
    rows = []
    for what in flags:
        rows.append(Row(f"python train.py {what}", [Arm(OURS)]))
        timed(
            rows[-1], {OURS: functools.partial(run_command, what, os.environ)}, repeats, device, warm_up=False
        )
    return rows


def run_command(flags: str, environment: Mapping[str, str]) -> None:
    """Run train.py to its end, in a directory that is removed."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "train.py", *flags.split(), "--out", f"{folder}/run"]
        subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)


def busy(device: torch.device, repeats: int, small: bool) -> list[Row]:
    """A short run as a command, alone and beside other work, one busy process for every core, with the ways
    in which torch's threads can wait for each other (nanotoolrl/__init__.py)."""
    flags = "--preset smoke --steps 1" if small else "--scheme hint --steps 3"
    flags += " --eval-count 0"
    cores = available_cores()
    unset = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}

    def run(busy_processes: int = 0, after: float = 0, **waiting: str) -> None:
        wait = f"import time; time.sleep({after})\nwhile True: pass"
        loops = [subprocess.Popen([sys.executable, "-c", wait]) for _ in range(busy_processes)]
        try:
            run_command(flags, unset | waiting)
        finally:
            for loop in loops:
                loop.kill()

    beside = f"beside {cores} busy processes"
    ways = {
        OURS: {},
        beside: {"busy_processes": cores},
        "waiting as libgomp does by itself": {"GOMP_SPINCOUNT": LIBGOMP_SPINS},
        "asleep at once": {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"},
        f"{beside} that begin 5 s later": {"busy_processes": cores, "after": 5},
    }
    row = Row(f"python train.py {flags}", [Arm(name) for name in ways])
    works = {name: functools.partial(run, **how) for name, how in ways.items()}
    timed(row, works, repeats, device, warm_up=False)
    return [row]


def before(device: torch.device, repeats: int, small: bool, revision: str) -> list[Row]:
    """Short runs of the present source and of an older revision, in turns: the whole command, and the tokens
    a second of its sampling. Raises Refused where git does not know the revision."""
    works = ["--scheme hint --preset nano --steps 3", "--preset collapse --steps 12"]
    if small:
        works = ["--preset smoke --steps 1"]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        add = ["git", "worktree", "add", "--detach", str(tree), revision]
        made = subprocess.run(add, cwd=ROOT, capture_output=True, text=True)
        if made.returncode:
            raise Refused(f"no revision {revision}: {made.stderr.strip()}")
        try:
            for flags in works:
                rows += before_rows(f"{flags} --eval-count 0", {OURS: ROOT, revision: tree}, repeats, device)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, check=True)
    return rows


def before_rows(flags: str, trees: dict[str, Path], repeats: int, device: torch.device) -> list[Row]:
    """(the whole command, its sampling) in each of the source trees."""
    whole, sampling = (
        Row(name, [Arm(tree) for tree in trees]) for name in (f"python train.py {flags}", "its sampling")
    )

    def run(name: str, arm: Arm) -> None:
        with tempfile.TemporaryDirectory() as out:
            command = [sys.executable, "train.py", *flags.split(), "--out", f"{out}/run"]
            subprocess.run(command, cwd=trees[name], check=True, capture_output=True)
            with open(f"{out}/run/metrics.csv", encoding="utf-8") as file:
                steps = list(csv.DictReader(file))
        arm.seconds.append(sum(float(step["sample_seconds"]) for step in steps))
        arm.work = sum(int(step["tokens"]) for step in steps)

    works = {arm.name: functools.partial(run, arm.name, arm) for arm in sampling.arms}
    timed(whole, works, repeats, device)
    for arm in sampling.arms:
        arm.seconds = arm.seconds[1:]  # without the warm-up
    return [whole, sampling]
