"""A study runs what is missing, goes on with what is unfinished, and makes its table from the files."""

import csv
import os
import shlex
import signal
import subprocess
import sys
import time

import pytest
from helpers.runs import TINY, hears_signals

from nanotoolrl.look import studies as study_runs
from nanotoolrl.look import study
from nanotoolrl.look.arms import read_rows
from nanotoolrl.look.rows import UNTRAINED
from nanotoolrl.look.rundir import RunDirectory, logged_steps


def test_cells():
    assert [study.text(x) for x in (None, 0.123456, 3, "a")] == ["", "0.1235", 3, "a"]


@pytest.mark.slow
def test_study_command(tmp_path, monkeypatch, capsys):
    """Two runs, one of which cannot be made; then more steps of the other."""
    flags = f"{TINY.replace('--threads 1 --show-every 0', '')} --scheme grpo --eval-count 2 --seed 0"
    study_of = {"good": f"{flags} --steps 1", "bad": f"{flags} --steps 1 --tasks nope"}
    study_of["later"] = f"{flags} --steps 1 --seed 1"  # left out by --seeds
    monkeypatch.setitem(study.STUDIES, "tiny", study_of)
    command = ["tiny", "--jobs", "2", "--runs", str(tmp_path), "--table", str(tmp_path / "table.csv")]
    command += ["--seeds", "1"]
    assert study.main(command) == 1
    assert "bad failed or has other settings" in capsys.readouterr().out
    assert "nope" in (tmp_path / "tiny" / "bad.log").read_text()

    def table():
        with (tmp_path / "table.csv").open() as file:
            return [row for row in csv.DictReader(file) if row["run"] != UNTRAINED]

    assert [(row["run"], row["steps"]) for row in table()] == [("good", "1")]
    assert table()[0]["greedy_after"] != ""
    result = (tmp_path / "tiny" / "good" / "result.json").stat().st_mtime_ns
    monkeypatch.setitem(study.STUDIES, "tiny", {"good": study_of["good"]})
    assert study.main(command) == 0
    assert (tmp_path / "tiny" / "good" / "result.json").stat().st_mtime_ns == result, "made once"
    monkeypatch.setitem(study.STUDIES, "tiny", {"good": f"{flags} --steps 3"})
    assert study.main(command) == 0
    assert [row["steps"] for row in table()] == ["3"]
    other = tmp_path / "other"
    elsewhere = ["tiny", "--runs", str(other), "--known", str(tmp_path / "table.csv")]
    more = {"more": f"{flags} --steps 1 --seed 1", "good": f"{flags} --steps 3"}
    monkeypatch.setitem(study.STUDIES, "tiny", more)
    assert study.main(elsewhere) == 0
    assert not (other / "tiny" / "good").exists(), "it is known"
    assert [line["run"] for line in read_rows(other / "tiny" / "tiny.csv")] == [UNTRAINED, *more]
    assert read_rows(other / "tiny" / "tiny.csv")[2] == read_rows(tmp_path / "table.csv")[1]
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
        start_new_session=True,
    )
    for _ in range(600):
        if (home / "one" / "metrics.csv").exists() and logged_steps(home / "one" / "metrics.csv"):
            break
        time.sleep(0.1)
    os.killpg(going.pid, getattr(signal, name))  # as a terminal does: to all of the session
    _, errors = going.communicate(timeout=120)
    assert going.returncode == 130 and b"the same command goes on" in errors
    owner = RunDirectory(home / "one")
    owner.take()  # nobody works in it any more
    owner.release()
    assert "Stopped: SIGTERM" in (home / "one.log").read_text() and (home / "one" / "model").is_dir()
    assert not (home / "two").exists()


@pytest.mark.slow
def test_the_demo_ends_in_the_compared_report(tmp_path, monkeypatch, capsys):
    flags = f"{TINY.replace('--threads 1 --show-every 0', '')} --steps 1 --eval-count 2"
    monkeypatch.setitem(study.STUDIES, "demo", {name: f"{flags} --scheme {name}" for name in ("grpo", "ets")})
    monkeypatch.setattr(study.report, "has_screen", lambda: False)
    assert study.main(["demo", "--runs", str(tmp_path)]) == 0
    page = tmp_path / "demo" / "report" / "report.html"
    assert str(page) in capsys.readouterr().out and "grpo and ets" in page.read_text()
    assert (tmp_path / "demo" / "demo.csv").exists()


def test_what_a_table_knows(tmp_path):
    """Lines of finished runs with the flags of the study that are not here; no other file is a table."""
    flags = {name: f"--scheme grpo --steps 3 --seed {seed}" for seed, name in enumerate("abcd")}
    table = tmp_path / "table.csv"
    made = [{"run": name, "flags": flags[name], "steps": 3, "greedy_after": 0.5} for name in "abcd"]
    flags["e"] = "--scheme grpo --steps 3 --seed 4"
    made.append({"run": "e", "flags": flags["e"], "steps": 3})  # it was stopped as it was evaluated
    made[1]["steps"], made[2]["flags"] = 2, "--scheme grpo --steps 3 --lr 1"
    study.write(table, [{"run": UNTRAINED, "greedy_after": 0.5}, *made])
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "config.json").touch()
    assert list(study.known_rows(table, flags, tmp_path)) == [UNTRAINED, "a"]
    assert study.known_rows(table, {"other": flags["a"]}, tmp_path) == {}
    for text in ("one,two\n1,2\n", "run,flags\na,--scheme grpo --steps 3 --seed 0\n"):
        table.write_text(text)
        with pytest.raises(ValueError, match="no table of a study"):
            study.known_rows(table, flags, tmp_path)


def test_a_path_may_have_spaces(tmp_path, monkeypatch):
    """Of the runs, and of the model that they begin from."""
    monkeypatch.setattr(study, "ROOT", tmp_path)
    asked = []

    class Hand:
        def run(self, command, log):
            asked.extend(command[2:])
            return 0

    flags = f"--scheme grpo --steps 3 --seed 2 --model {shlex.quote('my models/a')}"
    assert study.train(tmp_path / "my runs" / "one", flags, Hand()) == 0
    assert asked[-1] == str(tmp_path / "my runs" / "one") and "my models/a" in asked
    assert (study.seed_of(flags), study.steps_of(flags)) == (2, 3)
    assert study.steps_of("--scheme grpo --model my models/a") == 0


def test_a_study_that_keeps_no_fall_is_not_judged(tmp_path, capsys):
    assert study.main(["collapse", "--runs", str(tmp_path), "--judge", "8"]) == 2
    assert "no run of this study keeps the model of its fall" in capsys.readouterr().err


def test_a_table_that_is_not_there_is_refused(tmp_path, capsys):
    assert study.main(["collapse", "--runs", str(tmp_path), "--known", str(tmp_path / "no.csv")]) == 2
    assert "no.csv" in capsys.readouterr().err


def test_bad_jobs_are_refused(capsys):
    with pytest.raises(SystemExit):
        study.main(["collapse", "--jobs", "0"])
    assert "--jobs: must be positive" in capsys.readouterr().err


@pytest.mark.parametrize("name", study.STUDIES)
def test_every_run_of_a_study_can_be_made(name):
    """Its flags are settings, and runs that differ in their seed alone are arms of five, three or two."""
    runs = study.STUDIES[name]
    assert all(study.parse(flags.split())[0] for flags in runs.values())
    assert len(set(runs.values())) == len(runs)
    for arm in {run.rpartition("-seed")[0] for run in runs} - {"", "small-batch-lr1e-3-warmup30"}:
        seeds = study_runs.FEWER if name in ("lr", "ablate") else study_runs.SEEDS
        count = len(study_runs.TWO if arm in study_runs.CANDIDATES else seeds)
        assert sum(run.rpartition("-seed")[0] == arm for run in runs) == count


def test_looks_at_a_finished_run(tmp_path, monkeypatch):
    """The doctor and the grid: the model that runs began from once, the fall only where there was one, each
    again only for another count; a failure ends the looks."""
    asked, codes = [], {}
    monkeypatch.setattr(study, "fall_of", lambda series: 4 if series else None)

    class Hand:
        def run(self, command, log):
            page = command[command.index("--json") + 1]
            asked.append(page.removeprefix(str(tmp_path) + "/"))
            count = command[command.index("--count") + 1]
            with open(page, "w") as file:
                file.write(f'{{"arguments": {{"count": {count}}}}}')
            return codes.get(asked[-1], 0)

    class Files:
        config = {"model": "data/nano"}

        def __init__(self, path):
            self.fell = "fell" in path.name

        def series(self, name):
            return [], [0.3] if self.fell else []

    monkeypatch.setattr(study, "read_run", Files)
    for name in ("fell", "stands"):
        (tmp_path / name / "models" / "fall").mkdir(parents=True)
    hand = Hand()
    for name in ("fell", "stands", "fell"):
        assert study.judge(tmp_path / name, 8, hand) == study.score_grids(tmp_path / name, 8, hand) == 0
    start, *others = "start-data_nano.json fell/doctor.json grid-data_nano.json fell/grid.json".split()
    assert asked == [start, *others, "fell/grid-fall.json", "stands/grid.json"]
    asked.clear()
    (tmp_path / "stands" / "model").mkdir()
    (tmp_path / "stands" / "model" / "weights").touch()
    later = time.time() + 5
    os.utime(tmp_path / "stands" / "model" / "weights", (later, later))
    assert study.score_grids(tmp_path / "stands", 8, hand) == 0
    assert asked == ["stands/grid.json"], "the model was written since"
    asked.clear()
    codes["grid-data_nano.json"] = 1
    assert study.score_grids(tmp_path / "fell", 9, hand) == 1 and asked == ["grid-data_nano.json"]
