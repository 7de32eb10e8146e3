"""Trainer variants: one short function each, and the registry of them.

A scheme makes one training step: it takes the run and the step's P tasks and returns a `Step`. It is composed
of few verbs (run.py, updates.py) and reads like the method section of a paper; read `grpo` first. Here are
the schemes that reward alone makes, the guards, and help inside the group; signals.py has those that train on
examples. To add one, write the function and put `@scheme(...)` on it (docs/6-add-your-own.md).

Most schemes are GRPO plus something, and have a strength at whose neutral value they are GRPO, to the bit.

Shapes: P prompts, G rollouts per prompt, B = P G rows in group order, N trained tokens.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nanotoolrl.calls import VOID_STATES
from nanotoolrl.config import Setting, declare, setting
from nanotoolrl.env import Task
from nanotoolrl.losses import kl_k3, likelihood_drop, shaped_loss
from nanotoolrl.objective import Tokens, clipped_objective
from nanotoolrl.run import Run, Step, demonstrations, failed_tasks, group_advantages, rollout
from nanotoolrl.supervise import hint_text
from nanotoolrl.updates import policy_update


# ---------------------------------------------------------------------------------------------- the registry
@dataclass(frozen=True)
class Scheme:
    """A row of the registry: the step function, and what its decorator declares."""

    name: str
    step: Callable[[Run, list[Task]], Step]
    about: str  # what `--list` says
    source: str
    settings: Mapping[str, Setting] = field(default_factory=dict)  # its own; they become flags
    uses: Sequence[str] = ()  # shared settings that matter to it
    neutral: Mapping[str, float] = field(default_factory=dict)  # settings at which it is plain GRPO
    defaults: Mapping[str, Any] = field(default_factory=dict)  # of shared settings, where they differ
    metrics: Mapping[str, tuple[str, str]] = field(default_factory=dict)  # column -> (unit, one line)
    schedules: Sequence[str] = ()  # what `--schedule` may be, the default first
    memory: Sequence[str] = ()  # parts of the memory plan that it needs whatever the settings


SCHEMES: dict[str, Scheme] = {}


def scheme(*, name: str = "", **declared: Any) -> Callable:
    """Register a step function under its own name, or under `name`. declared: fields of `Scheme`.

    Every update has the metrics of `Notes.metrics`. A scheme declares those that it adds; what it returns and
    does not declare is refused when it is logged.
    """

    def register(step: Callable[[Run, list[Task]], Step]) -> Callable[[Run, list[Task]], Step]:
        one = Scheme(name=name or step.__name__, step=step, **declared)
        if one.name in SCHEMES:
            raise TypeError(f"there is another scheme called {one.name}")
        declare(one.settings)
        SCHEMES[one.name] = one
        return step

    return register


# ---------------------------------------------------------------------------------------------- reward alone
@scheme(
    about="groups of rollouts, reward above the group's mean is good",
    source="Hao et al. 2026, §4; arXiv 2402.03300",
)
def grpo(run: Run, tasks: list[Task]) -> Step:
    """GRPO: G rollouts of every task; the tokens of one share A = (R - mean) / std over its group.

    loss = mean over trained tokens of max(-A r, -A clamp(r, 1 - clip, 1 + clip_high)), at most dual_clip |A|
    where A < 0, plus kl * k3.
    Published: kl 1e-4; our small preset has 0, which lets the rows without contrast be left out of the
    update.
    """
    trajectories = rollout(run, tasks)
    advantages = group_advantages(run, trajectories)  # [B]
    return Step(trajectories, advantages, policy_update(run, trajectories, advantages))


@scheme(
    about="like grpo, but bad rollouts weigh --negative-weight (0: only the good ones teach)",
    source="arXiv 2506.01347",
    settings={"negative_weight": setting(0.0, "factor of negative advantages", least=0)},
    neutral={"negative_weight": 1.0},
)
def psr(run: Run, tasks: list[Task]) -> Step:
    """Like grpo, but A < 0 is multiplied by `negative_weight`: positive sample reinforcement.

    Deviation: the source has rewards +-1 and no groups; here a group that always succeeds still has A = 0.
    """
    trajectories = rollout(run, tasks)
    advantages = group_advantages(run, trajectories)
    weighed = torch.where(advantages < 0, advantages * run.config.negative_weight, advantages)
    return Step(trajectories, advantages, policy_update(run, trajectories, weighed))


@scheme(
    about="like grpo, but good rollouts weigh --positive-weight (0: only the bad ones teach)",
    source="arXiv 2506.01347",
    settings={"positive_weight": setting(0.0, "factor of positive advantages", least=0)},
    neutral={"positive_weight": 1.0},
)
def nsr(run: Run, tasks: list[Task]) -> Step:
    """Like grpo, but A > 0 is multiplied by `positive_weight`: negative sample reinforcement.

    Deviation: the source has rewards +-1 and no groups; here a group that fails as a whole has A = 0 and is
    not pushed down.
    """
    trajectories = rollout(run, tasks)
    advantages = group_advantages(run, trajectories)
    weighed = torch.where(advantages > 0, advantages * run.config.positive_weight, advantages)
    return Step(trajectories, advantages, policy_update(run, trajectories, weighed))


@scheme(
    about="like grpo, but rollouts with an empty, bare or malformed message weigh --void-weight",
    source="SimpleTIR, arXiv 2509.02479",
    settings={
        "void_weight": setting(0.0, "factor of the advantages of rollouts with a broken message", least=0)
    },
    neutral={"void_weight": 1.0},
    metrics={"dropped_rows": ("share", "rollouts with a broken message")},
)
def void(run: Run, tasks: list[Task]) -> Step:
    """Like grpo, but A is multiplied by `void_weight` in rollouts that hold a broken message (0: dropped).

    Deviation: the source drops rollouts with a turn that holds neither a call nor an answer; ours are the
    message states empty, bare and malformed. They still count in their group's mean and in the loss's mean.
    """
    trajectories = rollout(run, tasks)
    advantages = group_advantages(run, trajectories)
    broken = torch.tensor([bool(set(row.states) & set(VOID_STATES)) for row in trajectories])  # [B]
    weighed = torch.where(broken, advantages * run.config.void_weight, advantages)
    metrics = policy_update(run, trajectories, weighed)
    return Step(trajectories, advantages, metrics | {"dropped_rows": broken.float().mean().item()})


# ---------------------------------------------------------------------------- guarding tokens and likelihoods
@scheme(
    about="like grpo, but no control token is pushed down",
    source="after GTPO, arXiv 2508.03772",
    uses=["guard"],
    neutral={"guard": 0.0},
    defaults={"guard": 1.0},
)
def guard(run: Run, tasks: list[Task]) -> Step:
    """GRPO with `--guard 1`: on control tokens A < 0 becomes (1 - guard) A. A name for the direct test of the
    mechanism; every scheme takes `--guard`.

    Deviations: the source spares tokens that good and bad rollouts share at the same position, counted from
    either end; ours are the control tokens, wherever they stand. The source also weighs those tokens twice
    where A > 0, and filters out rollouts of high entropy.
    """

    return grpo(run, tasks)


@scheme(
    name="guard-kl",
    about="like grpo, but control tokens are held by a KL term to the start",
    source="ours; the test beside guard",
    settings={"guard_kl": setting(1.0, "coefficient of the KL term on control tokens", least=0)},
    neutral={"guard_kl": 0.0},
    memory=["reference"],
)
def guard_kl(run: Run, tasks: list[Task]) -> Step:
    """Like grpo, but loss + guard_kl * k3(policy || start) on control tokens, in every rollout.

    Unlike `--kl`, content tokens are free to move, and k3 has no upper bound: a control token is pulled back
    however far it fell (up to a factor of e^20).
    """
    strength = run.config.guard_kl

    def objective(run: Run, tokens: Tokens) -> tuple[Tensor, Tensor]:
        loss, clipped = clipped_objective(run, tokens)
        if strength > 0:
            loss = loss + strength * tokens.control * kl_k3(tokens.logprobs, tokens.reference, most=math.inf)
        return loss, clipped

    trajectories = rollout(run, tasks)
    advantages = group_advantages(run, trajectories)
    metrics = policy_update(run, trajectories, advantages, objective, every_row=strength > 0)
    return Step(trajectories, advantages, metrics)


@scheme(
    about="like grpo, but good rollouts whose likelihood fell are pulled back up",
    source="LLDS, arXiv 2512.04220",
    settings={"llds_weight": setting(0.1, "weight of the penalty on fallen likelihoods", least=0)},
    uses=["updates"],
    neutral={"llds_weight": 0.0},
    defaults={"updates": 4},
)
def llds(run: Run, tasks: list[Task]) -> Step:
    """Like grpo, but loss + llds_weight * max(0, log p_old - log p) on tokens of good rollouts (A > 0) whose
    summed log-prob is below that at sampling (`likelihood_drop`).

    In a step's first update nothing has fallen yet, so this needs `--updates` above 1 (its default is 4), in
    which the updates on other prompts can displace this prompt's good rollouts. Deviation: the source also
    has gates per action, and keeps actions with A = 0.
    """

    def objective(run: Run, tokens: Tokens) -> tuple[Tensor, Tensor]:
        loss, clipped = clipped_objective(run, tokens)
        fallen = likelihood_drop(tokens.logprobs, tokens.old, tokens.advantages > 0, tokens.row)
        return loss + run.config.llds_weight * fallen, clipped

    trajectories = rollout(run, tasks)
    advantages = group_advantages(run, trajectories)
    return Step(trajectories, advantages, policy_update(run, trajectories, advantages, objective))


# ------------------------------------------------------------------------- help inside the group of rollouts
FAILED_TASKS = {"failed_tasks": ("count", "tasks whose rollouts all failed (where `--ets-any` counts: any)")}
HINTS = {"hint_count": setting(2, "rollouts of a group that see a hint", least=0, most="group")}


@scheme(
    about="like grpo, but --oracle-count rollouts of a group are the ground truth",
    source="Hao et al. 2026, §4, off-policy supervision (OPS)",
    settings={
        "oracle_count": setting(1, "rollouts of a group that are the ground truth", least=0, below="group"),
        "ops_loss": setting("shaped", "of their tokens: p / (p + 0.1), or the ratio", ("shaped", "ratio")),
    },
    neutral={"oracle_count": 0},
)
def ops(run: Run, tasks: list[Task]) -> Step:
    """Like grpo, but `oracle_count` of the G rollouts are the ground truth, played through a live episode.

    They enter the group's mean and std. Loss of their tokens, `--ops-loss`: "shaped" (default, the published
    code) has w = p / (p + 0.1) where the ratio stands, "ratio" (the text) the plain ratio to the policy
    before the update, with no correction for who wrote them.

    Deviations: LUFFY, where the shaping comes from, clips nothing and does not divide by the group's standard
    deviation; here `--clip` and `--adv-std` hold for these tokens, too.
    """

    def objective(run: Run, tokens: Tokens) -> tuple[Tensor, Tensor]:
        loss, clipped = clipped_objective(run, tokens)
        if run.config.ops_loss == "shaped":
            bounds = (run.config.clip, run.config.clip_high)
            shaped = shaped_loss(tokens.logprobs, tokens.advantages, *bounds)
            loss = torch.where(tokens.of("oracle"), shaped, loss)
        return loss, clipped

    count = run.config.oracle_count
    rest = run.config.group - count
    sampled = rollout(run, tasks, group=rest)
    trajectories = []
    for i, shown in zip(range(len(tasks)), demonstrations(run, tasks), strict=True):
        trajectories += [shown] * count + sampled[i * rest : (i + 1) * rest]
    advantages = group_advantages(run, trajectories)
    return Step(trajectories, advantages, policy_update(run, trajectories, advantages, objective))


@scheme(
    about="like grpo, but some rollouts of a group see a hint that the update does not see",
    source="Hao et al. 2026, §4, hint-based guidance (HBG)",
    settings=HINTS | {"hint_keep": setting(False, "train hinted rollouts under the hinted prompt")},
    neutral={"hint_count": 0},
)
def hint(run: Run, tasks: list[Task]) -> Step:
    """Like grpo, but the first `hint_count` of the G rollouts are sampled with a hint in the system prompt.

    The hint is removed before the update. The old log-probs of these rollouts are computed anew without it,
    so that the ratio starts at 1: tokens sampled from pi(. | hint) are trained as if from pi(.).
    `--hint-keep` trains them under the prompt they were sampled with instead.
    """
    count, format = run.config.hint_count, run.config.format
    without = [""] * (run.config.group - count)
    hints = [text for task in tasks for text in [hint_text(task, format)] * count + without]
    trajectories = rollout(run, tasks, hints)
    advantages = group_advantages(run, trajectories)
    trained = [row.with_sampled_prompt() for row in trajectories] if run.config.hint_keep else trajectories
    return Step(trajectories, advantages, policy_update(run, trained, advantages))


@scheme(
    about="like hint, but only where a whole group fails, and the update sees the hint",
    source="GHPO, arXiv 2507.10628",
    settings=HINTS,
    neutral={"hint_count": 0},
    metrics=FAILED_TASKS,
)
def ghpo(run: Run, tasks: list[Task]) -> Step:
    """Like hint, but only in groups that failed without one: their first `hint_count` rollouts are replaced
    by hinted ones, which are trained under the prompt with the hint.

    Deviation: the source replaces the whole group's prompt and lengthens the hint in stages; our hint has one
    length. `success` is that of the rollouts before the replacement.
    """
    group, count = run.config.group, run.config.hint_count
    trajectories = rollout(run, tasks)
    failed = failed_tasks(trajectories, group)
    success = sum(row.reward for row in trajectories) / len(trajectories)
    hints = [hint_text(tasks[i], run.config.format) for i in failed for _ in range(count)]
    hinted = rollout(run, [tasks[i] for i in failed], hints, group=count, noise_key=1)
    for n, i in enumerate(failed):
        trajectories[i * group : i * group + count] = hinted[n * count : (n + 1) * count]
    advantages = group_advantages(run, trajectories)
    metrics = policy_update(run, [row.with_sampled_prompt() for row in trajectories], advantages)
    return Step(trajectories, advantages, metrics | {"failed_tasks": len(failed), "success": success})
