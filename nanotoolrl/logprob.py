"""Log-probabilities of given tokens, straight from hidden states: logits of the whole batch never exist.

`token_logprob` is the one function that policy, reference, evaluation and probes share. The CPU path walks
over the vocabulary in tiles and recomputes each tile in the backward pass; `reference_logprob` is the obvious
version it is tested against.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 2048  # vocabulary columns held at a time


def token_logprob(
    hidden: Tensor, weight: Tensor, ids: Tensor, temperature: float = 1.0, want_entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """(log-prob [N] of `ids` [N], entropy [N] or None) in nats of softmax(hidden @ weight.T / temperature).

    hidden [N, D] and weight [V, D] share dtype (fp32, bf16 or fp16) and device; sums are in fp32.
    Differentiable in both. N may be 0. Raises ValueError on shapes that do not fit or a temperature that is
    not positive.
    """
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden is [N, D], weight [V, D]; got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if ids.shape != hidden.shape[:1]:
        raise ValueError(f"ids must have shape {tuple(hidden.shape[:1])}, not {tuple(ids.shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
    logprob, entropy = _TiledLogprob.apply(hidden, weight, ids, float(temperature), want_entropy)
    return logprob, entropy if want_entropy else None


def reference_logprob(
    hidden: Tensor, weight: Tensor, ids: Tensor, temperature: float = 1.0, want_entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """The same as `token_logprob`, written plainly with [N, V] log-probabilities."""
    logprobs = F.log_softmax(hidden.float() @ weight.float().T / temperature, dim=-1)  # [N, V]
    entropy = -(logprobs.exp() * logprobs).sum(-1) if want_entropy else None
    return logprobs.gather(1, ids[:, None])[:, 0], entropy


class _TiledLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, ids: Tensor, temperature: float, want_entropy: bool):
        rows = torch.arange(len(ids), device=ids.device)
        top = hidden.new_full((len(ids),), float("-inf"), dtype=torch.float32)  # running maximum [N]
        total, weighted, target = torch.zeros_like(top), torch.zeros_like(top), torch.zeros_like(top)
        for start in range(0, len(weight), TILE):
            z = _logits(hidden, weight[start : start + TILE], temperature)  # [N, tile]
            inside = (ids >= start) & (ids < start + z.shape[1])
            target[inside] = z[rows[inside], ids[inside] - start]
            new_top = torch.maximum(top, z.amax(1))
            scale = (top - new_top).exp()
            if want_entropy:
                shifted = z.sub(new_top[:, None])
                exps = shifted.exp()
                # sum of (z - top) e^(z - top), moved to the new maximum
                drift = torch.where(total > 0, (top - new_top) * total, 0.0)
                weighted = (weighted + drift) * scale + (shifted * exps).sum(1)
            else:
                exps = z.sub_(new_top[:, None]).exp_()
            total = total * scale + exps.sum(1)
            top = new_top
        entropy = total.log() - weighted / total if want_entropy else torch.zeros_like(top)
        # Subtract the maximum first: far from zero, top + log(total) would round the log away.
        log_total = total.log()
        ctx.save_for_backward(hidden, weight, ids, top, log_total, entropy)
        ctx.temperature, ctx.want_entropy = temperature, want_entropy
        return target - top - log_total, entropy

    @staticmethod
    def backward(ctx, grad_logprob: Tensor, grad_entropy: Tensor):
        hidden, weight, ids, top, log_total, entropy = ctx.saved_tensors
        rows = torch.arange(len(ids), device=ids.device)
        d_hidden = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        d_weight = torch.empty_like(weight)
        for start in range(0, len(weight), TILE):
            tile = weight[start : start + TILE]
            logp = (
                _logits(hidden, tile, ctx.temperature).sub_(top[:, None]).sub_(log_total[:, None])
            )  # [N, tile]
            p = logp.exp()
            d = p * -grad_logprob[:, None]
            if ctx.want_entropy:
                d -= p * (logp + entropy[:, None]) * grad_entropy[:, None]
            inside = (ids >= start) & (ids < start + len(tile))
            d[rows[inside], ids[inside] - start] += grad_logprob[inside]
            d /= ctx.temperature
            d_hidden += d @ tile.float()
            d_weight[start : start + TILE] = d.T @ hidden.float()
        return d_hidden.to(hidden.dtype), d_weight, None, None, None


def _logits(hidden: Tensor, tile: Tensor, temperature: float) -> Tensor:
    return (hidden.float() @ tile.float().T).div_(temperature)
