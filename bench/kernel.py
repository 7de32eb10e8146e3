"""Log-prob and entropy of given tokens from hidden states, beside the peers."""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.measure import OURS, Arm, Row, best_seconds, installed, peak_memory, timed
from bench.models import MODEL_VOCABULARY
from nanotoolrl.logprob import token_logprob


def kernel(device: torch.device, repeats: int, small: bool) -> list[Row]:
    """Log-prob and entropy of given tokens from hidden states, forward and backward (rows 1, 3, 4)."""
    if device.type == "cuda":
        shapes = [(8192, 896, MODEL_VOCABULARY), (8192, 1536, MODEL_VOCABULARY)]
    else:
        shapes = [(64, 32, 5000) if small else (1024, 256, MODEL_VOCABULARY)]
    return [kernel_row(device, repeats, *shape) for shape in shapes]


def kernel_row(device: torch.device, repeats: int, N: int, D: int, V: int) -> Row:
    dtype, temperature = torch.bfloat16 if device.type == "cuda" else torch.float32, 0.7
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=generator).to(device, dtype).requires_grad_()
    weight = (torch.randn(V, D, generator=generator) * 3 / D**0.5).to(device, dtype).requires_grad_()
    ids = torch.randint(V, (N,), generator=generator).to(device)
    g, h = torch.randn(2, N, generator=generator).to(device)
    name = f"linear log-prob + entropy, N {N}, D {D}, V {V}, {str(dtype)[6:]}"
    row = Row(name, [], error_of="log-prob in nats, gradient as a share of its largest")
    runs, notes = kernel_runs(hidden, weight, ids, temperature, g, h, row.missing)
    returned = (hidden.numel() + weight.numel()) * hidden.element_size()
    check = _exact(hidden.detach(), weight.detach(), ids, temperature, g, h)
    for name, run in runs.items():
        arm = Arm(name, note=notes.get(name, ""))
        run()
        with peak_memory(arm, device, returned):
            found = run()
        if found[0] is not None:
            full, ours = dtype == torch.float32, name.startswith(OURS)
            arm.tolerance, arm.gradient_tolerance = (1e-4 if full or ours else 0.2), (1e-4 if full else 0.05)
            arm.error, arm.gradient_error = check(*found, "no entropy" not in name + arm.note)
        del found
        row.arms.append(arm)
    timed(row, runs, repeats, device)
    row.limit = 4 * _product_seconds(hidden.detach(), weight.detach(), device)
    return row


def kernel_runs(
    hidden: Tensor, weight: Tensor, ids: Tensor, temperature: float, g: Tensor, h: Tensor, missing: list[str]
) -> tuple[dict[str, Callable[[], tuple[Tensor | None, ...]]], dict[str, str]]:
    """(run by arm, note by arm). A run returns log-probs, if it has any, and the gradients of hidden and
    weight, with upstream weights g and h [N] of log-probs and entropies."""

    def naive() -> tuple[Tensor, Tensor]:
        logp = torch.log_softmax(hidden @ weight.T / temperature, -1)
        return logp.gather(1, ids[:, None])[:, 0], -(logp.exp() * logp).sum(-1)

    def both_ways(forward: Callable) -> Callable[[], tuple[Tensor | None, ...]]:
        def run() -> tuple[Tensor | None, ...]:
            logprobs, entropy = forward()
            loss = (g * logprobs).sum() + (0 if entropy is None else (h * entropy).sum())
            return logprobs.detach(), *torch.autograd.grad(loss, (hidden, weight))

        return run

    inputs, notes = (hidden, weight, ids, temperature), {}
    runs = {OURS: both_ways(lambda: token_logprob(*inputs, True))}
    runs |= {f"{OURS}, no entropy": both_ways(lambda: token_logprob(*inputs)), "naive": both_ways(naive)}
    if hidden.is_cuda:
        runs["torch.compile of naive"] = both_ways(torch.compile(naive))
    if hasattr(F, "linear_cross_entropy"):  # since torch 2.13
        name, options = "torch linear_cross_entropy", torch.nn.LinearCrossEntropyOptions()
        chunked = functools.partial(F.linear_cross_entropy, reduction="none", options=options)
        runs[name] = both_ways(lambda: (-chunked(hidden / temperature, weight, ids), None))
        notes[name] = "no entropy"
    if version := installed("trl", "trl", missing):
        from trl.kernels import ChunkedLogProbFunction
        from trl.trainer import utils as trl_utils

        extra = (temperature, trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ("entropy",))
        trl = ChunkedLogProbFunction.apply
        runs[f"TRL {version}"] = both_ways(lambda: trl(hidden, weight, None, ids, *extra)[:2])
    if version := installed("liger_kernel", "liger-kernel", missing):
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss
        from liger_kernel.chunked_loss import fused_linear_ppo as liger

        loss = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, temperature=temperature)

        def grpo_loss() -> tuple[Tensor | None, ...]:
            tokens = ids.view(8, -1)
            states = hidden.view(8, -1, hidden.shape[1])
            value = loss(states, weight, tokens, torch.ones_like(tokens), g[:8])[0]
            return None, *torch.autograd.grad(value, (hidden, weight))

        name, inner = f"Liger {version} GRPO loss", f"Liger {version} inner function"
        call, chunk = liger._ChunkedSelectiveLogProbFunction.apply, liger._SELECTIVE_LOGPROB_VOCAB_CHUNK_SIZE
        runs[name] = grpo_loss
        if hidden.is_cuda:
            from liger_kernel.functional import fused_linear_cross_entropy as frontend

            fused = f"Liger {version} cross-entropy"
            plain = functools.partial(frontend, reduction="none")
            runs[fused] = both_ways(lambda: (-plain(hidden / temperature, weight, ids)[0], None))
            notes[fused] = "no entropy"
        else:
            missing.append(f"liger-kernel {version}: its fused cross-entropy needs a GPU")
        runs[inner] = both_ways(lambda: (call(hidden, weight, ids, None, temperature, chunk), None))
        notes |= {name: "what it offers to users; no entropy, no log-probs", inner: "private; no entropy"}
    if version := installed("cut_cross_entropy", "cut-cross-entropy", missing):
        if hidden.is_cuda:
            from cut_cross_entropy import linear_cross_entropy as cce

            name = f"CCE {version}"
            runs[name] = both_ways(lambda: (-cce(hidden / temperature, weight, ids, reduction="none"), None))
            notes[name] = "no entropy; leaves small gradients out"
        else:
            missing.append(f"cut-cross-entropy {version}: its kernel needs a GPU")
    return runs, notes


@torch.no_grad()
def _exact(
    hidden: Tensor, weight: Tensor, ids: Tensor, temperature: float, g: Tensor, h: Tensor
) -> Callable[..., tuple[float, float]]:
    """A function that compares with fp64: (largest error of the log-probs, largest error of the gradients of
    all hidden states and of 64 rows of the weight, as a share of the largest gradient)."""
    some = torch.linspace(0, len(weight) - 1, 64, device=ids.device).long()
    chosen, d_hidden, d_some = [], {True: [], False: []}, {True: 0.0, False: 0.0}
    wide = weight.double()
    for x, i, a, b in zip(*(t.split(128) for t in (hidden, ids, g, h)), strict=True):
        logp = (x.double() @ wide.T / temperature).log_softmax(-1)  # [128, V]
        p = logp.exp()
        chosen.append(logp.gather(1, i[:, None])[:, 0])
        entropy = -(p * logp).sum(-1, keepdim=True)
        for with_entropy in (True, False):
            d = -a[:, None] * p
            d[torch.arange(len(i)), i] += a
            if with_entropy:
                d -= b[:, None] * p * (logp + entropy)
            d /= temperature
            d_hidden[with_entropy].append(d @ wide)
            d_some[with_entropy] += d[:, some].T @ x.double()
    chosen = torch.cat(chosen)
    d_hidden = {key: torch.cat(parts) for key, parts in d_hidden.items()}

    def compare(logprobs: Tensor, of_hidden: Tensor, of_weight: Tensor, entropy: bool) -> tuple[float, float]:
        pairs = ((of_hidden, d_hidden[entropy]), (of_weight[some], d_some[entropy]))
        shares = [((x.double() - y).abs().max() / y.abs().max()).item() for x, y in pairs]
        return (logprobs.double() - chosen).abs().max().item(), max(shares)

    return compare


def _product_seconds(hidden: Tensor, weight: Tensor, device: torch.device) -> float:
    """Seconds of hidden @ weight.T: one of the four products that the row must make."""
    room = torch.empty(len(hidden), 2048, dtype=hidden.dtype, device=device)

    def product() -> None:
        for tile in weight.split(2048):
            torch.mm(hidden, tile.T, out=room[:, : len(tile)])

    return best_seconds(product, device)
