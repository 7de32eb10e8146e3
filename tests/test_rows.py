"""A line of a study's table: falls, pushes, the null, and what the doctor found."""

import csv
import json

import pytest

from nanotoolrl.look import rows
from nanotoolrl.look.report import read_run
from nanotoolrl.look.runfiles import RunFiles
from nanotoolrl.world.tasks import load_tasks

STATES = ("overlong", "empty", "bare", "malformed", "polluted", "call", "foreign", "reply")


def run_of(path, success, nlls=None, pushes=(), **config):
    steps = [float(i + 1) for i in range(len(success))]
    metrics = {"step": steps, "success": success, "seconds": [1.0] * len(success)}
    metrics |= {f"state_{state}": [0.1 * (state == "bare")] * len(success) for state in STATES}
    metrics |= {f"nll_{name}": values[1:] for name, values in (nlls or {}).items()}
    start = {"step": 0, "tokens": {"a": {"growth": 1.0}, "b": {"growth": 1.0}}}
    start |= {f"nll_{name}": values[0] for name, values in (nlls or {}).items()}
    lines = [{"step": i + 1} | ({"net_push": push} if push else {}) for i, push in enumerate(pushes)]
    settings = {"scheme": "grpo", "model": "nano", "tasks": "train", "prompts": 1, "group": 640, "seed": 0}
    return RunFiles(path, "r", settings | {"steps": 99} | config, metrics, [start, *lines])


def test_fall_and_what_went_first(tmp_path):
    nlls = {"structure": [0.1, 0.1, 0.3, 0.4, 0.5], "value": [0.1, 0.1, 0.1, 0.1, 0.3]}
    nlls |= {"opener": [0.2] * 5, "text": [0.1, 0.1, 0.1, 0.3, 0.3]}
    found = rows.fall_cells(run_of(tmp_path, [0.4, 0.4, 0.0, 0.0], nlls))
    assert found["fall"] == 4 and found["worst_state"] == "bare"
    assert (found["onset_structure"], found["onset_value"], found["onset_opener"]) == (2, 4, None)
    assert found["first"] == "structure"
    nlls["text"] = nlls["structure"]
    assert rows.fall_cells(run_of(tmp_path, [0.4] * 4, nlls))["first"] == "tie"


def test_net_push_up_to_the_fall(tmp_path):
    """In thousandths: 1, 3 and nothing, a dead step; both signs, all places; the fall is at step 3."""
    pushes = [{"x": {"a": [0.002, -0.001]}}, {"x": {"a": [0.001, 0.001]}, "y": {"a": [0.001, 0.0]}}]
    run = run_of(tmp_path, [0.4, 0.0, 0.0, 0.0], pushes=[*pushes, None, {"x": {"a": [9.0, 9.0]}}])
    found = rows.push_cells(run)
    assert found["net a"] == pytest.approx(4 / 3) and found["net b"] == 0
    held = rows.push_cells(run_of(tmp_path, [0.4] * 4, pushes=[*pushes, None, {"x": {"a": [0.0, 0.004]}}]))
    assert held["net a"] == pytest.approx(2)
    assert rows.push_cells(run_of(tmp_path, [0.4] * 4)) == {}, "an older run did not log it"
    assert rows.mean_and_error([1.0, 3.0]) == (2.0, 1.0)


def test_the_null_is_that_of_the_same_tasks(tmp_path, monkeypatch):
    """Each step's tasks, in the run's order, at the rates of the untrained model."""
    tasks = load_tasks("train")
    rates = {task.id: i / len(tasks) for i, task in enumerate(tasks)}
    for model in rows.RATES:
        how, known = rows.base_rates(model)
        assert how["model"] == model and how["samples"] == 8 and set(known) == set(rates)
    how = rows.base_rates("nano")[0]
    monkeypatch.setattr(rows, "base_rates", lambda model: (how, rates))
    run = run_of(tmp_path, [0.5] * len(tasks))
    null = rows.null_of(run.config, len(tasks))
    assert sorted(null) == pytest.approx(sorted(rates.values())), "an epoch has each task once"
    assert null != sorted(null) and null != rows.null_of(run.config | {"seed": 1}, len(tasks))
    found = rows.null_cells(run)
    first = null[: len(null) // 2]
    assert found["above_null"] == pytest.approx(0.5 - sum(first) / len(first))
    assert found["null_end"] == null[-1]
    for other in (
        {"model": "x"},
        {"top_p": 0.9},
        {"scheme": "hint"},
        {"min_turns": 3},
        {"max_new_tokens": 8},
    ):
        assert rows.null_of(run.config | other, 3) == []


@pytest.mark.parametrize("written", ["", "{", "[]", '{"verdict": "v", "model": {}, "reference": null}'])
def test_a_page_that_says_nothing(tmp_path, written):
    (tmp_path / "doctor.json").write_text(written)
    assert rows.judged_cells(run_of(tmp_path, [0.1])) == {}


def test_what_the_doctor_found(tmp_path):
    def share(x):
        return [x, x - 0.05, x + 0.05, 400]

    start = {"hermes": share(0.4), "python": share(0.3)}
    broken = {"hermes": share(0.0), "python": share(0.25), "its structure": share(0.04)}
    broken["its values"] = share(0.38)
    person = {"format": "hermes", "tokens": {}}
    model = {"name": "m", "success": broken, "states": {"bare": 3, "reply": 1}} | person
    page = {"verdict": "v", "model": model}
    page["reference"] = {"name": "nano", "success": start, "states": {"call": 1, "reply": 1}} | person
    assert rows.judged_cells(run_of(tmp_path, [0.1])) == {}
    (tmp_path / "doctor.json").write_text(json.dumps(page))
    found = rows.judged_cells(run_of(tmp_path, [0.1]))
    assert found["replies"] == 0.25 and found["before replies"] == 0.5
    assert found["broken"] == 0.75 and found["lost"] == "structure" and found["judged python"] == 0.25
    assert found["left its structure"] == pytest.approx(0.1) and found["before python"] == 0.3


# ----------------------------------------------------------------------------------------- a line as a whole
def logged(directory, success, control, content, growth=None):
    """A run directory with made-up logs: sampled success and NLLs of each step."""
    directory.mkdir(parents=True)
    settings = {"scheme": "grpo", "model": "nano", "prompts": 16, "group": 8, "steps": 11}
    (directory / "config.json").write_text(json.dumps(settings))
    names = ["step", "success", "seconds", "nll_control", "nll_content"]
    names += ["eval_success", *(f"state_{state}" for state in STATES)]
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
    found = rows.row("run", "--lr 1", read_run(tmp_path / "run"))
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
    found = rows.row("run", "", read_run(tmp_path / "run"))
    assert found["halved_step"] is None and "halved_nll_control" not in found and found["nll_control"] == 1.5


def test_a_run_without_rollouts(tmp_path):
    """Of SFT alone nothing is said of what was sampled."""
    found = rows.row("r", "", run_of(tmp_path, [None] * 6, tasks="train"))
    assert found["steps"] == 6 and found["fall"] is None and found["course"] == "- - - - - -"
    assert {found[f"sampled_{when}"] for when in ("start", "best", "end")} == {None}
    assert found["halved_step"] is None and "above_null" not in found


def test_the_mean_of_what_is_there():
    assert rows.mean([None, 1.0, 3.0]) == 2.0 and rows.mean([None]) is None
