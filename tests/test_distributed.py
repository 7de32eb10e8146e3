"""Two processes take the steps that one would."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers.runs import hears_signals
from safetensors.torch import load_file

from nanotoolrl.gpu import distributed
from nanotoolrl.loading import NANO

ROOT = Path(__file__).resolve().parent.parent
SMALL = "--preset smoke --eval-count 0 --threads 1 --lr 2e-6 --sft-lr 2e-6 --sft-tokens 200 --show-every 0"


def run(out: Path, processes: int, *flags: str) -> subprocess.CompletedProcess:
    """train.py, under torchrun if there are several processes."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += ["train.py", *SMALL.split(), "--out", str(out), *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, env=environment)


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model" / "model.safetensors")


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return max((one[name] - other[name]).abs().max().item() for name in one)


def metrics(out: Path) -> list[dict[str, str]]:
    with (out / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    "flags",
    [
        "--scheme prs --steps 3",  # rollouts, reflections, a burst
        "--scheme chord --steps 2 --updates 2 --kl 0.1 --prompts 5",  # SFT in the update, a reference
    ],
    ids=["prs", "chord"],
)
def test_two_processes_make_the_model_that_one_makes(tmp_path, flags):
    """The rate is small: where a gradient is 0 but for rounding, Adam steps by the whole rate anyway."""
    done = [run(tmp_path / str(n), n, *flags.split()) for n in (1, 2)]
    assert [one.returncode for one in done] == [0, 0], done[1].stderr[-2000:]
    one, two = weights(tmp_path / "1"), weights(tmp_path / "2")
    assert distance(one, two) <= 1e-6 < 3e-6 < distance(one, load_file(NANO / "model.safetensors"))
    names = "tokens reward success loss entropy grad_norm clip_fraction sft_loss sft_tokens forward_tokens"
    names += " nll_control state_call contrast_groups failed_tasks"
    for row, other in zip(metrics(tmp_path / "1"), metrics(tmp_path / "2"), strict=True):
        for name in names.split():
            a, b = (float(x[name] or "nan") for x in (row, other))
            assert a == pytest.approx(b, rel=1e-4, abs=1e-6, nan_ok=True), name
    logs = [(tmp_path / str(n) / "rollouts.jsonl").read_text().splitlines() for n in (1, 2)]
    tokens = [[json.loads(line)["tokens"] for line in log] for log in logs]
    assert tokens[0] == tokens[1]
    assert done[1].stdout.count("memory plan") == 1  # one of them talks


def test_a_run_goes_on_with_another_number_of_processes(tmp_path):
    flags = ["--scheme", "grpo"]
    assert run(tmp_path / "a", 1, *flags, "--steps", "3").returncode == 0
    assert run(tmp_path / "b", 2, *flags, "--steps", "2").returncode == 0
    resumed = run(tmp_path / "b", 1, *flags, "--steps", "3", "--resume")
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    assert distance(weights(tmp_path / "a"), weights(tmp_path / "b")) <= 1e-6
    assert [row["step"] for row in metrics(tmp_path / "b")] == ["1", "2", "3"]


def test_a_refusal_ends_all_processes(tmp_path):
    done = run(tmp_path / "x", 2, "--scheme", "grpo", "--model", "data/nan0")
    assert done.returncode != 0 and done.stderr.count("train.py: no model in data/nan0") == 1


def test_what_the_first_refuses_all_refuse(tmp_path):
    """No process is left waiting, and no traceback hides the reason."""
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "mine").touch()
    done = run(tmp_path / "x", 2, "--scheme", "grpo")
    assert done.returncode != 0 and "choose another --out" in done.stderr
    assert "Connection closed" not in done.stderr and "Refused" not in done.stderr


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
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(slow)]
    command += [*SMALL.split(), "--scheme", "grpo", "--steps", "50", "--save-every", "50", "--out", str(out)]
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
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(dying),
    ]
    command += [*SMALL.split(), "--scheme", "grpo", "--steps", "50", "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=300)
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
