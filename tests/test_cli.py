"""What all commands share: output that cannot fail, bounds of numbers, threads."""

import argparse
import ast
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.models import policy_like
from helpers.runs import FEW

import nanotoolrl
import sample
import train
from nanotoolrl import cli
from nanotoolrl.cli import available_cores, cpu_threads, number, out_of_bounds
from nanotoolrl.look import evaluate, report

ROOT = Path(__file__).resolve().parent.parent
STAYS = (
    "train.py --preset smoke --steps 1 --eval-count 0 --prompts 2 --group 2 --probe-tasks 2 --max-messages 4 "
    f"--tasks {FEW}"
)


@pytest.mark.parametrize(
    ("value", "bounds", "said"),
    [
        (0, {"above": 0}, "must be positive"),
        (float("nan"), {"above": 0}, "must be positive"),
        (float("nan"), {"least": 0}, "must not be negative"),
        (float("nan"), {}, "must be finite"),
        (float("inf"), {"above": 0}, "must be finite"),
        (-1, {"least": 0}, "must not be negative"),
        (1, {"least": 2}, "must be at least 2"),
        (1.5, {"least": 0, "most": 1}, "must be from 0 to 1"),
        (10**400, {"most": 9}, "must be at most 9"),
        (2, {"above": 0, "least": 2, "most": 2}, ""),
    ],
)
def test_bounds(value, bounds, said):
    assert out_of_bounds(value, **bounds) == said


def test_numbers_of_the_command_line():
    assert number(float, least=0)("1e-3") == 1e-3
    with pytest.raises(argparse.ArgumentTypeError, match="must be positive; it is -3"):
        number(int, above=0)("-3")
    with pytest.raises(ValueError):
        number(int)("x")


# ----------------------------------------------------------------------------------------------------- output
def shell(command, **environment):
    """Run a line of a shell; "python" is this one."""
    line = command.replace("python ", f"{sys.executable} ")
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", line],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        timeout=240,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "line",
    [
        "python train.py --list | true",
        "python train.py --list | head -1",
        "python train.py --help | head -1",
        "python -m nanotoolrl.evaluate --help | head -1",
        "python sample.py --oracle | head -1",
        "python sample.py --oracle >&-",
        "python sample.py --oracle >&- 2>&-",
    ],
)
def test_a_reader_that_leaves_is_no_error(line):
    done = shell(line)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.slow
@pytest.mark.parametrize("ends", [">&- 2>&-", "2>&1 | head -1"])
def test_training_outlives_its_reader(ends, tmp_path):
    assert shell(f"python {STAYS} --show-every 1 --out {tmp_path / 'run'} {ends}").returncode == 0
    assert (tmp_path / "run" / "model" / "config.json").is_file()


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1"])
def test_output_that_is_not_utf8(encoding, tmp_path, monkeypatch):
    """A model that writes what the terminal lacks (U+FFFD), and sparklines."""
    terminal = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(terminal, encoding))
    with cli.lasting_output():
        print("\ufffd \u2588 ok")
    assert terminal.getvalue() == b"? ? ok\n"
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(terminal, encoding))
    committed = ROOT / "data" / "results" / "first" / "hint" / "seed0"
    assert report.main([str(committed), "--out", str(tmp_path)]) == 0
    assert terminal.getvalue().count(b"?") > 2
    assert (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_model_that_writes_what_the_terminal_lacks_is_trained_to_the_end(tmp_path):
    """Random weights: U+FFFD in its rollouts, on a terminal that is not UTF-8."""
    policy_like("qwen2.5").save(tmp_path / "model")
    flags = (
        f"{STAYS} --show-every 1 --max-new-tokens 60 --model {tmp_path / 'model'} --out {tmp_path / 'run'}"
    )
    done = shell(f"python {flags}", PYTHONIOENCODING="cp1252")
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "run" / "rollouts.jsonl").read_text(encoding="utf-8").splitlines()
    assert "\ufffd" in json.loads(lines[-1])["text"] and b"?" in done.stdout


NO_FILES = ("decoder.open", "os.open", "opener.open", "webbrowser.open")  # of memory, a descriptor, a URL


def test_every_file_is_opened_with_its_encoding():
    """What a file says must not depend on the platform it is read on."""
    for path in [*ROOT.glob("*.py"), *(ROOT / "nanotoolrl").rglob("*.py"), *(ROOT / "data").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            opens = called == "open" or called.endswith((".open", ".read_text", ".write_text"))
            if opens and not called.endswith(NO_FILES):
                modes = [a.value for a in node.args if isinstance(a, ast.Constant)]
                binary = any(mode in ("rb", "wb", "ab", "r+b", "xb") for mode in modes)
                said = {keyword.arg for keyword in node.keywords}
                assert binary or "encoding" in said, f"{path.name}:{node.lineno}"


# ---------------------------------------------------------------------------------------------------- threads
@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, ["PASSIVE", True]),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, ["ACTIVE", False]),
        ({"GOMP_SPINCOUNT": "7"}, [None, True]),
    ],
)
def test_threads_wait_asleep_unless_the_user_says_otherwise(given, found):
    """Every module of the package has this one imported before it."""
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    environment = {k: v for k, v in os.environ.items() if k not in names} | given
    code = "import nanotoolrl, os, sys; assert 'torch' not in sys.modules; "
    code += "print([os.environ.get('OMP_WAIT_POLICY'), 'GOMP_SPINCOUNT' in os.environ])"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ast.literal_eval(done.stdout) == found, done.stderr


@pytest.mark.parametrize(
    ("load", "busy"),
    [("0.1 0.1 0.1 1/77 9", False), ("0 0 0 3/77 9", True), ("nonsense", False), (None, False)],
)
def test_whether_others_are_at_work(load, busy, tmp_path):
    if load:
        (tmp_path / "loadavg").write_text(load)
    assert nanotoolrl.others_at_work(tmp_path / "loadavg", pause=0) == busy


@pytest.mark.parametrize("script", ["train.py", "sample.py", "data/make_base.py"])
def test_scripts_set_the_policy_before_torch_is_there(script):
    text = (ROOT / script).read_text(encoding="utf-8")
    assert text.index("\nimport nanotoolrl") < text.index("\nimport torch")


def files(root, content):
    for name, text in content.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.mark.parametrize(
    ("groups", "cores"),
    [
        ({}, 8),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 2),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "max 100000\n"}, 8),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "300000 100000\n"}, 3),
        ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": "1000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": "9900000 100000\n"}, 8),
        ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": "nonsense"}, 8),
        (
            {
                "proc/self/cgroup": "5:cpu,cpuacct:/d\n4:memory:/d\n",
                "sys/fs/cgroup/cpu,cpuacct/d/cpu.cfs_quota_us": "400000\n",
                "sys/fs/cgroup/cpu,cpuacct/d/cpu.cfs_period_us": "100000\n",
            },
            4,
        ),
        (
            {
                "proc/self/cgroup": "5:cpu,cpuacct:/d\n",
                "sys/fs/cgroup/cpu/d/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/d/cpu.cfs_period_us": "100000\n",
            },
            8,
        ),
    ],
)
def test_cores_that_a_process_may_use(groups, cores, tmp_path, monkeypatch):
    """Affinity of 8 cores; control groups of both versions, nested, without a quota, unreadable."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    files(tmp_path, groups)
    assert available_cores(tmp_path) == cores


@pytest.mark.slow
def test_every_command_takes_that_many_threads(monkeypatch, tmp_path):
    found = []
    for module in (train, sample, evaluate):
        monkeypatch.setattr(module, "cpu_threads", lambda *_: 3)
    monkeypatch.setattr(torch, "set_num_threads", found.append)
    assert train.main([*STAYS.split()[1:], "--out", str(tmp_path / "run")]) == 0
    assert sample.main(["--max-messages", "1"]) == 0
    assert evaluate.main(["--count", "1", "--max-messages", "1", "--format", "hermes"]) == 0
    assert found == [3, 3, 3]


def test_threads_of_a_command(monkeypatch):
    monkeypatch.setattr(cli, "available_cores", lambda: 8)
    for said, found in (("", 8), ("3", 3), ("2,1", 2), ("0", 8), ("many", 8), ("99999", 8)):
        monkeypatch.setenv("OMP_NUM_THREADS", said)
        assert cpu_threads() == found
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert [cpu_threads(n) for n in (1, 3, 99)] == [8, 2, 1]


def test_what_was_ignored_stays_ignored():
    """nohup python train.py ..."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with train.StopSignal():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)
