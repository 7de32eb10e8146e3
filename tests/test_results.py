"""The tables of what replicates: success task by task, pooled over seeds."""

import json

import pytest

from nanotoolrl.look import results, rows
from nanotoolrl.look.evaluate import Scores
from nanotoolrl.look.intervals import over_seeds, share_of
from nanotoolrl.look.runfiles import RunFiles
from nanotoolrl.world.tasks import load_tasks, subset

TASKS = subset(load_tasks("test"), 12)
WAYS = [f"{way} {name}" for name in ("test", "ood") for way in ("hermes", "python")]


def scores(tasks, solved):
    """Those of tasks of which every `solved`-th is."""
    found = Scores()
    for i, task in enumerate(tasks):
        found.rewards.setdefault(task.category, {})[task.id] = float(i % solved == 0)
    return found


def test_over_seeds():
    """Each task's mean over the seeds, with the interval of a share; one seed is that seed."""
    one, two = [1.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.0]
    assert over_seeds([one], "abcd") == share_of(one, "abcd")
    assert over_seeds([one, two], "aabb") == share_of([0.5, 0.0, 1.0, 0.5], "aabb")


def finished(path):
    """The files of a run that ended."""
    before, after = scores(TASKS, 1), scores(TASKS, 3)
    closing = {"before": {"held out, greedy": vars(before)}, "after": {"held out, greedy": vars(after)}}
    (path / "result.json").write_text(json.dumps(closing))
    grid = {name: vars(scores(subset(load_tasks(name.split()[-1]), 12), 2)) for name in WAYS}
    (path / "grid.json").write_text(json.dumps({"scores": grid}))
    return RunFiles(path, "r", {"format": "hermes"}, {}, [])


def test_rewards_task_by_task(tmp_path):
    found = rows.reward_cells(finished(tmp_path))
    order = rows.in_order(TASKS)
    solved = {task.id for i, task in enumerate(TASKS) if i % 3 == 0}
    assert found["digits hermes closing"] == "t" + "".join(str(int(task.id in solved)) for task in order)
    assert found["collapsed"] == 0 and found["grid python ood"] == pytest.approx(0.5)
    assert found[f"after {TASKS[0].category}"] == scores(TASKS, 3).of(TASKS[0].category).share
    (tmp_path / "grid.json").write_text("{")
    (tmp_path / "result.json").unlink()
    assert rows.reward_cells(RunFiles(tmp_path, "r", {}, {}, [])) == {}


def test_tables(tmp_path):
    """Two seeds of one method beside the paper's numbers; what was not measured is empty."""
    row = rows.reward_cells(finished(tmp_path)) | {"greedy_after": 1 / 3, "fall": ""}
    other = row | {"greedy_after": 0.0, "fall": 15, "collapsed": 1, "digits hermes closing": "t" + "0" * 12}
    arms = {"ets": [row, other], "new": [{"run": "new-seed0"}]}
    lines = results.main_table(arms).splitlines()
    assert lines[2].startswith("| ets | 2 | 1 | 1 | 15 |") and lines[2].endswith("| 20.0, 23.25 |")
    assert "16.7 [" in lines[2] and "] (0 to 33) |" in lines[2]
    assert lines[3].startswith("| new | 1 | 0 | 0 |  |")
    lines = results.ood_table(arms).splitlines()
    assert lines[2].count("50.0 [") == 4 and lines[2].endswith("| 8.75, 21.6 |")


def test_command(tmp_path, capsys):
    assert results.main([str(tmp_path / "no.csv")]) == 2 and "no table of a study" in capsys.readouterr().err
    (tmp_path / "t.csv").write_text("run,fall\nets-seed0,3\n")
    assert results.main([str(tmp_path / "t.csv")]) == 0
    assert "| ets | 1 | 0 | 1 | 3 |" in capsys.readouterr().out
