"""The lessons (docs/1-...md): their code prints what they say."""

import contextlib
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nanotoolrl.signals import SCHEMES

ROOT = Path(__file__).resolve().parent.parent
PAIR = re.compile(r"^```python\n(.*?)^```\n\n```text\n(.*?)^```", re.MULTILINE | re.DOTALL)
LESSONS = sorted(path for path in (ROOT / "docs").glob("[0-9]-*.md") if PAIR.search(path.read_text()))


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=pytest.mark.slow if "solutions" in path.stem else ()) for path in LESSONS],
    ids=[path.stem for path in LESSONS],
)
def test_the_code_prints_what_the_page_says(path):
    before, names = dict(SCHEMES), dict[str, object]()
    try:
        for code, expected in PAIR.findall(path.read_text(encoding="utf-8")):
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(code, names)
            assert printed.getvalue() == expected
    finally:  # what a page adds is not there for other tests
        SCHEMES.clear()
        SCHEMES.update(before)


def reading_path():
    page = (ROOT / "docs" / "1-one-step.md").read_text(encoding="utf-8")
    return re.findall(r"`([\w/]+\.py)`", page.split("The reading path")[1].split("\n\n")[0])


def test_the_reading_path_is_short():
    assert sum(len((ROOT / name).read_text(encoding="utf-8").splitlines()) for name in reading_path()) <= 2650


@pytest.mark.slow
def test_a_step_visits_each_file_once_on_its_way_down(tmp_path):
    """From `train` through `hint` to the weights: whatever is called, no file of the core stands twice in the
    chain of callers, and the files that the chains name are the reading path and what stands beside it."""
    command = [sys.executable, Path(__file__).parent / "helpers" / "walk.py", tmp_path / "run"]
    walk = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert walk.returncode == 0, walk.stderr
    chains = [tuple(chain) for chain in json.loads((tmp_path / "run" / "walk.json").read_text())]
    assert not [chain for chain in chains if len(set(chain)) < len(chain)]
    names = [Path(name).name for name in reading_path()]
    assert set(names) <= {name for chain in chains for name in chain}
    down = ("train.py", "guidance.py", "run.py", "sampler.py", "decode.py", "transformer.py", "cache.py")
    assert down in chains
