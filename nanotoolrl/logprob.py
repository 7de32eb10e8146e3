"""Log-probabilities of given tokens, straight from hidden states: logits of the whole batch never exist.

`token_logprob` is the one function that policy, reference, evaluation and probes share. The forward pass
walks over the vocabulary and keeps four numbers a row: the running maximum, the sum of exponentials behind
it, the sum that makes the entropy, the target's logit. The backward pass recomputes the logits slab by slab
and multiplies each slab's gradient into those of hidden and weight. On a GPU the inner steps are Triton
kernels (kernels.py), elsewhere the few lines of torch below; both are tested against `reference_logprob`, the
obvious version.
"""

import importlib.util
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 2048  # vocabulary columns held at a time on a CPU
SLAB_BYTES = 128 * 2**20  # of one slab of the logits' gradient on a GPU
BACKENDS = ("auto", "triton", "tiled", "reference")

HAS_TRITON = importlib.util.find_spec("triton") is not None


def check_backend(backend: str) -> None:
    """Raise ValueError for a name that is no backend, and where Triton is asked for and cannot run."""
    if backend not in BACKENDS:
        raise ValueError(f"no log-prob backend {backend!r}; there is {', '.join(BACKENDS)}")
    runs = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
    if backend == "triton" and not (HAS_TRITON and runs):
        raise ValueError("the Triton backend needs a CUDA device and the triton package (pip install triton)")


def token_logprob(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    temperature: float = 1.0,
    want_entropy: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """(log-prob [N] of `ids` [N], entropy [N] or None) in nats of softmax(hidden @ weight.T / temperature).

    hidden [N, D] and weight [V, D] share dtype (fp32, bf16 or fp16) and device; sums and results are fp32.
    Differentiable in both; a row whose upstream gradients are exactly 0 is skipped by the backward pass. N
    may be 0. Inputs that are not contiguous are copied for the kernel. backend: "auto" is Triton on a GPU and
    tiles elsewhere; "reference" is `reference_logprob`. Raises ValueError on shapes, dtypes or
    devices that do not fit, or a temperature that is not positive. Ids outside 0 .. V - 1 are the caller's
    error and not looked for.
    """
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden is [N, D], weight [V, D]; got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if ids.shape != hidden.shape[:1]:
        raise ValueError(f"ids must have shape {tuple(hidden.shape[:1])}, not {tuple(ids.shape)}")
    if hidden.dtype != weight.dtype or not hidden.dtype.is_floating_point:
        raise ValueError(f"hidden and weight must share a float dtype, not {hidden.dtype} and {weight.dtype}")
    if not hidden.device == weight.device == ids.device:
        places = f"{hidden.device}, {weight.device} and {ids.device}"
        raise ValueError(f"hidden, weight and ids must be on one device, not {places}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
    if backend == "reference":
        return reference_logprob(hidden, weight, ids, temperature, want_entropy)
    triton = backend == "triton" or (backend == "auto" and hidden.is_cuda and HAS_TRITON)
    logprob, entropy = _FusedLogprob.apply(hidden, weight, ids, float(temperature), want_entropy, triton)
    return logprob, entropy if want_entropy else None


def reference_logprob(
    hidden: Tensor, weight: Tensor, ids: Tensor, temperature: float = 1.0, want_entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """The same as `token_logprob`, written plainly with [N, V] log-probabilities."""
    logprobs = F.log_softmax(hidden.float() @ weight.float().T / temperature, dim=-1)  # [N, V]
    entropy = -(logprobs.exp() * logprobs).sum(-1) if want_entropy else None
    return logprobs.gather(1, ids[:, None])[:, 0], entropy


class _FusedLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, ids: Tensor, temperature: float, want_entropy: bool, triton: bool
    ) -> tuple[Tensor, Tensor]:
        if triton and len(ids):
            from nanotoolrl.gpu.kernels import statistics  # needs Triton

            hidden, weight, ids = hidden.contiguous(), weight.contiguous(), ids.contiguous()
            top, log_total, target, entropy = statistics(hidden, weight, ids, temperature)
        else:
            top, log_total, target, entropy = _statistics(hidden, weight, ids, temperature, want_entropy)
        ctx.save_for_backward(hidden, weight, ids, top, log_total, entropy)
        ctx.temperature, ctx.triton = temperature, triton
        ctx.set_materialize_grads(False)
        # Subtract the maximum first: far from zero, top + log_total would round the logarithm away.
        return target - top - log_total, entropy

    @staticmethod
    def backward(ctx, g: Tensor | None, h: Tensor | None) -> tuple:
        """With p the softmax and H its entropy, the gradient of a row's logits is
        (g (1[id] - p) - h p (log p + H)) / temperature."""
        hidden, weight, ids, top, log_total, entropy = ctx.saved_tensors
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        g = torch.zeros_like(top) if g is None else g
        rows = (g != 0 if h is None else (g != 0) | (h != 0)).nonzero()[:, 0]  # the others add nothing
        every = len(rows) == len(ids)
        live = [x if x is None or every else x[rows] for x in (hidden, ids, top, log_total, entropy, g, h)]
        used: Any = live[0]  # hidden states of these rows
        d_live = torch.zeros(used.shape, dtype=torch.float32, device=hidden.device)
        d_weight = (torch.empty_like if len(rows) else torch.zeros_like)(weight) if want_weight else None
        for start, d in _slabs(weight, live, ctx.temperature, ctx.triton) if len(rows) else ():
            slab = slice(start, start + d.shape[1])
            if want_hidden:
                _add_product(d_live, d, weight[slab])
            if d_weight is not None:
                d_weight[slab] = d.T @ used.to(d.dtype)
        d_hidden = d_live if every else d_live.new_zeros(hidden.shape).index_copy_(0, rows, d_live)
        return d_hidden.to(hidden.dtype), d_weight, None, None, None, None


def _statistics(
    hidden: Tensor, weight: Tensor, ids: Tensor, temperature: float, want_entropy: bool
) -> tuple[Tensor, ...]:
    """(maximum, log of the sum behind it, logit of `ids`, entropy or zeros), each [N]."""
    hidden = hidden.float() / temperature
    rows = torch.arange(len(ids), device=ids.device)
    top = hidden.new_full((len(ids),), float("-inf"))  # running maximum [N]
    total, weighted, target = torch.zeros_like(top), torch.zeros_like(top), torch.zeros_like(top)
    # One tile for z; its exponentials get one of their own only where both are needed at once.
    room = hidden.new_empty(1 + want_entropy, len(ids) * min(TILE, len(weight)))
    for start in range(0, len(weight), TILE):
        tile = weight[start : start + TILE].float()
        z, exps = (room[k, : len(ids) * len(tile)].view(len(ids), len(tile)) for k in (0, -1))  # [N, tile]
        torch.mm(hidden, tile.T, out=z)
        inside = (ids >= start) & (ids < start + len(tile))
        target[inside] = z[rows[inside], ids[inside] - start]
        new_top = torch.maximum(top, z.amax(1))
        torch.exp(z.sub_(new_top[:, None]), out=exps)
        shrink = (top - new_top).exp()
        if want_entropy:  # the sum of (z - top) e^(z - top), moved to the new maximum
            drift = torch.where(total > 0, (top - new_top) * total, 0.0)
            weighted = (weighted + drift) * shrink
        total = total * shrink + exps.sum(1)
        if want_entropy:
            weighted += z.mul_(exps).sum(1)
        top = new_top
    entropy = total.log() - weighted / total if want_entropy else torch.zeros_like(top)
    return top, total.log(), target, entropy


def _slabs(
    weight: Tensor, live: Sequence[Any], temperature: float, triton: bool
) -> Iterator[tuple[int, Tensor]]:
    """(first column, gradient [N, slab] of the logits) of one slab of the vocabulary after the other.

    live: hidden, ids, top, log_total, entropy, g and h (or None) of the rows. A slab is overwritten by the
    next.
    """
    hidden, ids, top, log_total, entropy, g, h = live
    g, h = (g / temperature).contiguous(), None if h is None else (h / temperature).contiguous()
    if triton:
        from nanotoolrl.gpu.kernels import logit_gradient

        width = max(256, SLAB_BYTES // (len(ids) * hidden.element_size()) // 256 * 256)
        room = hidden.new_empty(len(ids) * min(width, len(weight)))
        for start in range(0, len(weight), width):
            d = room[: len(ids) * min(width, len(weight) - start)].view(len(ids), -1)
            logit_gradient(hidden, weight, ids, (top, log_total, entropy), g, h, temperature, start, d)
            yield start, d
        return
    hidden = hidden.float() / temperature
    rows = torch.arange(len(ids), device=ids.device)
    room = hidden.new_empty(1 if h is None else 2, len(ids) * min(TILE, len(weight)))
    for start in range(0, len(weight), TILE):
        tile = weight[start : start + TILE].float()
        d, p = (room[k, : len(ids) * len(tile)].view(len(ids), len(tile)) for k in (0, -1))
        logp = torch.mm(hidden, tile.T, out=d).sub_(top[:, None]).sub_(log_total[:, None])
        torch.exp(logp, out=p)
        if h is None:
            d.mul_(-g[:, None])
        else:
            logp.add_(entropy[:, None]).mul_(-h[:, None]).sub_(g[:, None]).mul_(p)
        inside = (ids >= start) & (ids < start + len(tile))
        d[rows[inside], ids[inside] - start] += g[inside]
        yield start, d


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b in fp32, whatever their dtype."""
    if a.is_cuda and a.dtype != torch.float32:
        total += torch.mm(a, b, out_dtype=torch.float32)
    else:
        total.addmm_(a.float(), b.float())
