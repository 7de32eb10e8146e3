"""Two processes take the steps that one would."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers.runs import FEW, hears_signals
from safetensors.torch import load_file

import train
from nanotoolrl.gpu import distributed
from nanotoolrl.loading import NANO

ROOT = Path(__file__).resolve().parent.parent
SMALL = "--preset smoke --eval-count 0 --threads 1 --lr 2e-6 --sft-lr 2e-6 --sft-tokens 200 --show-every 0"
SMALL += f" --tasks {FEW} --max-messages 6"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def two(out: Path, *flags: str, script: str | Path = "train.py") -> subprocess.CompletedProcess:
    """train.py, or a script around it, in two processes under torchrun."""
    command = [sys.executable, *TORCHRUN, str(script), *SMALL.split(), "--out", str(out), *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, env=environment)


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model" / "model.safetensors")


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return max((one[name] - other[name]).abs().max().item() for name in one)


def metrics(out: Path) -> list[dict[str, str]]:
    with (out / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(
    scope="module",
    params=[
        "--scheme prs --steps 3",  # rollouts, reflections, a burst
        "--scheme chord --steps 2 --updates 2 --kl 0.1 --prompts 5",  # SFT in the update, a reference
    ],
    ids=["prs", "chord"],
)
def both(request, tmp_path_factory):
    """(home of the run of one process and that of two, named after their number; what the two printed)"""
    home, flags = tmp_path_factory.mktemp("both"), request.param.split()
    assert train.main([*SMALL.split(), *flags, "--out", str(home / "1")]) == 0
    done = two(home / "2", *flags)
    assert done.returncode == 0, done.stderr[-2000:]
    return home, done.stdout


@pytest.mark.slow
def test_two_processes_make_the_model_that_one_makes(both):
    """The rate is small: where a gradient is 0 but for rounding, Adam steps by the whole rate anyway."""
    home, printed = both
    one, other = weights(home / "1"), weights(home / "2")
    assert distance(one, other) <= 1e-6 < 3e-6 < distance(one, load_file(NANO / "model.safetensors"))
    names = "tokens reward success loss entropy grad_norm clip_fraction sft_loss sft_tokens forward_tokens"
    names += " nll_control state_call contrast_groups failed_tasks"
    for row, other in zip(metrics(home / "1"), metrics(home / "2"), strict=True):
        for name in names.split():
            a, b = (float(x[name] or "nan") for x in (row, other))
            assert a == pytest.approx(b, rel=1e-4, abs=1e-6, nan_ok=True), name
    logs = [(home / str(n) / "rollouts.jsonl").read_text().splitlines() for n in (1, 2)]
    tokens = [[json.loads(line)["tokens"] for line in log] for log in logs]
    assert tokens[0] == tokens[1]
    assert printed.count("memory plan") == 1  # one of them talks


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(both, tmp_path):
    home, _ = both
    steps = len(metrics(home / "1")) + 1
    for n in "12":
        shutil.copytree(home / n, tmp_path / n)
        assert train.main(["--resume", "--steps", str(steps), "--out", str(tmp_path / n)]) == 0
    assert distance(weights(tmp_path / "1"), weights(tmp_path / "2")) <= 1e-6
    assert [int(row["step"]) for row in metrics(tmp_path / "2")] == list(range(1, steps + 1))


@pytest.mark.slow
def test_what_one_process_refuses_all_refuse(tmp_path):
    """Be it found by all or by the first alone: no process is left waiting, and no traceback hides the
    reason."""
    mine, twice = tmp_path / "mine", tmp_path / "twice.py"
    mine.mkdir()
    (mine / "mine").touch()
    twice.write_text(
        "import os, pathlib, sys, train\n"
        "codes = [train.main([*sys.argv[1:], *flags]) for flags in "
        f"(['--model', 'data/nan0'], ['--out', {str(mine)!r}])]\n"
        "pathlib.Path(__file__).with_name('codes' + os.environ['RANK']).write_text(str(codes))\n"
        "sys.exit(codes[1])\n"
    )
    done = two(tmp_path / "x", "--scheme", "grpo", script=twice)
    assert done.returncode != 0
    assert [(tmp_path / f"codes{rank}").read_text() for rank in "01"] == ["[2, 2]"] * 2
    assert done.stderr.count("train.py: no model in data/nan0") == 1
    assert done.stderr.count("choose another --out") == 1
    assert "Connection closed" not in done.stderr and "Refused" not in done.stderr


@pytest.mark.slow
def test_ctrl_c_saves_what_all_processes_did(tmp_path):
    """The others wait for the first one's checkpoint, however slowly it is written."""
    out, slow = tmp_path / "x", tmp_path / "slow.py"
    slow.write_text(
        "import sys, time, train\n"
        "save = train.RunDirectory.save\n"
        "slowly = lambda *a: (time.sleep(2 if train.distributed.first() else 0), save(*a))\n"
        "train.RunDirectory.save = slowly\n"
        "sys.exit(train.main())\n"
    )
    command = [
        sys.executable,
        *TORCHRUN,
        str(slow),
        *SMALL.split(),
        "--scheme",
        "grpo",
        "--steps",
        "50",
        "--save-every",
        "50",
        "--out",
        str(out),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with (tmp_path / "log").open("w") as log:
        pipes = {"stdout": log, "stderr": log}
        going = subprocess.Popen(command, cwd=ROOT, env=environment, preexec_fn=hears_signals, **pipes)
        for _ in range(600):
            if (out / "metrics.csv").exists() and metrics(out):
                break
            time.sleep(0.2)
        going.send_signal(signal.SIGINT)
        assert going.wait(timeout=120) != 0
    assert (tmp_path / "log").read_text().count("Stopped: Ctrl-C.") == 1
    last = int(metrics(out)[-1]["step"])
    assert 0 < last < 50 and torch.load(out / "checkpoint.pt", weights_only=True)["saved"]["step"] == last


@pytest.mark.slow
def test_a_killed_process_ends_the_others(tmp_path):
    """None is left waiting for it."""
    out, dying = tmp_path / "x", tmp_path / "dying.py"
    dying.write_text(
        "import os, signal, sys, train\n"
        "log = train.RunDirectory.log\n"
        "def dies(*a):\n"
        "    log(*a)\n"
        "    if not train.distributed.first():\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "train.RunDirectory.log = dies\n"
        "sys.exit(train.main())\n"
    )
    done = two(out, "--scheme", "grpo", "--steps", "50", script=dying)
    assert done.returncode != 0 and len(metrics(out)) < 50


def test_alone_everything_is_the_identity():
    assert list(distributed.share(5)) == [0, 1, 2, 3, 4] and distributed.first()
    assert distributed.gathered([1, 2]) == [1, 2] and distributed.total(0.5) == 0.5
    assert distributed.from_first(lambda: "x") == "x"


@pytest.mark.parametrize("count, world", [(0, 3), (1, 3), (5, 2), (7, 3), (8, 4)])
def test_shares_cover_everything_once(monkeypatch, count, world):
    monkeypatch.setattr(distributed, "world", lambda: world)
    found = []
    for rank in range(world):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        found += distributed.share(count)
    assert found == list(range(count))
