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
from nanotoolrl.model import Policy
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
    state: dict = field(default_factory=dict)  # what a scheme keeps across steps; saved in the checkpoint
    on_tokens: Callable[[int], None] | None = None

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
    """GRPO: G rollouts of every task; a rollout's tokens share the advantage A = (R - mean) / std of its
    group.

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
    return run.sampler.rollout(episodes, hints, config.temperature, stream=run.step, on_tokens=run.on_tokens)


def advantages(run: Run, trajectories: list[Trajectory]) -> Tensor:
    """Group-relative advantages [B] of trajectories in group order."""
    rewards = torch.tensor([row.reward for row in trajectories]).view(-1, run.config.group)  # [P, G]
    return group_advantages(rewards, run.config.adv_std).flatten()


def policy_update(run: Run, trajectories: list[Trajectory], scores: Tensor) -> dict[str, float]:
    """`updates` optimiser steps of the clipped policy loss, each on an equal share of the prompts.

    Returns metrics: loss, entropy, grad_norm, clip_fraction, train_tok_s, logprob_gap, skipped_updates. Old
    log-probs are the sampler's; rows whose prompt changed since (hints) get new ones from a scoring forward
    first.
    """
    config, started = run.config, time.perf_counter()
    fresh = [row.source == "policy" for row in trajectories]
    old = [
        row.logprobs if row.sampled_prompt is None else score(run.policy, row, config.temperature)
        for row in trajectories
    ]
    sums: dict[str, float] = dict.fromkeys(
        ("loss", "tokens", "clipped", "compared", "entropy", "measured", "seen"), 0.0
    )
    gap, norms, skipped = 0.0, [], 0
    groups = list(range(0, len(trajectories), config.group))
    for update in range(config.updates):
        share = groups[update * len(groups) // config.updates : (update + 1) * len(groups) // config.updates]
        rows = [i for first in share for i in range(first, first + config.group)]
        total = sum(trajectories[i].sampled_tokens for i in rows)
        used = [i for i in rows if scores[i] != 0 or config.kl > 0]
        loss_sum = 0.0
        for part in micro_batches([len(trajectories[i].tokens) for i in used], config.tokens_at_once):
            batch = [used[k] for k in part]
            ids, mask = pad([trajectories[i] for i in batch], run.policy.device)
            logprobs, entropy = run.policy.logprobs(ids, mask, config.temperature, want_entropy=update == 0)
            counts = [trajectories[i].sampled_tokens for i in batch]
            before = logprobs.new_tensor(
                [x for i in batch for x, m in zip(old[i], trajectories[i].loss_mask) if m]
            )
            weights = (
                scores[batch].to(logprobs).repeat_interleave(torch.tensor(counts, device=logprobs.device))
            )
            loss, clipped = policy_loss(logprobs, before, weights, config.clip, config.clip, config.dual_clip)
            if config.kl > 0:
                with torch.no_grad():
                    reference = run.reference.logprobs(ids, mask, config.temperature)[0]
                loss = loss + config.kl * kl_k3(logprobs, reference)
            (loss.sum() / total).backward()
            loss_sum += loss.sum().item() / total
            own = torch.tensor([fresh[i] for i, n in zip(batch, counts, strict=True) for _ in range(n)])
            sums["clipped"] += clipped.cpu()[own].sum().item()
            sums["compared"] += own.sum().item()
            sums["seen"] += sum(len(trajectories[i].tokens) for i in batch)
            if update == 0:
                sums["entropy"] += entropy.sum().item()
                sums["measured"] += len(entropy)
                if own.any():
                    gap = max(gap, (logprobs - before).detach().abs().cpu()[own].max().item())
        norm = optimizer_step(run, loss_sum)
        skipped += norm is None
        norms += [] if norm is None else [norm]
        sums["loss"] += loss_sum / config.updates
    return {
        "loss": sums["loss"],
        "entropy": _ratio(sums["entropy"], sums["measured"]),
        "grad_norm": _ratio(sum(norms), len(norms)),
        "clip_fraction": _ratio(sums["clipped"], sums["compared"]),
        "train_tok_s": sums["seen"] / (time.perf_counter() - started),
        "logprob_gap": gap if sums["compared"] else math.nan,
        "skipped_updates": skipped,
    }


def optimizer_step(run: Run, loss: float) -> float | None:
    """Clip the gradient and step; returns its norm, or None if loss or gradient are not finite (nothing
    changes)."""
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
    """Zeros, not None: an update without any contrast still decays Adam's momentum, as in the published
    code."""
    for parameter in policy.model.parameters():
        parameter.grad = torch.zeros_like(parameter)


@torch.no_grad()
def score(policy: Policy, row: Trajectory, temperature: float) -> list[float]:
    """Log-probs of the row's sampled tokens under its (unhinted) tokens; 0.0 elsewhere, as
    `Trajectory.logprobs`."""
    ids, mask = pad([row], policy.device)
    values = iter(policy.logprobs(ids, mask, temperature)[0].tolist())
    return [next(values) if sampled else 0.0 for sampled in row.loss_mask]


def pad(rows: Sequence[Trajectory], device: torch.device) -> tuple[Tensor, Tensor]:
    """(ids [B, T], loss mask [B, T]), right-padded by length."""
    width = max(len(row.tokens) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row.tokens)] = torch.tensor(row.tokens)
        mask[i, : len(row.tokens)] = torch.tensor(row.loss_mask)
    return ids.to(device), mask.to(device)


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


def _ratio(a: float, b: float) -> float:
    return a / b if b else math.nan
