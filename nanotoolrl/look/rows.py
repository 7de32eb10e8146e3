"""What a run says, for one line of a study's table: measured from the files it left, and from the doctor."""

import contextlib
import json
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from nanotoolrl.calls import MESSAGE_STATES, UNHEALTHY_STATES
from nanotoolrl.env import Task
from nanotoolrl.look.doctor import COLLAPSED, SWAPS, Checkup, left_of, lost_of, verdict
from nanotoolrl.look.evaluate import Scores
from nanotoolrl.look.falls import fall_of, mean_and_error, onset_interval, onset_of, pushes_up_to
from nanotoolrl.look.runfiles import RunFiles
from nanotoolrl.places import CLASSES
from nanotoolrl.world.tasks import in_epochs, load_tasks

# Settings that the rates of the untrained model and a run must share.
SAMPLED = ("model", "tasks", "format", "temperature", "max_new_tokens", "max_messages", "context")
SAMPLED += ("tool_seconds", "strict_empty_turn")
WINDOW = 640  # rollouts over which sampled success is averaged
BASE = Path(__file__).resolve().parent.parent.parent / "data" / "results" / "base"
RATES = {"nano": "rates.json", "data/nano-s1": "rates-nano-s1.json"}  # by what a run calls its model
UNTRAINED = "untrained-seed0"  # the line of the model that runs began from
Cells = dict[str, Any]


def row(name: str, flags: str, files: RunFiles) -> Cells:
    """What a run's files say, for one line of the table.

    Greedy success: before, the best on the way (on `--eval-part` tasks), after. Sampled success: a mean over
    640 rollouts, empty of a run without any. The spike is the largest of the run; NLLs are ratios of the last
    measurement to the start.
    `halved_*` is measured at the first step, after the first 640 rollouts, whose sampled success is at most
    half of theirs; `end_*` are the message states of the last 640 rollouts.
    """
    window = math.ceil(WINDOW / (files.config["prompts"] * files.config["group"]))
    success = files.metrics["success"]
    windows = [mean(success[i : i + window]) for i in range(max(1, len(success) - window + 1))]
    sampled = [share for share in windows if share is not None]
    halved = next((window + i for i, share in enumerate(sampled) if i and share <= sampled[0] / 2), None)
    result = files.path / "result.json"
    finished = result.exists() and len(success) == files.config["steps"]
    scores = json.loads(result.read_text(encoding="utf-8")) if finished else {}
    # The first of the ways to play is greedy, on the evaluation tasks.
    greedy = {when: Scores(**next(iter(ways.values()))).success for when, ways in scores.items()}
    spikes = [(v["growth"], token) for line in files.probes for token, v in line.get("tokens", {}).items()]
    spike, token = max(spikes, default=(None, None))
    cells = {
        "run": name,
        "flags": flags,
        "steps": len(success),
        "minutes": sum(files.metrics["seconds"]) / 60,
        "made_with": made_with(files.config),
        "greedy_before": greedy.get("before"),
        "greedy_best": max(files.series("eval_success")[1], default=None),
        "greedy_after": greedy.get("after"),
        "sampled_start": sampled[0] if sampled else None,
        "sampled_best": max(sampled, default=None),
        "sampled_end": sampled[-1] if sampled else None,
        "spike": spike,
        "spike_token": token,
        "halved_step": halved,
    }
    for kind in ("nll_control", "nll_content"):
        steps, values = files.series(kind)
        cells[f"start_{kind}"] = values[0] if values else None
        cells[kind] = values[-1] / values[0] if values else None
        if halved and values:
            near = min(range(len(steps)), key=lambda i: abs(steps[i] - halved))
            cells[f"halved_{kind}"] = values[near] / values[0]
    for state in MESSAGE_STATES:
        cells[f"end_{state}"] = mean(files.metrics[f"state_{state}"][-window:])
    for more in (fall_cells, push_cells, null_cells, judged_cells, course_cells, reward_cells):
        cells |= more(files)
    return cells


def made_with(config: dict) -> str | None:
    """Threads, versions and machine, upon which rounding hangs; None where a run did not say."""
    versions = config.get("versions", {})
    said = [f"{name} {versions[name]}" for name in ("torch", "transformers") if name in versions]
    return (
        ", ".join([*said, f"{config['threads']} threads", *filter(None, [versions.get("machine")])])
        if said
        else None
    )


def mean(values: list[float | None]) -> float | None:
    """Of what is there; None if nothing is."""
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None


def fall_cells(files: RunFiles) -> Cells:
    """`fall`: its step. `onset_CLASS`: that of each class of tokens, with those for half and double the rise.
    `first`: the class with the earliest onset, if one is earlier than all others. `worst_state`: the
    commonest unhealthy state from the fall on."""
    fall = fall_of(files.series("success")[1])
    cells: Cells = {"fall": fall}
    onsets = {}
    for name in CLASSES:
        steps, values = files.series(f"nll_{name}")
        if len(values) > 1:
            onsets[name] = onset_of(steps, values)
            cells[f"onset_{name}"] = onsets[name]
            cells[f"onset_{name}_half"], cells[f"onset_{name}_double"] = onset_interval(steps, values)
    seen = sorted((step, name) for name, step in onsets.items() if step is not None)
    if seen:
        alone = len(seen) == 1 or seen[0][0] < seen[1][0]
        cells["first"] = seen[0][1] if alone else "tie"
    if fall:
        shares = {s: mean(files.metrics[f"state_{s}"][fall - 1 :]) or 0.0 for s in UNHEALTHY_STATES}
        cells["worst_state"] = max(shares, key=lambda state: shares[state])
    return cells


def push_cells(files: RunFiles) -> Cells:
    """`net TOKEN`: the net push on the logit of each control token in thousandths, the mean over the steps up
    to the fall, else over all; `net TOKEN error`: its standard error over steps. A dead step pushes
    nothing."""
    fall = fall_of(files.series("success")[1])
    kept = pushes_up_to(files, fall)
    cells: Cells = {}
    for token in files.tokens if len(kept) > 1 else ():
        sums = [1000 * sum(sum(tokens.get(token, (0, 0))) for tokens in places.values()) for places in kept]
        cells[f"net {token}"], cells[f"net {token} error"] = mean_and_error(sums)
    return cells


def null_cells(files: RunFiles) -> Cells:
    """`above_null`: sampled success in the first half of the steps, less what an untrained model is expected
    to show on the same tasks; `null_half`: that expectation; `null_end`: the same over the last 640 rollouts.
    """
    null = null_of(files.config, len(files.metrics["success"]))
    half = len(null) // 2
    success = [value or 0.0 for value in files.metrics["success"]]
    if not half or not files.series("success")[1]:
        return {}
    window = min(len(null), math.ceil(WINDOW / (files.config["prompts"] * files.config["group"])))
    expected = sum(null[:half]) / half
    return {
        "null_half": expected,
        "null_end": sum(null[-window:]) / window,
        "above_null": sum(success[:half]) / half - expected,
    }


def null_of(config: dict, steps: int) -> list[float]:
    """Expected sampled success of the untrained model on the tasks of each step, from its rates on every
    training task (data/results/base/, 8 rollouts of each); [] where the run had another model or other
    tasks, or samples otherwise than these rates were."""
    model = config.get("model", "nano")
    if model not in RATES:
        return []
    how, rates = base_rates(model)
    usual = {"min_turns": 1, "task_count": 0, "top_p": 1.0, "min_p": 0.0}
    usual |= {name: how.get(name) for name in SAMPLED}
    if any(config.get(name, value) != value for name, value in usual.items()):
        return []
    if not {"seed", "prompts"} <= config.keys() or config["scheme"] in ("hint", "ops", "ghpo"):
        return []
    order = in_epochs(train_tasks(), str(config["seed"]), range(steps * config["prompts"]))
    per_step = [order[i : i + config["prompts"]] for i in range(0, len(order), config["prompts"])]
    return [sum(rates[task.id] for task in chosen) / len(chosen) for chosen in per_step]


@cache
def train_tasks() -> list[Task]:
    """The training tasks, read and checked once for all rows of a table."""
    return load_tasks("train")


@cache
def base_rates(model: str) -> tuple[dict[str, Any], dict[str, float]]:
    """(how they were sampled, sampled success of a model of RATES by training task)."""
    stored = json.loads((BASE / RATES[model]).read_text(encoding="utf-8"))
    rewards = stored["scores"]["hermes"]["rewards"]
    return stored["arguments"], {task: rate for found in rewards.values() for task, rate in found.items()}


def stored_page(path: Path) -> dict[str, Any]:
    """A page of the doctor; {} where nothing can be read, or nothing was compared with."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and found.get("reference") else {}


def judged_cells(files: RunFiles) -> Cells:
    """What the doctor found (doctor.json): success by way of playing with its interval, and that of the
    reference; the share of broken messages; what is left of structure and of values, and what is lost."""
    found = stored_page(files.path / "doctor.json")
    if not found:
        return {}
    model, reference = (Checkup(**found[name]) for name in ("model", "reference"))
    cells: Cells = {"verdict": verdict(model, reference), "broken": model.unhealthy, "replies": model.replies}
    cells |= {"before broken": reference.unhealthy, "before replies": reference.replies}
    for way, (share, low, high, _) in model.success.items():
        cells |= {f"judged {way}": share, f"judged {way} low": low, f"judged {way} high": high}
        if way not in SWAPS:
            cells[f"before {way}"] = reference.success[way][0]
    cells |= {f"left {way}": share for way, share in left_of(model, reference).items()}
    return cells | {"lost": lost_of(model, reference)}


def course_cells(files: RunFiles) -> Cells:
    """`course`: sampled success step by step in thousandths, between spaces; `sft_tokens`: how many tokens
    SFT trained in all."""
    course = " ".join("-" if value is None else f"{1000 * value:.0f}" for value in files.metrics["success"])
    return {"course": course, "sft_tokens": sum(files.series("sft_tokens")[1])}


def reward_cells(files: RunFiles) -> Cells:
    """What the run ended with, task by task. `after CATEGORY`: greedy success; `digits closing`: a 1 or 0 for
    each task, in the order of `in_order`, of the closing evaluation. `collapsed`: 1 if greedy success is
    below a quarter of that before, by the doctor's rule. Further those of its grids: `grid_cells`."""
    cells: Cells = {}
    if greedy := greedy_of(files):
        cells |= closing_cells(greedy["after"])
        cells |= {"collapsed": int(greedy["after"].success < COLLAPSED * greedy["before"].success)}
    cells |= grid_cells(files.path / "grid.json")
    return cells | grid_cells(files.path / "grid-fall.json", " at the fall")


def greedy_of(files: RunFiles) -> dict[str, Scores]:
    """Greedy scores on held-out tasks "before" and "after" a run; {} where they were not taken."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        stored = json.loads((files.path / "result.json").read_text(encoding="utf-8"))
        return {when: Scores(**stored[when]["held out, greedy"]) for when in ("before", "after")}
    return {}


def closing_cells(scores: Scores) -> Cells:
    """`after CATEGORY` and `digits closing`."""
    shares = {f"after {name}": scores.of(name).share for name in scores.rewards}
    return shares | {"digits closing": digits(scores)}


def grid_cells(page: Path, when: str = "") -> Cells:
    """Of a page of `evaluate --grid`, in `digits WAY SET` and behind it `when`: a 1 or 0 for each task."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        stored = json.loads(page.read_text(encoding="utf-8"))["scores"]
        return {f"digits {name}{when}": digits(Scores(**values)) for name, values in stored.items()}
    return {}


def untrained_row(files: RunFiles, page: Path) -> Cells:
    """The line of the model that a run began from, as if it were a method: what it did before, and its grid
    if there is one; {} of a run that has not ended."""
    greedy = greedy_of(files)
    if not greedy:
        return {}
    start = {"greedy_before": greedy["before"].success, "greedy_after": greedy["before"].success}
    return {"run": UNTRAINED, **start, **closing_cells(greedy["before"]), **grid_cells(page)}


def digits(scores: Scores) -> str:
    """A 1 for each task that was solved, else a 0, ordered by category and name, behind a letter: a table is
    read as text. Greedy scores only: others are no digits."""
    found = scores.by_task("all")
    return "t" + "".join(str(int(found[key])) for key in sorted(found))


def in_order(tasks: Sequence[Task]) -> list[Task]:
    """Tasks in the order of `digits`."""
    return sorted(tasks, key=lambda task: (task.category, task.id))
