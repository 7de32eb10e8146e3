"""Trainer variants: one short function each, and the table of them.

A scheme makes one training step: it takes the run and the step's P tasks and returns a `Step`. It is composed
of few verbs (`rollout`, `advantages`, `policy_update`) and reads like the paper's algorithm. To add one,
write the function and put `@scheme(...)` on it (README, "Add a scheme").

Shapes: P prompts, G rollouts per prompt, B = P G rows in group order, T tokens, N trained tokens.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nanotoolrl.env import Episode, Task
from nanotoolrl.losses import group_advantages, kl_k3, policy_loss
from nanotoolrl.model import Policy, pad
from nanotoolrl.sampler import Sampler, Trajectory
from nanotoolrl.supervise import hint_text


@dataclass
class Run:
    """What a scheme works with. `config` is train.py's; `reference` is None unless a KL term needs it."""

    config: object
    policy: Policy
    sampler: Sampler
    optimizer: torch.optim.Optimizer
    reference: Policy | None = None
    step: int = 0
    skipped_in_a_row: int = 0
    state: dict = field(default_factory=dict)  # what is kept across steps; saved in the checkpoint
    sample_seconds: float = 0.0  # of the last rollout

    def __post_init__(self) -> None:
        zero_gradients(self.policy)


@dataclass
class Step:
    """What one step did: its trajectories, their advantages [B], and its metrics (columns of metrics.csv)."""

    trajectories: list[Trajectory]
    advantages: Tensor
    metrics: dict[str, float]


@dataclass(frozen=True)
class Scheme:
    """A row of the table: the step function and what `--list` says about it."""

    name: str
    step: Callable[[Run, list[Task]], Step]
    about: str
    source: str
    settings: tuple[str, ...]


SCHEMES: dict[str, Scheme] = {}


def scheme(about: str, source: str, settings: Sequence[str] = ()) -> Callable:
    """Register a step function under its own name."""

    def register(step: Callable[[Run, list[Task]], Step]) -> Callable[[Run, list[Task]], Step]:
        name = step.__name__
        SCHEMES[name] = Scheme(name, step, about, source, tuple(settings))
        return step

    return register


# ---------------------------------------------------------------------------------------------------- schemes
@scheme("groups of rollouts, reward above the group's mean is good", "Hao et al. 2026, §4; arXiv 2402.03300")
def grpo(run: Run, tasks: list[Task]) -> Step:
    """GRPO: G rollouts of every task; the tokens of one share A = (R - mean) / std over its group.

    loss = mean over trained tokens of max(-A r, -A clamp(r, 0.8, 1.2)), dual clip 3, plus kl * k3.
    Published: kl 1e-4; our small preset has 0, which lets the rows without contrast be left out of the
    update.
    """
    trajectories = rollout(run, tasks)
    scores = advantages(run, trajectories)
    return Step(trajectories, scores, policy_update(run, trajectories, scores))


@scheme(
    "like grpo, but some rollouts of a group see a hint that the update does not see",
    "Hao et al. 2026, §4, hint-based guidance (HBG)",
    ("hint_count", "hint_keep"),
)
def hint(run: Run, tasks: list[Task]) -> Step:
    """Like grpo, but the first `hint_count` of the G rollouts are sampled with a hint in the system prompt.

    The hint is removed before the update and their old log-probs are computed anew without it, so that the
    ratio starts at 1: tokens sampled from pi(. | hint) are trained as if from pi(.). `--hint-keep` trains
    them under the prompt they were sampled with instead. hint_count 0 is grpo, to the bit.
    """
    group = run.config.group
    hints = [
        hint_text(task, run.config.format) if k < run.config.hint_count else ""
        for task in tasks
        for k in range(group)
    ]
    trajectories = rollout(run, tasks, hints)
    scores = advantages(run, trajectories)
    trained = [row.with_sampled_prompt() for row in trajectories] if run.config.hint_keep else trajectories
    return Step(trajectories, scores, policy_update(run, trained, scores))


# ------------------------------------------------------------------------------------------------------ verbs
def rollout(run: Run, tasks: Sequence[Task], hints: Sequence[str] | None = None) -> list[Trajectory]:
    """G rollouts of every task with the current policy: B trajectories in group order. hints: one per row."""
    config = run.config
    episodes = [
        Episode(task, config.format, config.max_messages, config.strict_empty_turn)
        for task in tasks
        for _ in range(config.group)
    ]
    started = time.perf_counter()
    trajectories = run.sampler.rollout(episodes, hints, config.temperature, stream=run.step)
    run.sample_seconds = time.perf_counter() - started
    return trajectories


def advantages(run: Run, trajectories: list[Trajectory]) -> Tensor:
    """Group-relative advantages [B] of trajectories in group order."""
    rewards = torch.tensor([row.reward for row in trajectories]).view(-1, run.config.group)  # [P, G]
    return group_advantages(rewards, run.config.adv_std).flatten()


def policy_update(run: Run, trajectories: list[Trajectory], scores: Tensor) -> dict[str, float]:
    """`updates` optimiser steps of the clipped policy loss, each on an equal share of the prompts.

    The loss is the mean over all sampled tokens of the share. Old log-probs are the sampler's; rows whose
    prompt has changed since (hints) get new ones from a scoring forward first. Returns `Tally.metrics`.
    """
    config, tally = run.config, Tally()
    old = [
        row.logprobs if row.sampled_prompt is None else score(run.policy, row, config.temperature)
        for row in trajectories
    ]
    groups = len(trajectories) // config.group
    for update in range(config.updates):
        first, end = (groups * k // config.updates * config.group for k in (update, update + 1))
        total = sum(row.sampled_tokens for row in trajectories[first:end])
        used = [i for i in range(first, end) if scores[i] != 0 or config.kl > 0]
        loss_sum = 0.0
        for part in micro_batches([len(trajectories[i].tokens) for i in used], config.tokens_at_once):
            batch = [used[k] for k in part]
            rows, before = [trajectories[i] for i in batch], [old[i] for i in batch]
            loss = token_losses(run, rows, before, scores[batch], tally, update == 0).sum() / total
            loss.backward()
            loss_sum += loss.item()
        tally.losses.append(loss_sum)
        tally.norms.append(optimizer_step(run, loss_sum))
    return tally.metrics()


def token_losses(
    run: Run,
    rows: list[Trajectory],
    old: list[list[float]],
    scores: Tensor,
    tally: "Tally",
    first_update: bool,
) -> Tensor:
    """Loss [N] of the sampled tokens of some rows: clipped policy loss plus kl * k3; `tally` takes notes."""
    config = run.config
    ids, mask = pad([(row.tokens, row.loss_mask) for row in rows], run.policy.device)
    logprobs, entropy = run.policy.logprobs(ids, mask, config.temperature, want_entropy=first_update)  # [N]
    counts = torch.tensor([row.sampled_tokens for row in rows], device=logprobs.device)
    before = [x for values, row in zip(old, rows) for x, sampled in zip(values, row.loss_mask) if sampled]
    before = logprobs.new_tensor(before)
    weights = scores.to(logprobs).repeat_interleave(counts)
    loss, clipped = policy_loss(logprobs, before, weights, config.clip, config.clip, config.dual_clip)
    if config.kl > 0:
        with torch.no_grad():
            reference = run.reference.logprobs(ids, mask, config.temperature)[0]
        loss = loss + config.kl * kl_k3(logprobs, reference)
    own = torch.tensor([row.source == "policy" for row in rows], device=logprobs.device).repeat_interleave(
        counts
    )
    tally.tokens += sum(len(row.tokens) for row in rows)
    tally.clipped += clipped[own].tolist()
    if first_update:
        tally.entropies += entropy.tolist()
        tally.gaps += (logprobs - before).detach().abs()[own].tolist()
    return loss


@dataclass
class Tally:
    """Notes of one policy update, summed up by `metrics`. Hinted rows stay out of `clipped` and `gaps`."""

    started: float = field(default_factory=time.perf_counter)
    tokens: int = 0
    losses: list[float] = field(default_factory=list)
    norms: list[float | None] = field(default_factory=list)  # None: the update was skipped
    clipped: list[bool] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)

    def metrics(self) -> dict[str, float]:
        """Columns of metrics.csv; nan where there is nothing to average."""
        return {
            "loss": _mean(self.losses),
            "entropy": _mean(self.entropies),
            "grad_norm": _mean([norm for norm in self.norms if norm is not None]),
            "clip_fraction": _mean(self.clipped),
            "train_tok_s": self.tokens / (time.perf_counter() - self.started),
            "logprob_gap": max(self.gaps, default=math.nan),
            "skipped_updates": self.norms.count(None),
        }


def optimizer_step(run: Run, loss: float) -> float | None:
    """Clip the gradient and step; returns its norm, or None, without a step, if anything is not finite."""
    parameters = list(run.policy.model.parameters())
    norm = torch.nn.utils.clip_grad_norm_(parameters, run.config.grad_clip).item()
    finite = math.isfinite(loss) and math.isfinite(norm)
    if finite:
        warm = min(1.0, (run.step + 1) / max(1, run.config.warmup))
        for group in run.optimizer.param_groups:
            group["lr"] = run.config.lr * warm
        run.optimizer.step()
    run.skipped_in_a_row = 0 if finite else run.skipped_in_a_row + 1
    zero_gradients(run.policy)
    return norm if finite else None


def zero_gradients(policy: Policy) -> None:
    """Zeros, not None: as published, an update without any contrast still decays Adam's momentum."""
    for parameter in policy.model.parameters():
        parameter.grad = torch.zeros_like(parameter)


@torch.no_grad()
def score(policy: Policy, row: Trajectory, temperature: float) -> list[float]:
    """New `Trajectory.logprobs` of a row: the policy's, under the row's own (unhinted) prompt."""
    ids, mask = pad([(row.tokens, row.loss_mask)], policy.device)
    values = iter(policy.logprobs(ids, mask, temperature)[0].tolist())
    return [next(values) if sampled else 0.0 for sampled in row.loss_mask]


def micro_batches(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, each of at most `budget` padded tokens (at least one row)."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    start = 0
    while start < len(order):
        end = start + 1
        while end < len(order) and (end + 1 - start) * lengths[order[end]] <= budget:
            end += 1
        yield order[start:end]
        start = end


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
