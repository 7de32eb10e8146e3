"""A study runs what is missing, goes on with what is unfinished, and makes its table from the files."""

import csv
import json
import signal
import subprocess
import sys
import time

import pytest
from helpers.runs import TINY, hears_signals

from nanotoolrl.look import study
from nanotoolrl.look.report import read_run
from nanotoolrl.look.rundir import RunDirectory, logged_steps


def logged(directory, success, control, content, growth=None):
    """A run directory with made-up logs: sampled success and NLLs of each step."""
    directory.mkdir(parents=True)
    settings = {"scheme": "grpo", "model": "nano", "prompts": 16, "group": 8, "steps": 11}
    (directory / "config.json").write_text(json.dumps(settings))
    names = ["step", "success", "seconds", "nll_control", "nll_content"]
    names += ["eval_success", *(f"state_{state}" for state in study.MESSAGE_STATES)]
    with (directory / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, names, restval="0.125")
        writer.writeheader()
        for i, cells in enumerate(zip(success, control, content, strict=True)):
            values = dict(zip(names, [i + 1, cells[0], 6, *cells[1:]]))
            writer.writerow({k: "" if v is None else v for k, v in values.items()})
    spikes = {"a": {"growth": 3.0}, '{"': {"growth": growth or 2.0}}
    lines = [{"step": 0, "nll_control": 0.02, "nll_content": 0.1, "tokens": {}}, {"step": 1}]
    lines.append({"step": 2, "tokens": spikes})
    (directory / "probes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_row_by_hand(tmp_path):
    """Mean success of 640 rollouts, here 5 steps, is 0.4 at step 5, 0.44 at 6, 0.2 or less first at 10."""
    success = [0.4] * 5 + [0.6, 0.2, 0.0, 0.0, 0.0, 0.0]
    control = [None, 0.01, None, None, None, None, None, None, 0.2, None, 0.3]
    content = [None, 0.2, None, None, None, None, None, None, 0.4, None, 0.6]
    logged(tmp_path / "run", success, control, content, 40.0)
    found = study.row("run", "--lr 1", read_run(tmp_path / "run"))
    assert found["sampled_start"] == 0.4 and found["sampled_best"] == pytest.approx(0.44)
    assert found["sampled_end"] == pytest.approx(0.04) and found["minutes"] == pytest.approx(1.1)
    assert (found["spike"], found["spike_token"]) == (40.0, '{"')
    assert found["halved_step"] == 10
    assert found["halved_nll_control"] == pytest.approx(10) and found["halved_nll_content"] == pytest.approx(
        4
    )
    assert found["nll_control"] == pytest.approx(15) and found["end_call"] == 0.125
    assert found["greedy_before"] is None and found["greedy_best"] == 0.125


def test_a_run_that_holds(tmp_path):
    logged(tmp_path / "run", [0.4] * 7, [0.03] * 7, [0.1] * 7)
    found = study.row("run", "", read_run(tmp_path / "run"))
    assert found["halved_step"] is None and "halved_nll_control" not in found and found["nll_control"] == 1.5


def test_cells():
    assert [study.text(x) for x in (None, 0.123456, 3, "a")] == ["", "0.1235", 3, "a"]
    assert study.mean([None, 1.0, 3.0]) == 2.0 and study.mean([None]) is None


@pytest.mark.slow
def test_study_command(tmp_path, monkeypatch, capsys):
    """Two runs, one of which cannot be made; then more steps of the other."""
    flags = f"{TINY.replace('--threads 1 --show-every 0', '')} --scheme grpo --eval-count 2"
    study_of = {"good": f"{flags} --steps 1", "bad": f"{flags} --steps 1 --tasks nope"}
    monkeypatch.setitem(study.STUDIES, "tiny", study_of)
    command = ["tiny", "--jobs", "2", "--runs", str(tmp_path), "--table", str(tmp_path / "table.csv")]
    assert study.main(command) == 1
    assert "bad failed or has other settings" in capsys.readouterr().out
    assert "nope" in (tmp_path / "tiny" / "bad.log").read_text()

    def table():
        with (tmp_path / "table.csv").open() as file:
            return list(csv.DictReader(file))

    assert [(row["run"], row["steps"]) for row in table()] == [("good", "1")]
    assert table()[0]["greedy_after"] != ""
    result = (tmp_path / "tiny" / "good" / "result.json").stat().st_mtime_ns
    monkeypatch.setitem(study.STUDIES, "tiny", {"good": study_of["good"]})
    assert study.main(command) == 0
    assert (tmp_path / "tiny" / "good" / "result.json").stat().st_mtime_ns == result, "made once"
    monkeypatch.setitem(study.STUDIES, "tiny", {"good": f"{flags} --steps 3"})
    assert study.main(command) == 0
    assert [row["steps"] for row in table()] == ["3"]
    monkeypatch.setitem(study.STUDIES, "tiny", {"good": f"{flags} --steps 3 --lr 1e-3"})
    assert study.main(command) == 1
    assert table() == [], "a run with other settings is not listed as if it had these"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_a_study_that_is_ended_ends_its_runs(name, tmp_path):
    """They save, and the same command goes on."""
    flags = f"{TINY.replace('--threads 1 --show-every 0', '')} --scheme grpo --steps 500"
    code = "import sys; from nanotoolrl.look import study; "
    code += f"study.STUDIES['tiny'] = {{'one': {flags!r}, 'two': {flags!r}}}; sys.exit(study.main())"
    command = ["tiny", "--jobs", "1", "--runs", str(tmp_path), "--table", str(tmp_path / "table.csv")]
    home = tmp_path / "tiny"
    going = subprocess.Popen(
        [sys.executable, "-c", code, *command],
        cwd=study.ROOT,
        stderr=subprocess.PIPE,
        preexec_fn=hears_signals,
    )
    for _ in range(600):
        if (home / "one" / "metrics.csv").exists() and logged_steps(home / "one" / "metrics.csv"):
            break
        time.sleep(0.1)
    going.send_signal(getattr(signal, name))
    _, errors = going.communicate(timeout=120)
    assert going.returncode == 130 and b"the same command goes on" in errors
    owner = RunDirectory(home / "one")
    owner.take()  # nobody works in it any more
    owner.release()
    assert "Stopped: SIGTERM" in (home / "one.log").read_text() and (home / "one" / "model").is_dir()
    assert not (home / "two").exists()


def test_bad_jobs_are_refused(capsys):
    with pytest.raises(SystemExit):
        study.main(["collapse", "--jobs", "0"])
    assert "--jobs: must be positive" in capsys.readouterr().err
