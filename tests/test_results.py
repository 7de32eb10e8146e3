"""The tables of what replicates: success task by task, pooled over seeds."""

import json
import math

from nanotoolrl.look import results, rows
from nanotoolrl.look.evaluate import Scores
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
    assert found["digits closing"] == "t" + "".join(str(int(task.id in solved)) for task in order)
    assert found["collapsed"] == 0 and found["digits python ood"].count("1") == 6
    assert found[f"after {TASKS[0].category}"] == scores(TASKS, 3).of(TASKS[0].category).share
    (tmp_path / "grid.json").write_text("{")
    (tmp_path / "result.json").unlink()
    assert rows.reward_cells(RunFiles(tmp_path, "r", {}, {}, [])) == {}


def test_the_untrained_model_is_a_method(tmp_path):
    """What every run did before, and the grid of the model if there is one; of none that ended, no line."""
    files = finished(tmp_path)
    assert rows.untrained_row(RunFiles(tmp_path / "none", "r", {}, {}, []), tmp_path / "grid.json") == {}
    assert "digits python ood" not in rows.untrained_row(files, tmp_path / "none.json")
    found = rows.untrained_row(files, tmp_path / "grid.json")
    assert found["run"] == "untrained-seed0" and found["greedy_after"] == 1.0
    assert found["digits closing"] == "t" + "1" * 12
    assert found["digits python ood"] == rows.reward_cells(files)["digits python ood"]


def test_tables(tmp_path):
    """Two seeds of one method beside the paper's numbers; what was not measured is empty."""
    files = finished(tmp_path)
    row = rows.reward_cells(files) | {"greedy_after": 1 / 3, "fall": "", "sft_tokens": 4000.0}
    row["flags"] = "--scheme ets --preset rescue --seed 0"
    other = row | {"greedy_after": 0.0, "fall": 15, "collapsed": 1, "digits closing": "t" + "0" * 12}
    other["digits python ood at the fall"] = "t" + "0" * 12
    start = rows.untrained_row(files, tmp_path / "grid.json")
    going = {"run": "ets-seed2", "fall": 3}
    arms = {"untrained": [start], "ets": [row, other, going], "new": [going]}
    found = list(results.tables(arms))
    assert len(found) == 4
    lines = found[0].splitlines()
    assert lines[2].startswith("| untrained | 1 | 0 | 0 |  |") and lines[2].endswith(
        "| 100, 100 |  |  |  |  | 3.5, 12.5 |  |"
    )
    assert lines[3].startswith("| ets | 2 | 1 | 1 | 15 |") and lines[3].endswith(
        "] |  |  | 4k | 20.0, 23.25 | `--scheme ets` |"
    )
    assert "| 16.7 [" in lines[3] and "] | 0, 33 | -83.3 [" in lines[3]
    assert len(lines) == 4, "what is not finished is not there"
    captions = [table.partition("\n\n")[0] for table in found[1:]]
    assert captions[1] == "The same, as changes from the untrained model:" and len(set(captions)) == 3
    found = [table.rpartition("\n\n")[2] for table in found]
    lines = found[1].splitlines()
    assert lines[3].count("50.0 [") == 4 and lines[3].endswith("| 8.75, 21.6 |") and len(lines) == 4
    assert found[2].splitlines()[2].count(" +0.0 [-24.3, +24.3] |  |") == 4
    assert found[3].splitlines()[2].startswith("| ets |") and "| 0.0 [0.0, " in found[3]


def test_a_change_is_from_the_arm_that_is_named():
    """Twelve tasks, all solved and none: 100 points more, and less; nothing to compare with: None."""
    arms = {name: [{"digits closing": "t" + digit * 12}] for name, digit in (("a", "1"), ("b", "0"))}
    assert results.changed(arms, "a", "closing", "b").share == 1
    assert results.changed(arms, "b", "closing", "a").share == -1
    assert results.changed(arms, "a", "closing") is None and results.pooled([], "closing") is None


def test_command(tmp_path, capsys):
    assert results.main([str(tmp_path / "no.csv")]) == 2 and "no table of a study" in capsys.readouterr().err
    (tmp_path / "t.csv").write_text("run,fall,greedy_after\nets-seed0,3,0.1\n")
    assert results.main([str(tmp_path / "t.csv")]) == 0
    assert "| ets | 1 | 0 | 1 | 3 |" in capsys.readouterr().out
    digits = "run,greedy_after,digits closing\nets-seed0,0.5,t0101\nets-seed1,0.5,t01\n"
    (tmp_path / "t.csv").write_text(digits)
    assert results.main([str(tmp_path / "t.csv")]) == 2, "they were not of the same tasks"
    (tmp_path / "t.csv").write_text('run,greedy_after\nets-seed0,"0,5"\n')
    assert results.main([str(tmp_path / "t.csv")]) == 2, "a spreadsheet's number"


def test_success_over_steps(tmp_path):
    """Read back from the table, nothing of a run without rollouts; drawn."""
    metrics = {"success": [0.25, None, 0.0], "sft_tokens": [None, 30.0, 12.0], "step": [1.0, 2.0, 3.0]}
    found = rows.course_cells(RunFiles(tmp_path, "r", {}, metrics, []))
    assert found == {"course": "250 - 0", "sft_tokens": 42}
    (course,) = results.courses([found, {"course": "- -"}, {"run": "old"}])
    assert course[::2] == [25.0, 0.0] and math.isnan(course[1])
    (tmp_path / "t.csv").write_text(
        "run,course,null_half,greedy_after\nets-seed0,250 300,0.3,0.2\n"
        "ets-seed1,200 0,0.3,0.1\nsft-seed0,,,0.3\n"
    )
    assert results.main([str(tmp_path / "t.csv"), "--figure", str(tmp_path / "x" / "f.png")]) == 0
    assert (tmp_path / "x" / "f.png").stat().st_size > 5000
