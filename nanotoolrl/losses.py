"""Advantages and token losses: pure functions on tensors.

Shapes: P prompts, G rollouts per prompt, N trained tokens. Losses are per token [N]; whoever calls them
divides their sum by a number of the whole update (sampled tokens, or rows), so that the size of micro-batches
never matters.
"""

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0  # exp of more is no ratio anybody should learn from
REAL_DROP = 1e-3  # nats; sampler and trainer differ by less, by rounding


def relative_advantages(rewards: Tensor, divide_by_std: bool) -> Tensor:
    """Group-relative advantages [P, G] of rewards [P, G] (GRPO, arXiv 2402.03300; Hao et al. 2026, §4).

    A = R - mean, over the group's standard deviation (of a sample, + 1e-6) if `divide_by_std`. A group whose
    rewards are all equal gets exactly 0. Example: rewards [1, 0, 0] give [1.1547, -0.5774, -0.5774].
    """
    centred = rewards - rewards.mean(1, keepdim=True)
    equal = (rewards == rewards[:, :1]).all(1, keepdim=True)
    if divide_by_std and rewards.shape[1] > 1:
        centred = centred / (rewards.std(1, keepdim=True) + 1e-6)
    return centred.masked_fill(equal, 0.0)


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
) -> tuple[Tensor, Tensor]:
    """PPO's clipped loss and whether it was clipped, both [N] (arXiv 1707.06347; dual clip 1912.09729).

    loss = max(-A r, -A clamp(r, 1 - clip_low, 1 + clip_high)) with r = exp(logprob - old); where A < 0 at
    most -A dual_clip. Clipped tokens have no gradient. All inputs are [N].
    """
    ratio = (logprobs - old_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    plain = -advantages * ratio
    bounded = -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = torch.maximum(plain, bounded)
    capped = (advantages < 0) & (loss > -advantages * dual_clip)
    return torch.where(capped, -advantages * dual_clip, loss), capped | (bounded > plain)


def cispo_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_high: float
) -> tuple[Tensor, Tensor]:
    """CISPO's loss and whether its weight was clipped, both [N] (MiniMax-M1, arXiv 2506.13585).

    loss = -A w log p, w = min(r, 1 + clip_high) without a gradient: a token whose ratio is clipped weighs
    less and still teaches. All inputs are [N].
    """
    ratio = (logprobs - old_logprobs).detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    return -advantages * ratio.clamp(max=1 + clip_high) * logprobs, ratio > 1 + clip_high


def gspo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    row: Tensor,
    clip_low: float,
    clip_high: float,
) -> tuple[Tensor, Tensor]:
    """GSPO's loss and whether it was clipped, both [N] (arXiv 2507.18071, its token form).

    loss = max(-A s, -A clamp(s, 1 - clip_low, 1 + clip_high)), s = exp(mean of logprob - old over the row's
    tokens), with each token's own gradient. row: index [N] of each token's row. The source clips at 3e-4 and
    4e-4, and takes the mean over rows (`--loss-agg sequence`).
    """
    rows = int(row.max()) + 1 if len(row) else 0
    change = (logprobs - old_logprobs).detach()
    sums = change.new_zeros(rows).index_add(0, row, change)
    means = sums / change.new_zeros(rows).index_add(0, row, torch.ones_like(change)).clamp(min=1)
    ratio = (means[row].clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO) + logprobs - logprobs.detach()).exp()
    plain = -advantages * ratio
    bounded = -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    return torch.maximum(plain, bounded), bounded > plain


def kl_k3(logprobs: Tensor, reference_logprobs: Tensor, most: float = 10.0) -> Tensor:
    """The k3 estimate of KL(policy || reference) per token [N], >= 0: exp(d) - d - 1 with d = reference -
    policy (J. Schulman's note; the "low_var_kl" of the published code, which also bounds it by 10).

    Beyond `most` it has no gradient: with 10 a token that is 13.6 times less likely than in the reference is
    not pulled back any more.
    """
    d = (reference_logprobs - logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return (torch.expm1(d) - d).clamp(0.0, most)


def shaped_loss(logprobs: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """Loss [N] of off-policy tokens: PPO's, with w = p / (p + 0.1) where the ratio stands (published code of
    Hao et al. 2026; LUFFY, arXiv 2504.14945).

    loss = max(-A w, -A clamp(w, 1 - clip_low, 1 + clip_high)), p the policy's own probability. As w < 0.91,
    the upper clamp is never reached, and for A > 0 none ever cuts a gradient: dw/dlog p = w (1 - w), small
    for tokens that are certain and for tokens that are out of reach.
    """
    p = logprobs.exp()
    w = p / (p + 0.1)
    return torch.maximum(-advantages * w, -advantages * w.clamp(1 - clip_low, 1 + clip_high))


def likelihood_drop(logprobs: Tensor, old_logprobs: Tensor, preferred: Tensor, part: Tensor) -> Tensor:
    """Penalty [N] where a preferred message has become less likely (LLDS, arXiv 2512.04220).

    old - logprob on the fallen tokens of messages that are `preferred` [N] (bool) and whose summed log-prob
    fell; 0 elsewhere. Less than 1e-3 nats is no fall: the gradient is 1 however small the fall, and must not
    come from rounding. part: index [N] of each token's message.
    """
    drop = old_logprobs - logprobs  # [N]
    parts = int(part.max()) + 1 if len(part) else 0
    fell = drop.new_zeros(parts).index_add(0, part, drop.detach()) > REAL_DROP  # [parts]
    return torch.where(preferred & fell[part] & (drop > REAL_DROP), drop, 0.0)
