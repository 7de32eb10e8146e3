"""Trainer variants: one short function each, and the registry of them.

A scheme makes one training step: it takes the run and the step's P tasks and returns a `Step`. It is composed
of few verbs (run.py, updates.py) and reads like the method section of a paper; read `grpo` first. Here are
the schemes that reward alone makes; guidance.py has those with help inside the group, signals.py those that
train on examples. To add one, write the function and put `@scheme(...)` on it (docs/6-add-your-own.md).

Most schemes are GRPO plus something, and have a strength at whose neutral value they are GRPO, to the bit.

Shapes: P prompts, G rollouts per prompt, B = P G rows in group order, N trained tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nanotoolrl.calls import VOID_STATES
from nanotoolrl.config import Setting, declare, setting
from nanotoolrl.env import Task
from nanotoolrl.losses import likelihood_drop
from nanotoolrl.objective import Tokens, clipped_objective
from nanotoolrl.run import Run, Step, begin_anew, group_advantages, rollout
from nanotoolrl.updates import policy_update
from nanotoolrl.weights import refilled


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
    memory: Sequence[str] = ()  # what the memory plan (`plan`) has to know of it


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
REFILL = {
    "refill": setting(0, "times that groups without contrast are replaced by other tasks'", least=0, most=127)
}
REFILLED = {"refilled_groups": ("groups", "replaced for lack of contrast (`--refill`)")}


@scheme(
    about="groups of rollouts, reward above the group's mean is good",
    source="Hao et al. 2026, §4; arXiv 2402.03300",
    settings=REFILL,
    metrics=REFILLED,
)
def grpo(run: Run, tasks: list[Task]) -> Step:
    """GRPO: G rollouts of every task; the tokens of one share A = (R - mean) / std over its group.

    loss = mean over trained tokens of max(-A r, -A clamp(r, 1 - clip, 1 + clip_high)), at most dual_clip |A|
    where A < 0, plus kl * k3.
    Published: kl 1e-4; our small preset has 0, which lets the rows without contrast be left out of the
    update.
    """
    trajectories, notes = refilled(run, rollout(run, tasks))
    advantages = group_advantages(run, trajectories)  # [B]
    return Step(trajectories, advantages, policy_update(run, trajectories, advantages) | notes)


@scheme(
    about="like grpo, but bad rollouts weigh --negative-weight (0: only the good ones teach)",
    source="arXiv 2506.01347",
    settings=REFILL | {"negative_weight": setting(0.0, "factor of negative advantages", least=0)},
    metrics=REFILLED,
    neutral={"negative_weight": 1.0},
)
def psr(run: Run, tasks: list[Task]) -> Step:
    """Like grpo, but A < 0 is multiplied by `negative_weight`: positive sample reinforcement.

    Deviation: the source has rewards +-1 and no groups; here a group that always succeeds still has A = 0.
    """
    trajectories, notes = refilled(run, rollout(run, tasks))
    advantages = group_advantages(run, trajectories)
    weighed = torch.where(advantages < 0, advantages * run.config.negative_weight, advantages)
    return Step(trajectories, advantages, policy_update(run, trajectories, weighed) | notes)


@scheme(
    about="like grpo, but good rollouts weigh --positive-weight (0: only the bad ones teach)",
    source="arXiv 2506.01347",
    settings=REFILL | {"positive_weight": setting(0.0, "factor of positive advantages", least=0)},
    metrics=REFILLED,
    neutral={"positive_weight": 1.0},
)
def nsr(run: Run, tasks: list[Task]) -> Step:
    """Like grpo, but A > 0 is multiplied by `positive_weight`: negative sample reinforcement.

    Deviation: the source has rewards +-1 and no groups; here a group that fails as a whole has A = 0 and is
    not pushed down.
    """
    trajectories, notes = refilled(run, rollout(run, tasks))
    advantages = group_advantages(run, trajectories)
    weighed = torch.where(advantages > 0, advantages * run.config.positive_weight, advantages)
    return Step(trajectories, advantages, policy_update(run, trajectories, weighed) | notes)


@scheme(
    about="like grpo, but rollouts with an empty, bare or malformed message weigh --void-weight",
    source="SimpleTIR, arXiv 2509.02479",
    settings=REFILL
    | {"void_weight": setting(0.0, "factor of the advantages of rollouts with a broken message", least=0)},
    neutral={"void_weight": 1.0},
    metrics=REFILLED | {"dropped_rows": ("share", "rollouts with a broken message")},
)
def void(run: Run, tasks: list[Task]) -> Step:
    """Like grpo, but A is multiplied by `void_weight` in rollouts that hold a broken message (0: dropped).

    Deviation: the source drops rollouts with a turn that holds neither a call nor an answer; ours are the
    message states empty, bare and malformed. They still count in their group's mean and in the loss's mean.
    """
    trajectories, notes = refilled(run, rollout(run, tasks))
    advantages = group_advantages(run, trajectories)
    broken = torch.tensor([bool(set(row.states) & set(VOID_STATES)) for row in trajectories])  # [B]
    weighed = torch.where(broken, advantages * run.config.void_weight, advantages)
    metrics = policy_update(run, trajectories, weighed) | notes
    return Step(trajectories, advantages, metrics | {"dropped_rows": broken.float().mean().item()})


# ---------------------------------------------------------------------------- guarding tokens and likelihoods
@scheme(
    about="like grpo, but no control token is pushed down",
    source="after GTPO, arXiv 2508.03772",
    settings=REFILL,
    metrics=REFILLED,
    uses=["guard"],
    neutral={"guard": 0.0},
    defaults={"guard": 1.0},
)
def guard(run: Run, tasks: list[Task]) -> Step:
    """GRPO with `--guard 1`: on control tokens A < 0 becomes (1 - guard) A. A name for the direct test of the
    mechanism; every scheme takes `--guard`, and in the presets spike and rescue it is 1 for all: there
    `guard` is `grpo`, and `--guard 0` plain GRPO.

    Deviations: the source spares tokens that good and bad rollouts share at the same position, counted from
    either end; ours are the control tokens, wherever they stand. The source also weighs those tokens twice
    where A > 0, and filters out rollouts of high entropy.
    """

    return grpo(run, tasks)


@scheme(
    name="guard-kl",
    about="like grpo, but control tokens are held by a KL term to the start",
    source="ours; the test beside guard",
    settings=REFILL,
    metrics=REFILLED,
    uses=["guard_kl"],
    neutral={"guard_kl": 0.0},
    defaults={"guard_kl": 1.0},
)
def guard_kl(run: Run, tasks: list[Task]) -> Step:
    """GRPO with `--guard-kl 1`: loss + guard_kl * k3(policy || start) on control tokens, in every rollout. A
    name for the test beside `guard`; every scheme takes `--guard-kl`.

    Unlike `--kl`, content tokens are free to move, and k3 has no upper bound: a control token is pulled back
    however far it fell (up to a factor of e^20).
    """
    return grpo(run, tasks)


@scheme(
    about="like grpo, but good rollouts whose likelihood fell are pulled back up",
    source="LLDS, arXiv 2512.04220",
    settings=REFILL | {"llds_weight": setting(0.1, "weight of the penalty on fallen likelihoods", least=0)},
    metrics=REFILLED,
    uses=["updates"],
    neutral={"llds_weight": 0.0},
    defaults={"updates": 4},
)
def llds(run: Run, tasks: list[Task]) -> Step:
    """Like grpo, but loss + llds_weight * max(0, log p_old - log p) on messages of rollouts with A >= 0 whose
    summed log-prob is below that at sampling (`likelihood_drop`). The source calls a message an action.

    In a step's first update nothing has fallen yet, so this needs `--updates` above 1 (its default is 4), in
    which the updates on other prompts can displace this prompt's good rollouts.
    """

    def objective(run: Run, tokens: Tokens) -> tuple[Tensor, Tensor]:
        loss, clipped = clipped_objective(run, tokens)
        preferred = tokens.own_advantages >= 0
        if run.config.mask_overlong:  # of what is masked nothing is said, neither good nor bad
            preferred &= ~tokens.cut
        fallen = likelihood_drop(tokens.logprobs, tokens.old, preferred, tokens.message)
        return loss + run.config.llds_weight * fallen, clipped

    trajectories, notes = refilled(run, rollout(run, tasks))
    advantages = group_advantages(run, trajectories)
    every_row = run.config.llds_weight > 0 and bool(advantages.any())  # without contrast nothing falls
    metrics = policy_update(run, trajectories, advantages, objective, every_row)
    return Step(trajectories, advantages, metrics | notes)


@scheme(
    about="control: grpo that begins anew every --restart-steps steps, as published rounds do",
    source="ours; the published rounds are runs of their own",
    settings=REFILL
    | {"restart_steps": setting(5, "steps after which the optimiser begins anew; 0: never", least=0)},
    metrics=REFILLED,
    uses=["warmup"],
    neutral={"restart_steps": 0},
    memory=["moved reference"],
)
def restart(run: Run, tasks: list[Task]) -> Step:
    """Like grpo, but every `restart_steps` steps AdamW begins anew, with its warm-up, and KL terms pull to
    the policy of that step: what the published rounds of ETS and PRS do besides their SFT. Our rounds do not.
    """
    every = run.config.restart_steps
    if every and run.step > 1 and (run.step - 1) % every == 0:
        begin_anew(run)
    return grpo(run, tasks)
