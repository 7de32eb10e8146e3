"""A run, and the verbs that schemes are composed of but for the updates: roll out, compare, look up, go back.

Shapes: P prompts, G rollouts per prompt, B = P G rows in group order.
"""

import copy
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from nanotoolrl import lora
from nanotoolrl.calls import BROKEN_TAG_STATES
from nanotoolrl.config import Config
from nanotoolrl.env import Episode, Task
from nanotoolrl.gpu.masters import Masters
from nanotoolrl.loading import DTYPES, load
from nanotoolrl.losses import relative_advantages
from nanotoolrl.model import Policy
from nanotoolrl.places import Structure
from nanotoolrl.sampler import Sampler
from nanotoolrl.trajectory import Trajectory, demonstration
from nanotoolrl.world.tasks import load_tasks

MOST_SKIPPED = 3  # updates in a row that were not finite, after which a run stops


@dataclass
class State:
    """What a run keeps from step to step; the checkpoint holds it."""

    first: dict[str, float] = field(default_factory=dict)  # shares of message states in the first step
    probe: dict[str, float] = field(default_factory=dict)  # the last measurement, and its `step`
    pool: list[dict[str, Any]] = field(default_factory=list)  # collected examples (signals.py)
    began: int = 0  # the step after which the optimiser began anew
    skipped_in_a_row: int = 0  # updates that were not finite
    successes: list[float] = field(default_factory=list)  # of the steps so far, sampled
    healthy: dict[str, Any] | None = None  # a `snapshot`: where `sentinel` goes back to
    reference: dict[str, Tensor] | None = None  # weights that KL terms pull to, if not those of the start
    own: dict[str, Any] = field(default_factory=dict)  # whatever else a scheme keeps: plain values, tensors


@dataclass
class Step:
    """What one step did: its trajectories, their advantages [B], and its metrics (columns of metrics.csv)."""

    trajectories: list[Trajectory]
    advantages: Tensor
    metrics: dict[str, Any]


def first_model(config: Config, dtype: str) -> Policy:
    """The model that a run begins from, in a width of `DTYPES`, with the adapter of `--lora`. Raises
    ModelError, and ValueError where adapters cannot be had."""
    how: dict[str, Any] = {"backend": config.logprob, "chat_template": config.chat_template}
    how["thinking"] = config.thinking
    policy = load(config.model, dtype=DTYPES[dtype], **how)
    if config.lora:
        lora.add(policy.model, config.lora, config.seed, config.model)
    return policy


@dataclass
class Run:
    """What a scheme works with: settings, policy and what feeds and steps it, all training tasks."""

    config: Config
    policy: Policy
    sampler: Sampler
    masters: Masters  # of the weights: what the optimiser steps
    optimizer: torch.optim.Optimizer
    tasks: list[Task]
    step: int = 0
    state: State = field(default_factory=State)
    sampled_tokens: int = 0  # of this step so far
    sample_seconds: float = 0.0  # of this step so far
    skipped_updates: int = 0  # of this step so far

    @classmethod
    def begin(cls, config: Config, policy: Policy, tasks: Sequence[Task] = ()) -> "Run":
        """A run before its first step."""
        masters = Masters(policy.model)
        optimizer = new_optimizer(masters, config.lr, config.weight_decay)
        how = (config.max_new_tokens, config.context, config.slots, config.seed, (config.top_p, config.min_p))
        if config.sampler_dtype == "same":
            sampler = Sampler(policy, *how)
        else:
            copy = first_model(config, config.sampler_dtype)
            sampler = Sampler(copy, *how, copy_of=policy)
        return cls(config, policy, sampler, masters, optimizer, list(tasks))

    def next_step(self) -> None:
        """Count it, from nothing sampled and nothing skipped."""
        self.step += 1
        self.sampled_tokens, self.sample_seconds, self.skipped_updates = 0, 0.0, 0

    @property
    def stuck(self) -> bool:
        """Whether too many updates in a row were not finite."""
        return self.state.skipped_in_a_row >= MOST_SKIPPED

    @cached_property
    def reference(self) -> Policy:
        """The policy that KL terms pull to: the one RL started from, or that of a later step
        (`move_reference`). Loaded when one first needs it."""
        policy = first_model(self.config, self.config.dtype)
        if self.state.reference:
            policy.model.load_state_dict(self.state.reference)
        return policy

    @torch.no_grad()
    def reference_logprobs(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Log-probs [N] under the reference (see `Policy.logprobs`). The policy without its adapter is the
        one RL started from: no second model is loaded for it."""
        temperature = self.config.temperature
        if self.config.lora and not self.state.reference:
            with lora.off(self.policy.model):
                return self.policy.logprobs(ids, mask, temperature)[0]
        return self.reference.logprobs(ids, mask, temperature)[0]

    @cached_property
    def foreign_tasks(self) -> list[Task]:
        """Tasks of another domain, to learn calls from."""
        return load_tasks("foreign")

    @cached_property
    def structure(self) -> Structure:
        """What the tokens of a message are, in the format."""
        return Structure(self.policy.chat, self.config.format)

    @cached_property
    def control(self) -> Tensor:
        """Ids [C] of the control tokens of the format."""
        return torch.tensor(list(self.structure.control.values()), device=self.policy.device)


def new_optimizer(masters: Masters, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW over all weights in one fused call."""
    return torch.optim.AdamW(masters.tensors, lr=lr, weight_decay=weight_decay, fused=True)


# ------------------------------------------------------------------------------------ rollouts and advantages
def rollout(
    run: Run,
    tasks: Sequence[Task],
    hints: Sequence[str] | None = None,
    group: int | None = None,
    noise_key: int = 0,
    force_prefix: bool = False,
) -> list[Trajectory]:
    """`group` rollouts (default: the config's G) of every task with the current policy, in group order.

    hints: one text per row. noise_key: a second rollout within a step needs another one. force_prefix: write
    the canonical prefix where a call should come (`Sampler.rollout`).
    """
    config = run.config
    size = config.group if group is None else group
    how = {name: getattr(config, name) for name in ("max_messages", "strict_empty_turn", "tool_seconds")}
    episodes = [Episode(task, config.format, **how) for task in tasks for _ in range(size)]
    started = time.perf_counter()
    stream = run.step + (noise_key << 24)
    rows = run.sampler.rollout(episodes, hints, config.temperature, stream, force_prefix)
    run.sample_seconds += time.perf_counter() - started
    run.sampled_tokens += sum(row.sampled_tokens for row in rows)
    return rows


def trained_reward(config: Config, row: Trajectory) -> float:
    """The reward that advantages are made of: 0 or 1; with `--graded-reward` the share of turns passed.

    `--tag-penalty` times the share of messages with a broken tag is taken from it.
    """
    passed = sum(verdict.passed for verdict in row.verdicts) / row.turns
    broken = sum(state in BROKEN_TAG_STATES for state in row.states) / max(1, len(row.states))
    return (passed if config.graded_reward else row.reward) - config.tag_penalty * broken


def grouped_rewards(config: Config, trajectories: Sequence[Trajectory]) -> Tensor:
    """Rewards [P, G], as advantages are made of them, of trajectories in group order."""
    return torch.tensor([trained_reward(config, row) for row in trajectories]).view(-1, config.group)


def group_advantages(run: Run, trajectories: list[Trajectory]) -> Tensor:
    """Group-relative advantages [B] of trajectories in group order."""
    return relative_advantages(grouped_rewards(run.config, trajectories), run.config.adv_std).flatten()


def failed_tasks(
    trajectories: list[Trajectory], group: int, enough: Callable[[Iterable[bool]], bool] = all
) -> list[int]:
    """Indices of the tasks whose rollouts all failed, or (`enough` is any) of those with any failure."""
    groups = [trajectories[i : i + group] for i in range(0, len(trajectories), group)]
    return [i for i, rows in enumerate(groups) if enough(row.reward == 0 for row in rows)]


def demonstrations(run: Run, tasks: Sequence[Task], format: str = "") -> list[Trajectory]:
    """Ground-truth conversations of the tasks, in the format of the run or in another; those that do not fit
    the context are left out."""
    rows = [demonstration(run.policy.chat, task, format or run.config.format) for task in tasks]
    return [row for row in rows if len(row.tokens) <= run.sampler.context]


# -------------------------------------------------------------------------------------------------- snapshots
def begin_anew(run: Run) -> None:
    """As if a run began with the policy as it is: moments of AdamW, warm-up and the reference of KL terms."""
    config = run.config
    run.optimizer = new_optimizer(run.masters, config.lr, config.weight_decay)
    run.state.began = run.step - 1
    move_reference(run)


def move_reference(run: Run) -> None:
    """From here on KL terms, if there are any, pull to the policy as it is."""
    if run.config.kl > 0 or run.config.guard_kl > 0:
        run.state.reference = copied(run.policy.model.state_dict())
        vars(run).pop("reference", None)


def snapshot(run: Run) -> dict[str, Any]:
    """Copies of weights and optimiser state, to be put back by `roll_back`; in main memory, where there is
    more room than on a GPU."""
    parts = {"model": run.policy.model.state_dict(), "optimizer": run.optimizer.state_dict()}
    return copied(parts | {"masters": run.masters.state()})


def copied(value: Any) -> Any:
    """A copy of a nested state, its tensors in main memory."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(copied(item) for item in value)
    return value


def roll_back(run: Run, saved: dict[str, Any]) -> None:
    """Put a snapshot back."""
    run.policy.model.load_state_dict(saved["model"])
    run.optimizer.load_state_dict(copy.deepcopy(saved["optimizer"]))
    run.masters.load(saved["masters"])
