"""Whole GRPO steps beside TRL's, and how their time grows."""

import functools
import math
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from bench.measure import OURS, Arm, Row, installed, timed
from bench.models import sized_policy, transformers_model
from bench.replay import ReplaySampler
from nanotoolrl.config import Config
from nanotoolrl.env import Episode, Task
from nanotoolrl.loading import BUILT_IN, load
from nanotoolrl.look.figures import COLORS
from nanotoolrl.model import Policy
from nanotoolrl.run import Run, group_advantages, rollout
from nanotoolrl.updates import policy_update
from nanotoolrl.world.tasks import load_tasks


def step(device: torch.device, repeats: int, small: bool, model: str = BUILT_IN) -> list[Row]:
    """One whole GRPO step, rollout and update, on the same tokens (row 8)."""
    config = Config(scheme="grpo", prompts=2 if small else 8, group=4 if small else 8, model=model, warmup=0)
    name = f"GRPO step, {config.prompts} x {config.group} rollouts, {model}"
    tasks = load_tasks("train")[: config.prompts]
    return [step_row(name, config, tasks, lambda: load(model, device=str(device)), repeats)]


def step_row(
    name: str,
    config: Config,
    tasks: list[Task],
    policy_of: Callable[[], Policy],
    repeats: int,
    writer: Policy | None = None,
    warm_up: bool = True,
) -> Row:
    """Whole steps of a policy, on rollouts that `writer` (by default another of its kind) has sampled."""
    trajectories = rollout(new_run(config, writer or policy_of()), tasks)
    run, found = new_run(config, policy_of()), []
    player = ReplaySampler(run.policy, trajectories, context=config.context)

    def ours(every_row: bool = False) -> None:
        initial = {name: value.clone() for name, value in run.policy.model.state_dict().items()}
        episodes = [Episode(row, config.format, config.max_messages) for row in grouped(tasks, config.group)]
        rows = player.rollout(episodes, temperature=config.temperature)
        metrics = policy_update(run, rows, group_advantages(run, rows), every_row=every_row)
        found.append((metrics["grad_norm"], metrics["forward_tokens"]))
        run.policy.model.load_state_dict(initial)

    row = Row(name, [], error_of="gradient norm")
    every = f"{OURS}, every row"
    row.arms = [Arm(OURS, note="rows without advantage left out"), Arm(every)]
    runs = {OURS: ours, every: lambda: ours(every_row=True)}
    if version := installed("trl", "trl", row.missing):
        from bench.trl import TrlStep

        policy = policy_of()
        theirs = TrlStep(config, tasks, trajectories, policy, transformers_model(policy))
        row.arms.append(Arm(f"TRL {version}", note="GRPOTrainer, rollout_func, generate for every message"))
        runs[row.arms[-1].name] = theirs
    for arm in row.arms:
        arm.work = sum(r.sampled_tokens for r in trajectories)
    timed(row, runs, repeats, run.policy.device, warm_up)
    row.length = sum(len(r.tokens) for r in trajectories) / len(trajectories)
    own = dict(zip(runs, found[-2:]))  # of the last turn
    norm = own[every][0]
    for arm in row.arms:
        value = own[arm.name][0] if arm.name in own else theirs.grad_norm
        arm.error, arm.tolerance = abs(value / norm - 1) if norm else abs(value), 1e-3
        if arm.name in own:
            arm.note = ", ".join(filter(None, [arm.note, f"{own[arm.name][1]} tokens through the model"]))
    return row


def grouped(tasks: list[Task], group: int) -> list[Task]:
    return [task for task in tasks for _ in range(group)]


def new_run(config: Config, policy: Policy) -> Run:
    """A `Run` in its first step."""
    run = Run.begin(config, policy)
    run.next_step()
    return run


GROWTH = {  # what grows, and the other two as they then are
    "rollouts": (16, 64, 512),  # of the built-in model, on prompts as they are
    "tokens of a prompt": (250, 1000, 3500),  # 16 rollouts of the built-in model, few messages
    "million parameters": (1, 5, 25),  # 32 rollouts, those of the built-in model
}


def growth(device: torch.device, repeats: int, small: bool) -> list[Row]:
    """How the time of a whole step grows with what it holds; `slopes` fits powers. Each arm runs once, cold:
    with a warm-up TRL's part would take hours."""
    tasks, writer, rows = load_tasks("train"), load(BUILT_IN, device=str(device)), []
    for axis, values in GROWTH.items():
        for value in values[:1] if small else values:
            prompts = {"rollouts": value // 8, "tokens of a prompt": 2}.get(axis, 4)
            config = Config(scheme="grpo", prompts=prompts, warmup=0, group=4 if small else 8)
            some, policy_of = tasks[::5][:prompts], functools.partial(sized_policy, 1, device)
            if axis == "tokens of a prompt":
                config = config.but(context=4096, max_messages=6)
                some = [lengthened(writer, task, value) for task in some]
            elif axis == "million parameters":
                policy_of = functools.partial(sized_policy, value, device)
            name = f"{value} {axis}"
            rows.append(step_row(name, config, some, policy_of, repeats, writer, warm_up=False))
            rows[-1].axis, rows[-1].at = axis, value
    return rows


def lengthened(policy: Policy, task: Task, length: int) -> Task:
    """The task with words before its first message, up to a prompt of `length` tokens."""
    first, *others = task.turns
    words = 0
    while True:
        longer = replace(task, turns=[replace(first, user="Well, " * words + first.user), *others])
        missing = length - len(policy.chat.prompt_ids(*Episode(longer).prompt(), "hermes"))
        if missing <= 0:
            return longer
        words += max(1, missing // 4)


def draw(rows: list[Row], path: Path) -> None:
    """Seconds of every arm against what grows, a panel each, both logarithmic."""
    axes_of = dict.fromkeys(row.axis for row in rows)
    figure = Figure(figsize=(4 * len(axes_of), 3.4), layout="constrained")
    for k, axis in enumerate(axes_of):
        axes = figure.add_subplot(1, len(axes_of), k + 1)
        points = [row for row in rows if row.axis == axis]
        for i, arm in enumerate(points[0].arms):
            medians = [row.arms[i].median for row in points]
            axes.loglog([row.at for row in points], medians, "o-", color=COLORS[i], label=arm.name)
        axes.set_xticks([row.at for row in points], [f"{row.at:g}" for row in points])
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.set_xlabel(axis)
        axes.set_ylabel("seconds of a step")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)


def slopes(rows: list[Row]) -> dict[str, dict[str, float]]:
    """Exponent of the time of every arm, by what grew: 1 where twice as much takes twice as long."""
    found: dict[str, dict[str, float]] = {}
    for axis in dict.fromkeys(row.axis for row in rows):
        points = [row for row in rows if row.axis == axis]
        for arm in points[0].arms if len(points) > 1 else ():
            name = arm.name
            times = [next(a.median for a in row.arms if a.name == name) for row in points]
            fit = statistics.linear_regression(
                [math.log(row.at) for row in points], [math.log(seconds) for seconds in times]
            )
            found.setdefault(axis, {})[name] = fit.slope
    return found


def slopes_table(found: dict[str, dict[str, float]]) -> str:
    """Markdown: exponents, an arm to a column."""
    names = list(next(iter(found.values()), {}))
    lines = ["| time grows as | " + " | ".join(names) + " |", "|---" * (1 + len(names)) + "|"]
    for axis, by_arm in found.items():
        lines.append(
            f"| {axis} to the power of | " + " | ".join(f"{by_arm[name]:.2f}" for name in names) + " |"
        )
    return "\n".join(lines)
