"""What is installed: every import is a requirement, and a whole run says nothing about what will break."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OURS = {"nanotoolrl", "bench", "train", "sample"} | {path.stem for path in (ROOT / "tests").iterdir()}
PEERS = {"bfcl_eval", "mpmath", "trl", "liger_kernel", "cut_cross_entropy"}  # only if they are there
OPTIONAL = {"peft", "tensorboard"}  # a flag needs them, and says so where they are not
PEERS |= {"datasets"}  # comes with trl


def imported(path):
    """Names of the packages that a file imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.partition(".")[0]


def required():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return {re.match(r"\w+", line).group() for line in lines}


def test_what_is_imported_is_required_and_the_other_way_round():
    files = [*ROOT.glob("*.py"), *(ROOT / "nanotoolrl").rglob("*.py"), *(ROOT / "data").glob("*.py")]
    known = OURS | PEERS | OPTIONAL | sys.stdlib_module_names
    product = {name for path in files for name in imported(path)} - known
    tests = {name for path in (ROOT / "tests").rglob("*.py") for name in imported(path)} - known
    assert product <= required()
    assert tests <= required() | {"pytest", "hypothesis", "xdist"}
    assert required() <= product | tests


def test_no_test_module_imports_another():
    """What two of them use is in tests/helpers."""
    for path in (ROOT / "tests").rglob("*.py"):
        assert not [name for name in imported(path) if name.startswith("test_")], path.name


AS_TYPED = """
import runpy, sys
for line in sys.argv[1:]:
    print("$ python", line, flush=True)
    name, *sys.argv[1:] = line.removeprefix("-m ").split()
    sys.argv[0] = name
    try:
        if line.startswith("-m "):
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(name, run_name="__main__")
    except SystemExit as stop:
        assert not stop.code, line
"""


@pytest.mark.slow
def test_a_whole_run_warns_of_nothing(tmp_path):
    """Transformers and torch say on stderr what their next releases will refuse; one process, because what
    they say at their import they say once."""
    run = tmp_path / "run"
    lines = [
        f"train.py --preset smoke --steps 1 --prompts 2 --group 2 --eval-count 2 --out {run}",
        f"train.py --resume --steps 2 --out {run}",
        f"sample.py --model {run}",
        f"-m nanotoolrl.evaluate --count 4 --model {run}",
        f"-m nanotoolrl.report {run} --out {tmp_path / 'page'}",
    ]
    done = subprocess.run([sys.executable, "-c", AS_TYPED, *lines], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(f"$ python {line}\n" in done.stdout for line in lines)
    assert "warning" not in (done.stdout + done.stderr).lower()
