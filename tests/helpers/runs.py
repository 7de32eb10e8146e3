"""Runs of train.py, here and in a process of their own, and what they leave behind."""

import csv
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

import train
from nanotoolrl.look.rundir import RunDirectory
from nanotoolrl.world.tasks import subset

ROOT = Path(train.__file__).parent
TIMINGS = ("sample_tok_s", "train_tok_s", "sample_seconds", "probe_seconds", "seconds")
HOME = tempfile.TemporaryDirectory(prefix="nanotoolrl-")  # gone when the process ends


def some_tasks(split: str, count: int) -> Path:
    """A file with a few tasks of a split, which costs a run less than all of them."""
    path = Path(HOME.name) / f"{split}-{count}.jsonl"
    lines = (ROOT / "data" / "tasks" / f"{split}.jsonl").read_text(encoding="utf-8").split("\n")
    path.write_text("\n".join(subset(lines[:-1], count)) + "\n", encoding="utf-8")
    return path


FEW, OTHERS = some_tasks("train", 24), some_tasks("ood", 4)  # of all categories but miss_param
TINY = (
    "--preset smoke --eval-count 0 --prompts 2 --group 2 --updates 2 --probe-tasks 2 --max-messages 6 "
    f"--threads 1 --show-every 0 --sft-tokens 400 --sft-batch 4 --tasks {FEW} "
    "--seed 9"  # with it a step of grpo has contrast, and every step of hint
)


def hears_signals() -> None:
    """As `preexec_fn`: the child hears every signal, also those that this process ignores (under nohup, or in
    the background)."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def run(*flags, out):
    return train.main([*TINY.split(), "--out", str(out), *map(str, flags)])


def run_and_copy(step, *flags, out, copy):
    """A run, and what its directory held after a step: what is left of a run that died then."""
    save = RunDirectory.save

    def copying(directory, run, before):
        save(directory, run, before)
        if run.step == step:
            shutil.copytree(out, copy)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunDirectory, "save", copying)
        assert run(*flags, "--save-every", step, out=out) == 0


def sent(number, line, *flags, out):
    """(exit code, stderr) of a process of its own that gets a signal when it prints a line that begins so."""
    command = [sys.executable, "train.py", *TINY.split(), *map(str, flags), "--out", str(out)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    going = subprocess.Popen(command, cwd=ROOT, preexec_fn=hears_signals, **pipes)
    for printed in going.stdout:
        if printed.startswith(line):
            going.send_signal(number)
            break
    _, errors = going.communicate(timeout=120)
    return going.returncode, errors


def weights(out):
    return torch.load(Path(out) / "checkpoint.pt", weights_only=True)["saved"]["model"]


def rows(out):
    with (Path(out) / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def same_run(a, b):
    assert all(torch.equal(weights(a)[name], tensor) for name, tensor in weights(b).items())
    for left, right in zip(rows(a), rows(b), strict=True):
        assert {k: v for k, v in left.items() if k not in TIMINGS} == {
            k: v for k, v in right.items() if k not in TIMINGS
        }
    for name in ("rollouts.jsonl", "probes.jsonl"):
        assert (a / name).read_text() == (b / name).read_text()
