"""`--track`: what tensorboard, trackio and wandb are told is what metrics.csv has."""

import csv
import sys
from types import SimpleNamespace

import pytest
from helpers.runs import run

from nanotoolrl.config import SETTINGS, flag
from nanotoolrl.look import loggers


def logged(out) -> list[dict[str, float]]:
    """The rows of metrics.csv, without empty cells."""
    with (out / "metrics.csv").open(encoding="utf-8") as file:
        return [{k: float(v) for k, v in line.items() if v} for line in csv.DictReader(file)]


class Recorder:
    """Stands for trackio or wandb, and keeps what it is told."""

    def __init__(self, name):
        self.__name__, self.__spec__ = name, SimpleNamespace(name=name, origin="here")
        self.begun, self.told, self.ended = [], [], 0

    def init(self, **how):
        self.begun.append(how)

    def log(self, values, step):
        self.told.append((step, values))

    def finish(self):
        self.ended += 1

    def Table(self, columns, data):
        return {"columns": columns, "data": data}


@pytest.fixture(params=["trackio", "wandb"])
def recorder(request, monkeypatch):
    found = Recorder(request.param)
    monkeypatch.setitem(sys.modules, request.param, found)
    return found


@pytest.mark.slow
def test_a_run_is_told_and_goes_on(recorder, tmp_path):
    out, name = tmp_path / "run", recorder.__name__
    flags = ["--scheme", "grpo", "--track", name]
    assert run(*flags, "--steps", 1, out=out) == 0
    assert run("--resume", "--steps", 2, out=out) == 0
    first, second = recorder.begun
    assert first["project"] == loggers.PROJECT and first["resume"] == "allow" and recorder.ended == 2
    assert first["name"] == second["name"] and first["name"].startswith("run-"), "it goes on where it was"
    assert ("id" in first) == (name == "wandb")
    assert first["config"]["scheme"] == "grpo" and "judge" not in first["config"]
    rows = logged(out)
    assert [step for step, _ in recorder.told] == [1, 2]
    for (_, told), row in zip(recorder.told, rows, strict=True):
        rollouts = told.pop("rollouts")
        row.pop("step")
        assert told == pytest.approx(row, rel=1e-5)
        assert rollouts["columns"] == [*loggers.COLUMNS] and len(rollouts["data"]) == 4
        assert {line[2] for line in rollouts["data"]} <= {0.0, 1.0}
        assert all("user | " in line[-1] for line in rollouts["data"])


@pytest.mark.slow
def test_tensorboard_has_the_numbers_of_the_run(tmp_path):
    pytest.importorskip("tensorboard", reason="the package tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    assert run("--scheme", "grpo", "--track", "tensorboard", "--steps", 1, out=out) == 0
    assert run("--resume", "--steps", 2, out=out) == 0
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    rows = logged(out)
    assert set(events.Tags()["scalars"]) == {name for row in rows for name in row} - {"step"}
    for name in ("reward", "loss", "grad_norm"):
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert found == [(row["step"], pytest.approx(row[name], rel=1e-5)) for row in rows if name in row]
    assert {"settings/text_summary", "rollouts/text_summary"} <= set(events.Tags()["tensors"])


def test_a_logger_that_is_not_there_is_refused(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: None)
    assert run("--track", "wandb", out=tmp_path / "run") == 2
    assert "--track wandb needs the package wandb: pip install wandb" in capsys.readouterr().err
    assert not (tmp_path / "run").exists(), "nothing was begun"
    for name in SETTINGS["track"].choices[1:]:
        assert loggers.absent(name)
    assert not loggers.absent("none")


def test_numbers_of_a_row():
    row = {"step": 3, "reward": 0.5, "spike_token": "<tool_call>", "loss": float("nan"), "n": 2, "none": None}
    assert loggers.numbers_of(row) == {"reward": 0.5, "n": 2.0}


def test_what_a_model_wrote_stays_in_its_cell():
    lines = loggers.table(("a", "b"), [("x | y\nz", "<script>&")]).split("\n")
    assert lines == ["| a | b |", "|---|---|", "| x &#124; y<br>z | &lt;script>&amp; |"]


def test_a_logger_that_cannot_begin_is_refused_and_the_run_begins_anew(monkeypatch, tmp_path, capsys):
    class NoLogin(Recorder):
        def init(self, **how):
            raise RuntimeError("no API key")

    monkeypatch.setitem(sys.modules, "wandb", NoLogin("wandb"))
    out = tmp_path / "run"
    flags = ["--scheme", "grpo", "--steps", 1]
    assert run(*flags, "--track", "wandb", out=out) == 2
    assert "--track wandb cannot begin: RuntimeError: no API key" in capsys.readouterr().err
    assert run("--resume", "--track", "none", out=out) == 0
    assert len(logged(out)) == 1


def test_a_logger_that_cannot_end_lets_others_own_the_directory(monkeypatch, tmp_path):
    class Stuck(Recorder):
        def finish(self):
            raise RuntimeError("no network")

    monkeypatch.setitem(sys.modules, "wandb", Stuck("wandb"))
    out = tmp_path / "run"
    with pytest.raises(RuntimeError, match="no network"):
        run("--scheme", "grpo", "--steps", 1, "--track", "wandb", out=out)
    assert run("--resume", "--steps", 2, "--track", "none", out=out) == 0


def test_no_flag_is_short_for_one_of_torchruns():
    """torchrun reads all flags, the script's too, and refuses the beginning of several of its own."""
    from torch.distributed.run import get_args_parser

    theirs = [name for action in get_args_parser()._actions for name in action.option_strings]
    for name in SETTINGS:
        assert not [one for one in theirs if one.startswith(flag(name))], name
