"""Schemes that train on examples, by SFT beside RL or between rounds of it.

A signal is a function: it takes the run, the step's tasks and their rollouts, and returns examples and what
it counted. `@signal` makes a scheme of it; when its examples are trained on is a schedule's business:
`sync` adds their SFT loss to every policy update, `interleaved` makes bursts of SFT between rounds of RL,
`none` makes the bursts without any RL (of `sft`: SFT alone, at every step).

Below them are schemes in which RL and SFT meet in one update (`hpt`, `chord`), and those that make bursts for
another reason (`sft_rl`, `bursts`, `sentinel`).
"""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from functools import partial, wraps
from typing import Any

import torch

from nanotoolrl.calls import FORMATS
from nanotoolrl.chat import control_tokens
from nanotoolrl.config import Setting, setting
from nanotoolrl.env import Task
from nanotoolrl.gpu import distributed
from nanotoolrl.guidance import FAILED_TASKS
from nanotoolrl.judge import AT_ONCE, MODEL, TIMEOUT, Judge, wrong_url
from nanotoolrl.run import (
    Run,
    Step,
    demonstrations,
    failed_tasks,
    group_advantages,
    move_reference,
    roll_back,
    rollout,
    snapshot,
)
from nanotoolrl.schemes import SCHEMES as SCHEMES  # complete when this module is imported
from nanotoolrl.schemes import grpo, scheme
from nanotoolrl.sft import burst, collect, pool, sft_update
from nanotoolrl.supervise import reflections
from nanotoolrl.trajectory import Trajectory
from nanotoolrl.updates import Supervision, policy_update
from nanotoolrl.world.tasks import in_epochs

# (run, the step's tasks, their rollouts) -> (examples, metrics)
Signal = Callable[[Run, list[Task], list[Trajectory]], tuple[list[Trajectory], dict[str, Any]]]
Schedule = Callable[[Run, list[Task], Signal], Step]

# Settings of several schemes. Published: rounds of 50 to 150 RL steps, examples of the last 10. Here a run
# has 20 steps, so rounds are short and the window is the round.
SOURCE = {
    "sft_source": setting("own", "whose ground truth: the training tasks', or foreign", ("own", "foreign"))
}
COEFFICIENT = {"sft_coef": setting(0.1, "weight of an SFT loss that is added to policy updates", least=0)}
WINDOW = {"sft_window": setting(5, "steps whose examples are trained on", above=0)}
ROUNDS = {"round_steps": setting(5, "RL steps between bursts", above=0)}
FAILURES = {
    "ets_any": setting(False, "a task counts as failed if any rollout failed, not only if all did"),
    "ets_formats": setting(
        "own", "formats in which failed tasks are shown: that of RL, or all", ("own", "all")
    ),
}
JUDGE = {
    "judge": setting(
        "",
        "chat-completions URL that writes the reflections (default: the checker)",
        problem=lambda url: wrong_url(url) if url else "",
    ),
    "judge_model": setting(MODEL, "model name sent to it"),
    "judge_timeout": setting(TIMEOUT, "seconds for a request and its whole answer", above=0, most=86_400),
}
IN_BURSTS = ("sft_epochs", "sft_tokens", "sft_lr", "sft_batch")  # shared settings of a burst
SFT_OFF = {"sft_coef": 0.0, "sft_epochs": 0}


# ----------------------------------------------------------------------------------------------- schedules
def sync(run: Run, tasks: list[Task], examples_of: Signal) -> Step:
    """Synchronous: loss of grpo + sft_coef * SFT loss, in every policy update.

    The examples are the signal's of the last `sft_window` steps, this one included.
    """
    trajectories = rollout(run, tasks)
    advantages = group_advantages(run, trajectories)
    examples, notes = examples_of(run, tasks, trajectories)
    collect(run, examples)
    supervised = Supervision(pool(run), run.config.sft_coef)
    metrics = policy_update(run, trajectories, advantages, supervised=supervised)
    return Step(trajectories, advantages, metrics | notes)


def interleaved(run: Run, tasks: list[Task], examples_of: Signal, between: Callable = grpo) -> Step:
    """Interleaved: between rounds of `round_steps` steps a burst of SFT.

    The examples are the signal's of the round's last `sft_window` steps. The burst is the first thing that
    the first step of the next round does: none follows the last round. between: what a step is apart from
    that.
    """
    place, size = (run.step - 1) % run.config.round_steps, run.config.round_steps
    notes: dict[str, Any] = {}
    if place == 0 and run.step > 1:
        notes = burst(run, pool(run), run.config.sft_tokens)
        run.state.pool = []
    step = between(run, tasks)
    if place >= size - run.config.sft_window:
        examples, counts = examples_of(run, tasks, step.trajectories)
        collect(run, examples)
        notes |= counts
    return replace(step, metrics=step.metrics | notes)


def rollout_only(run: Run, tasks: list[Task]) -> Step:
    """Rollouts, and no update."""
    trajectories = rollout(run, tasks)
    return Step(trajectories, group_advantages(run, trajectories), {})


bursts_only = partial(interleaved, between=rollout_only)
SCHEDULES: dict[str, Schedule] = {"interleaved": interleaved, "sync": sync, "none": bursts_only}


def signal(
    *,
    schedules: Mapping[str, Schedule] = SCHEDULES,
    settings: Mapping[str, Setting] | None = None,
    **declared: Any,
) -> Callable[[Signal], Signal]:
    """Make a scheme of a signal function.

    schedules: what `--schedule` may be, the default first. settings: its own, beside those that all signals
    have. declared: further fields of `Scheme`.
    """

    def register(make: Signal) -> Signal:
        @wraps(make)
        def step(run: Run, tasks: list[Task]) -> Step:
            return schedules[run.config.schedule](run, tasks, make)

        own = dict(settings or {}) | COEFFICIENT | ROUNDS | WINDOW
        shared: dict[str, Any] = {"uses": IN_BURSTS, "neutral": SFT_OFF, "schedules": tuple(schedules)}
        scheme(settings=own, **shared, **declared)(step)
        return make

    return register


# ------------------------------------------------------------------------------------------------- signals
def source_tasks(run: Run) -> list[Task]:
    """The tasks of plain SFT: the training tasks, or those of another domain (`--sft-source foreign`)."""
    return run.tasks if run.config.sft_source == "own" else run.foreign_tasks


def source_examples(run: Run) -> list[Trajectory]:
    """Ground truth of this step's `sft_batch` tasks of the source, in seeded epochs."""
    size = run.config.sft_batch
    places = range((run.step - 1) * size, run.step * size)
    return demonstrations(run, in_epochs(source_tasks(run), f"sft/{run.config.seed}", places))


def examples_alone(run: Run, tasks: list[Task], examples_of: Signal) -> Step:
    """One update on the signal's examples, and no rollouts."""
    examples, notes = examples_of(run, tasks, [])
    return Step([], torch.zeros(0), sft_update(run, examples) | notes)


@signal(
    about="supervised training on ground truth, no rollouts; with a schedule, beside grpo",
    source="Hao et al. 2026, §4, SFT",
    settings=SOURCE,
    schedules={"none": examples_alone, "sync": sync, "interleaved": interleaved},
)
def sft(run: Run, tasks: list[Task], trajectories: list[Trajectory]) -> tuple[list[Trajectory], dict]:
    """Examples: the ground truth of `sft_batch` tasks of the source, whatever the rollouts were.

    As a scheme, SFT: loss = mean over the assistant's tokens of -log p on them, at every step. `--sft-source
    foreign` takes them from another domain. `--schedule sync` and `interleaved` add the same signal to grpo.
    Published: 3 epochs, at the paper preset's batch of 20 conversations --steps 45.
    """
    return source_examples(run), {}


@signal(
    about="grpo, and SFT on the ground truth of tasks whose rollouts all failed",
    source="Hao et al. 2026, §4, erroneous-trajectory supervision (ETS)",
    settings=FAILURES,
    metrics=FAILED_TASKS,
)
def ets(run: Run, tasks: list[Task], trajectories: list[Trajectory]) -> tuple[list[Trajectory], dict]:
    """Examples: the ground truth of the tasks of this step that failed.

    As a scheme: like grpo, but with SFT on those of the last `sft_window` steps. Failed: no rollout of the
    group succeeded; `--ets-any` takes the published code's rule, any failure. The synchronous schedule
    differs from `hpt` in that failures of earlier steps ride along, too. Deviations: RL keeps its optimiser
    state over a burst, where the published rounds are runs of their own; bursts may be of equal size
    (`--sft-tokens`) instead of 2 epochs. A task that fails twice within the window is in the pool twice, and
    trained twice in a pass. Ours: `--ets-formats all` shows each in every call format, against forgetting.
    """
    failed = collected_failures(run, trajectories)
    formats = FORMATS if run.config.ets_formats == "all" else [run.config.format]
    examples = [row for format in formats for row in demonstrations(run, [tasks[i] for i in failed], format)]
    return examples, {"failed_tasks": len(failed)}


def collected_failures(run: Run, trajectories: list[Trajectory]) -> list[int]:
    """Indices of the tasks that ETS collects: all rollouts failed, or with `--ets-any` any of them."""
    return failed_tasks(trajectories, run.config.group, any if run.config.ets_any else all)


@signal(
    about="like ets, with reflections on the failed rollouts as further examples",
    source="Hao et al. 2026, §4, process-reflection supervision (PRS)",
    settings=FAILURES | JUDGE,
    defaults={"sft_tokens": 0},
    metrics=FAILED_TASKS
    | {
        "reflections": ("count", "pairs made in this step"),
        "judge_fallbacks": ("count", "failed rollouts on which the judge could not be used"),
    },
)
def prs(run: Run, tasks: list[Task], trajectories: list[Trajectory]) -> tuple[list[Trajectory], dict]:
    """Examples: those of `ets`, and pairs (log of a failed rollout and its ground truth -> reflection): one
    turn by turn, one on the first failed turn with similar scenarios and a look-alike.

    The pairs are made of the first failed rollout of each failed task. A burst is `sft_epochs` passes
    (`--sft-tokens 0`): reflections are many times longer than ground truth.
    Deviation: in the paper an LLM judge writes the reflections; here the checker does, unless `--judge URL`
    names a server (`supervise.reflections`, judge.py).
    """
    examples, metrics = ets(run, tasks, trajectories)
    config = run.config
    group = run.config.group
    judge = Judge(config.judge, config.judge_model, config.judge_timeout) if config.judge else None

    def reflect(i: int) -> tuple[list[Trajectory], bool]:
        row = next(row for row in trajectories[i * group : (i + 1) * group] if row.reward == 0)
        return reflections(tasks[i], row, run.policy.chat, run.tasks, run.sampler.context, judge)

    def reflect_on_all() -> list[tuple[list[Trajectory], bool]]:
        failed = collected_failures(run, trajectories)
        if not judge:
            return [reflect(i) for i in failed]
        with ThreadPoolExecutor(AT_ONCE) as threads, closing(judge):  # after Ctrl-C, nobody waits for it
            return list(threads.map(reflect, failed))

    made = distributed.from_first(reflect_on_all)  # a judge may not say the same twice
    counts = {"reflections": sum(len(pairs) for pairs, _ in made)}
    counts |= {"judge_fallbacks": sum(fallen for _, fallen in made)} if judge else {}
    return examples + [row for pairs, _ in made for row in pairs], metrics | counts


@signal(
    about="like ets, but only control tokens are trained by SFT",
    source="ours",
    settings=FAILURES,
    defaults={"sft_tokens": 0},
    metrics=FAILED_TASKS,
)
def ctrl_sft(run: Run, tasks: list[Task], trajectories: list[Trajectory]) -> tuple[list[Trajectory], dict]:
    """Examples: those of `ets`, with control tokens in the mask only: if only they break, only they need
    repair.

    A burst is `sft_epochs` passes (`--sft-tokens 0`): a fixed number of control tokens would be several times
    as many passes over the same tasks as in ets. What opens a call is a control token and what opens an
    answer is not, so this also teaches to call where an answer is due.
    """
    examples, metrics = ets(run, tasks, trajectories)
    control = {format: set(control_tokens(run.policy.chat, format).values()) for format in FORMATS}
    masks = [
        [on and t in control[row.format] for t, on in zip(row.tokens, row.loss_mask)] for row in examples
    ]
    return [replace(row, loss_mask=mask) for row, mask in zip(examples, masks)], metrics


@signal(
    about="grpo, and SFT on the model's own successes, sampled with the call prefix forced",
    source="ours",
    metrics={"forced_success": ("share", "success of the extra rollouts whose call prefix was forced")},
)
def selfrepair(run: Run, tasks: list[Task], trajectories: list[Trajectory]) -> tuple[list[Trajectory], dict]:
    """Examples: rollouts of the model that succeed when the canonical prefix of a call is forced: the skill
    behind the broken format, in its own words, so little else should move.

    There is one such rollout of every task. The forced prefixes are trained like the rest.
    """
    rows = rollout(run, tasks, group=1, noise_key=1, force_prefix=True)
    prefix = run.policy.chat.assistant_ids(FORMATS[run.config.format].prefix, run.config.format)[:-1]
    kept = [row.with_trained(prefix) for row in rows if row.reward == 1]
    return kept, {"forced_success": len(kept) / len(rows)}


# ----------------------------------------------------------------------------------- bursts for other reasons
@scheme(
    about="sft on the whole source, then grpo",
    source="Hao et al. 2026, §4, SFT+RL",
    settings=SOURCE,
    uses=["sft_epochs", "sft_lr", "sft_batch"],
    neutral={"sft_epochs": 0},
    defaults={"sft_epochs": 3},
    memory=["burst optimiser", "moved reference"],
)
def sft_rl(run: Run, tasks: list[Task]) -> Step:
    """Like grpo, but from an SFT checkpoint: before the first step, `sft_epochs` passes over the source.

    KL terms then pull to that checkpoint, as published.
    """
    notes = {}
    if run.step == 1:
        notes = burst(run, demonstrations(run, source_tasks(run)))
        move_reference(run)
    step = grpo(run, tasks)
    return replace(step, metrics=step.metrics | notes)


@scheme(
    about="control: the bursts of ets without any RL between them",
    source="ours",
    settings=ROUNDS | WINDOW | FAILURES,
    uses=IN_BURSTS,
    defaults={"schedule": "none"},
    metrics=FAILED_TASKS,
    memory=["burst optimiser"],
)
def bursts(run: Run, tasks: list[Task]) -> Step:
    """The bursts of ets and nothing else: rollouts find the failed tasks, no policy update is made.

    It tells rescue from re-teaching: equal SFT tokens by `--sft-tokens`, no RL to be rescued from.
    """
    return bursts_only(run, tasks, ets)


@scheme(
    about="like grpo, but a broken control token rolls weights back and starts a burst of ets",
    source="ours",
    settings={
        "sentinel_limit": setting(10.0, "growth of a spurious probability that rolls back; 0: never", least=0)
    }
    | WINDOW
    | FAILURES,
    uses=["probe_every", *IN_BURSTS],
    neutral={"sentinel_limit": 0.0},
    metrics=FAILED_TASKS | {"rollbacks": ("count", "1 where weights were rolled back")},
    memory=["burst optimiser"],
)
def sentinel(run: Run, tasks: list[Task]) -> Step:
    """Like grpo, but watches the probes. When the spurious probability of a control token has grown
    `sentinel_limit` times since the start (`spurious_growth`), weights and optimiser go back to the last
    healthy measurement, and a burst of SFT on the recently failed tasks follows.

    What the burst makes counts as healthy: the next rollback starts from there. 0: never.
    """
    limit = run.config.sentinel_limit
    probe = run.state.probe
    notes = {}
    measured = probe.get("step") == run.step - 1
    if limit and measured and probe["spurious_growth"] >= limit and run.state.healthy:
        roll_back(run, run.state.healthy)
        notes = {"rollbacks": 1} | burst(run, pool(run), run.config.sft_tokens)
    if limit and (measured or run.step == 1):
        run.state.healthy = snapshot(run)
    step = grpo(run, tasks)
    examples, counts = ets(run, tasks, step.trajectories)
    collect(run, examples)
    return replace(step, metrics=step.metrics | counts | notes)


# ------------------------------------------------------------------------------ RL and SFT in the same update
@scheme(
    about="per task: grpo if any rollout succeeded, else SFT on its ground truth",
    source="HPT, arXiv 2509.04419",
    settings=COEFFICIENT,
    uses=["sft_batch"],
    neutral={"sft_coef": 0.0},
    metrics=FAILED_TASKS,
)
def hpt(run: Run, tasks: list[Task]) -> Step:
    """Like sync ets, but only this step's failed groups are trained on: loss of grpo + sft_coef * SFT loss.

    Deviation: the source switches per prompt between two losses of weight 1; ours are summed with a weight,
    each a mean over its own tokens. A failed group has no advantage (without `--graded-reward` and
    `--tag-penalty`), so each task still has one of them. With `--updates` above 1, each of them trains on all
    failed tasks of the step.
    """
    trajectories = rollout(run, tasks)
    advantages = group_advantages(run, trajectories)
    failed = failed_tasks(trajectories, run.config.group)
    supervised = Supervision(demonstrations(run, [tasks[i] for i in failed]), run.config.sft_coef)
    metrics = policy_update(run, trajectories, advantages, supervised=supervised)
    return Step(trajectories, advantages, metrics | {"failed_tasks": len(failed)})


@scheme(
    about="(1 - mu) grpo + mu SFT on the step's tasks, mu decaying; --chord-phi: constant, weighed",
    source="CHORD, arXiv 2508.11408",
    settings={
        "chord_mu": setting(0.5, "share of SFT in the loss at the start", least=0, most=1),
        "chord_steps": setting(20, "steps until it is 0", above=0),
        "chord_phi": setting(False, "keep the share, weigh SFT tokens by p (1 - p)"),
    },
    uses=["sft_batch"],
    neutral={"chord_mu": 0.0},
    metrics={"chord_mu": ("share", "of SFT in the loss")},
)
def chord(run: Run, tasks: list[Task]) -> Step:
    """Like grpo, but loss = (1 - mu) RL + mu SFT on the ground truth of the step's tasks.

    mu falls linearly from `chord_mu` to 0 over `chord_steps` steps. With `--chord-phi` it stays, and SFT
    tokens weigh p (1 - p): neither what is certain nor what is out of reach. (1 - mu) is put on the
    advantages: the clipped loss is linear in their size (KL and entropy terms, if any, stay whole).
    Deviation: in the source's code mu rises first and then falls along a cosine.
    """
    left = 1.0 if run.config.chord_phi else max(0.0, 1 - (run.step - 1) / run.config.chord_steps)
    mu = run.config.chord_mu * left
    trajectories = rollout(run, tasks)
    advantages = group_advantages(run, trajectories)
    phi = {"weight": lambda p: p * (1 - p)} if run.config.chord_phi else {}
    supervised = Supervision(demonstrations(run, tasks), mu, **phi)
    metrics = policy_update(run, trajectories, (1 - mu) * advantages, supervised=supervised)
    return Step(trajectories, advantages, metrics | {"chord_mu": mu})
