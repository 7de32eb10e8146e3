"""Updates of the policy from trajectories and their advantages.

`policy_update` has four stages, each a function below it:
1. `rows_to_train`: which rows each optimiser step trains on.
2. `old_logprobs`: what their tokens were sampled with.
3. `forward`, `token_losses` and the backward pass, micro-batch by micro-batch.
4. `optimizer_step`: sum over processes, clip, step.

Shapes: P prompts, G rollouts per prompt, B = P G rows in group order, R rows of a micro-batch, T tokens,
D width, N trained tokens.
"""

import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nanotoolrl.gpu import distributed
from nanotoolrl.losses import kl_k3
from nanotoolrl.model import Policy, by_length, pad
from nanotoolrl.notes import Notes
from nanotoolrl.objective import Objective, Tokens, clipped_objective
from nanotoolrl.record import recorded
from nanotoolrl.run import Run
from nanotoolrl.trajectory import Trajectory
from nanotoolrl.weights import conflicts, rows_kept, weighed


# ------------------------------------------------------------------------------------- supervision beside it
@dataclass(frozen=True)
class Supervision:
    """An SFT loss that rides along with policy updates.

    It is the coefficient times the mean over trained tokens of -w log p, on up to `sft_batch` of the
    examples. They are drawn anew for each update.
    """

    examples: list[Trajectory]
    coefficient: float
    weight: Callable[[Tensor], Tensor] = torch.ones_like  # w [N] of the tokens' probabilities [N]


# ------------------------------------------------------------------------------------------ the policy update
def policy_update(
    run: Run,
    trajectories: list[Trajectory],
    advantages: Tensor,
    objective: Objective = clipped_objective,
    every_row: bool = False,
    supervised: Supervision | None = None,
) -> dict[str, Any]:
    """`updates` optimiser steps on an objective, each on an equal share of the prompts.

    advantages: [B]. The loss of an optimiser step is the mean over all sampled tokens of its share. With
    `--loss-agg sequence` it is the mean over rows of each row's mean. Returns `Notes.metrics`.

    Example: 2 prompts, 2 rollouts each, one update, and

        row   sampled tokens   reward   advantage
        0     3                1         0.71
        1     2                0        -0.71
        2     4                1         0          its group has no contrast: no gradient, left out
        3     5                1         0          left out

    Rows 0 and 1 are padded to one micro-batch: ids [2, T], log-probs [5]. The sum of their 5 token losses is
    divided by 14, the sampled tokens of all four rows: what has no advantage still counts. Groups that
    `--filter` leaves out do not.
    """
    config = run.config
    trajectories, advantages, changed = recorded_and_kept(run, trajectories, advantages)
    conflict = conflicts(trajectories, advantages, config.group) if config.gtpo > 0 else None
    notes = Notes()
    every_row = every_row or config.kl > 0 or config.entropy > 0 or config.guard_kl > 0
    by_token = config.loss_agg == "token"
    riding = supervised if supervised and supervised.examples and supervised.coefficient > 0 else None
    shares = shares_of(run, len(trajectories))
    trained = [rows_to_train(share, trajectories, advantages, every_row) for share in shares]
    old = {i: old_logprobs(run, trajectories[i]) for rows in trained for i in rows}
    for update, (share, mine) in enumerate(zip(shares, trained, strict=True)):
        if config.skip_dead and not (every_row or riding or advantages[share].any()):
            continue
        total = sum(trajectories[i].sampled_tokens for i in share) if by_token else len(share)
        loss_sum = 0.0
        for places in by_length([len(trajectories[i].tokens) for i in mine], config.tokens_at_once):
            batch = [mine[k] for k in places]
            rows = [trajectories[i] for i in batch]
            tokens, entropy = forward(run, rows, [old[i] for i in batch], advantages[batch], update == 0)
            if conflict:
                flags = [flag for i in batch for flag in conflict[i]]
                tokens = replace(tokens, conflict=torch.tensor(flags, device=tokens.row.device))
            losses, clipped = token_losses(run, weighed(tokens), entropy, objective)
            loss = (losses if by_token else row_means(losses, tokens)).sum() / total
            (loss * run.masters.scale).backward()
            notes.take(tokens, clipped, entropy, first_update=update == 0)
            loss_sum += loss.item()
        if riding:
            notes.take_supervised(*ride_along(run, riding, update))
        loss_sum = distributed.total(loss_sum)
        notes.losses.append(loss_sum)
        notes.norms.append(optimizer_step(run, loss_sum, run.optimizer, config.lr * warm_up(run)))
    return notes.metrics() | changed


# ---- stage 1: which rows
def recorded_and_kept(
    run: Run, trajectories: Sequence[Trajectory], advantages: Tensor
) -> tuple[list[Trajectory], Tensor, dict[str, float]]:
    """(rows as `--record` has them, of the groups that `--filter` keeps; their advantages, 0 where
    `--mask-overlong` says so; the share of all messages that were rewritten, where some may be)."""
    config = run.config
    rows = [recorded(row, run.policy.chat, config.record) for row in trajectories]
    changed = {}
    if config.record != "exact":
        messages = sum(len(row.spoken_ids()) for row in trajectories)
        changed["rewritten"] = sum(row.rewritten for row in rows) / max(1, messages)
    if config.filter < 1:
        kept = rows_kept(config, rows)
        rows, advantages = [rows[i] for i in kept], advantages[kept]
    if config.mask_overlong:  # overlong filtering of DAPO, arXiv 2503.14476
        advantages = advantages * advantages.new_tensor([not row.cut for row in rows])
    return rows, advantages, changed


def shares_of(run: Run, rows: int) -> list[range]:
    """The rows of each of the `updates` optimiser steps: whole groups, equally many or one more."""
    groups, updates = rows // run.config.group, run.config.updates
    ends = [groups * k // updates * run.config.group for k in range(updates + 1)]
    return [range(start, end) for start, end in itertools.pairwise(ends)]


def rows_to_train(
    share: range, trajectories: Sequence[Trajectory], advantages: Tensor, every_row: bool
) -> list[int]:
    """The rows of a share that this process trains on.

    A row without advantage has no gradient and is left out, unless `every_row`: a KL or entropy term says
    something about all of them. So is one without a token, of which `--record vanish` left nothing.
    """
    told = [i for i in share if every_row or advantages[i] != 0]
    rows = [i for i in told if trajectories[i].sampled_tokens]
    return [rows[k] for k in distributed.share(len(rows))]


# ---- stage 2: what they were sampled with
def old_logprobs(run: Run, row: Trajectory) -> list[float] | None:
    """Log-probs of a row's tokens before the update, or None where the only update computes them anyway.

    They are the sampler's where these were sampled under the row's own prompt. Hinted and oracle rows were
    not. With several updates these are scored anew first. With a single one the gradient's own forward pass
    gives them, detached: the ratio is exactly 1.
    """
    if row.scored:
        return row.logprobs
    if run.config.updates == 1:
        return None
    return rescore(run.policy, row, run.config.temperature)


@torch.no_grad()
def rescore(policy: Policy, row: Trajectory, temperature: float) -> list[float]:
    """New `Trajectory.logprobs` of a row: the policy's, under the row's own (unhinted) prompt."""
    ids, mask = pad([(row.tokens, row.loss_mask)], policy.device)
    values = iter(policy.logprobs(ids, mask, temperature)[0].tolist())
    return [next(values) if sampled else 0.0 for sampled in row.loss_mask]


# ---- stage 3: the losses of a micro-batch
def forward(
    run: Run, rows: list[Trajectory], old: list[list[float] | None], advantages: Tensor, first_update: bool
) -> tuple[Tokens, Tensor | None]:
    """(the trained tokens of R rows with their log-probs, entropies [N] if anybody needs them).

    old: what `old_logprobs` says of each row. advantages: [R].
    """
    config, policy = run.config, run.policy
    ids, mask = pad([(row.tokens, row.loss_mask) for row in rows], policy.device)  # [R, T]
    hidden = policy.trained_hidden(ids, mask)  # [N, D]
    want_entropy = first_update or config.entropy > 0
    logprobs, entropy = policy.token_logprob(hidden, ids[mask], config.temperature, want_entropy)  # [N]
    logprobs.retain_grad()  # for `Notes`
    counts = torch.tensor([row.sampled_tokens for row in rows], device=logprobs.device)  # [R]
    index = torch.arange(len(rows), device=logprobs.device).repeat_interleave(counts)  # [N]
    missing = torch.tensor([values is None for values in old], device=logprobs.device)[index]  # [N]
    filled = [values or [0.0] * len(row.tokens) for values, row in zip(old, rows)]
    known = [x for values, row in zip(filled, rows) for x, sampled in zip(values, row.loss_mask) if sampled]
    before = torch.where(missing, logprobs.detach(), logprobs.new_tensor(known))  # [N]
    weights = advantages.to(logprobs)[index]  # [N]
    return Tokens(run, rows, ids, mask, hidden.detach(), logprobs, before, weights, index), entropy


def token_losses(
    run: Run, tokens: Tokens, entropy: Tensor | None, objective: Objective
) -> tuple[Tensor, Tensor]:
    """(loss, whether the objective was clipped), both [N]: objective + kl * k3, on control tokens (kl +
    guard_kl) * k3, - entropy bonus."""
    config = run.config
    loss, clipped = objective(run, tokens)
    if config.kl > 0:
        loss = loss + config.kl * kl_k3(tokens.logprobs, tokens.reference)
    if config.guard_kl > 0:
        far = kl_k3(tokens.logprobs, tokens.reference, most=math.inf)
        loss = loss + config.guard_kl * tokens.control * far
    if config.entropy > 0 and entropy is not None:
        loss = loss - config.entropy * entropy
    return loss, clipped


def row_means(losses: Tensor, tokens: Tokens) -> Tensor:
    """Losses [N] over the number of tokens of their rows: the sum of a row's is its mean."""
    lengths = [row.sampled_tokens for row in tokens.rows]
    return losses / losses.new_tensor([n for n in lengths for _ in range(n)])


def ride_along(run: Run, supervised: Supervision, update: int) -> tuple[float, list[Trajectory]]:
    """Add the gradient of the SFT loss of one update; returns (that loss, the examples it is of)."""
    count = min(run.config.sft_batch, len(supervised.examples))
    drawn = random.Random(f"{run.config.seed}/{run.step}/{update}").sample(supervised.examples, count)
    return sft_backward(run, drawn, supervised.coefficient, supervised.weight), drawn


# ---- stage 4: the step
def warm_up(run: Run) -> float:
    """Share of the learning rate that this step runs at; anew after a restart (`begin_anew`)."""
    return min(1.0, (run.step - run.state.began + 1) / max(1, run.config.warmup))


def optimizer_step(run: Run, loss: float, optimizer: torch.optim.Optimizer, lr: float) -> float | None:
    """Sum the gradients of all processes, clip and step; returns their norm.

    If the loss or a gradient is not finite nothing is stepped and None is returned. All such updates are
    counted in `skipped_updates`. Too many in a row end the run, whatever follows within the step; among those
    an overflow that a smaller scale of the loss can cure does not count.
    """
    distributed.sum_gradients(run.masters.tensors)
    norm = torch.nn.utils.clip_grad_norm_(run.masters.tensors, run.config.grad_clip).item()
    finite = math.isfinite(loss) and math.isfinite(norm)
    if finite:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        run.masters.publish()
    run.skipped_updates += not finite
    curable = not finite and math.isfinite(loss) and run.masters.lower_scale()
    if not run.stuck and not curable:
        run.state.skipped_in_a_row = 0 if finite else run.state.skipped_in_a_row + 1
    run.masters.zero_gradients()
    return norm if finite else None


# ---------------------------------------------------------------------------------------- supervised training
def sft_backward(
    run: Run,
    examples: Sequence[Trajectory],
    coefficient: float = 1.0,
    weight: Callable[[Tensor], Tensor] = torch.ones_like,
) -> float:
    """Add the gradient of coefficient * SFT loss; returns the SFT loss, the mean over the examples' trained
    tokens of -w log p in nats (temperature 1).

    Whole conversations, every assistant message trained: the same gradient as the published pairs (all before
    a message -> the message), in one forward each.
    """
    total = sum(row.sampled_tokens for row in examples)
    mine = [examples[i] for i in distributed.share(len(examples))]
    loss_sum = 0.0
    for batch in by_length([len(row.tokens) for row in mine], run.config.tokens_at_once):
        rows = [(mine[i].tokens, mine[i].loss_mask) for i in batch]
        logprobs = run.policy.logprobs(*pad(rows, run.policy.device))[0]  # [N]
        loss = -(weight(logprobs.detach().exp()) * logprobs).sum() / total
        (coefficient * run.masters.scale * loss).backward()
        loss_sum += loss.item()
    return distributed.total(loss_sum)
