"""The Triton kernels: softmax statistics of a linear layer, their backward pass, attention of a decode step.

Imported only where they run: on a GPU, or under TRITON_INTERPRET=1 in the tests. Each has a twin in plain
torch that it is tested against (logprob.py, sampler.py). Sums are in fp32, whatever the inputs. Exponents are
base 2, with log2(e) folded into the scale of the logits: "bits" below are nats times log2(e).
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

BITS = 1 / math.log(2)  # per nat
WAVES = 4  # programs per processor that the forward pass asks for
# Tiles of logits by element size: the fp32 accumulator must fit the registers.
TILES = {
    2: {"BLOCK_N": 128, "BLOCK_V": 256, "BLOCK_D": 64, "num_warps": 8, "num_stages": 3},
    4: {"BLOCK_N": 64, "BLOCK_V": 64, "BLOCK_D": 32, "num_warps": 4, "num_stages": 2},
}


# ------------------------------------------------------------------------------------- linear -> log-softmax
@triton.jit
def _logits(
    hidden,  # [N, D]
    weight,  # [V, D]
    rows,  # [BLOCK_N]
    columns,  # [BLOCK_V]
    N,
    V,
    D,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A tile of hidden @ weight.T, without TF32; 0 outside. Offsets are 64-bit: V * D may pass 2^31."""
    hidden += rows.to(tl.int64)[:, None] * D
    weight += columns.to(tl.int64)[:, None] * D
    z = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    for start in range(0, D, BLOCK_D):
        depth = start + tl.arange(0, BLOCK_D)[None, :]
        h = tl.load(hidden + depth, (rows[:, None] < N) & (depth < D), 0.0)
        w = tl.load(weight + depth, (columns[:, None] < V) & (depth < D), 0.0)
        z = tl.dot(h, tl.trans(w), z, input_precision="ieee")
    return z


@triton.jit
def _statistics_kernel(
    hidden,
    weight,
    ids,  # [N]
    out,  # [4, splits, N]
    scale,
    N,
    V,
    D,
    width,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """BLOCK_N rows x `width` columns. Row blocks are the fast axis of the grid: programs that run side by
    side read the same slice of the weight."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    wanted = tl.load(ids + rows, rows < N, -1)[:, None]
    top = tl.full((BLOCK_N,), float("-inf"), tl.float32)  # running maximum
    target = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)  # sum of 2^(z - top)
    weighted = tl.zeros((BLOCK_N,), tl.float32)  # sum of (z - top) 2^(z - top)
    for start in range(split * width, min(split * width + width, V), BLOCK_V):
        columns = start + tl.arange(0, BLOCK_V)
        z = _logits(hidden, weight, rows, columns, N, V, D, BLOCK_N, BLOCK_V, BLOCK_D) * scale
        z = tl.where(columns[None, :] < V, z, float("-inf"))
        target = tl.maximum(target, tl.max(tl.where(columns[None, :] == wanted, z, float("-inf")), 1))
        new_top = tl.maximum(top, tl.max(z, 1))
        z -= new_top[:, None]
        exps = tl.exp2(z)
        drift = tl.where(total > 0, top - new_top, 0.0) * total  # moves `weighted` to the new maximum
        shrink = tl.exp2(top - new_top)
        weighted = (weighted + drift) * shrink + tl.sum(tl.where(exps > 0, z, 0.0) * exps, 1)
        total = total * shrink + tl.sum(exps, 1)
        top = new_top
    out += split.to(tl.int64) * N + rows
    plane = tl.num_programs(1).to(tl.int64) * N
    tl.store(out, top, rows < N)
    tl.store(out + plane, total, rows < N)
    tl.store(out + 2 * plane, weighted, rows < N)
    tl.store(out + 3 * plane, target, rows < N)


def statistics(hidden: Tensor, weight: Tensor, ids: Tensor, temperature: float) -> tuple[Tensor, ...]:
    """(maximum, log of the sum behind it, logit of `ids`, entropy), each [N] in nats and fp32, of the rows of
    hidden [N, D] @ weight.T [D, V] / temperature. Inputs are contiguous, N > 0."""
    (N, D), V = hidden.shape, len(weight)
    assert hidden.is_contiguous() and weight.is_contiguous() and ids.is_contiguous()
    tile = TILES[hidden.element_size()]
    row_blocks, columns = triton.cdiv(N, tile["BLOCK_N"]), triton.cdiv(V, tile["BLOCK_V"])
    splits = min(columns, max(1, WAVES * _processors(hidden.device) // row_blocks))
    width = triton.cdiv(columns, splits) * tile["BLOCK_V"]
    splits = triton.cdiv(V, width)  # each has a column, so that its maximum is finite
    out = torch.empty(4, splits, N, dtype=torch.float32, device=hidden.device)
    scale = BITS / temperature
    _statistics_kernel[row_blocks, splits](hidden, weight, ids, out, scale, N, V, D, width, **tile)
    tops, totals, weighted, targets = out  # [splits, N]
    top = tops.amax(0)
    shrink = (tops - top).exp2()
    total = (totals * shrink).sum(0)
    weighted = ((weighted + (tops - top) * totals) * shrink).sum(0)
    log_total = total.log2()
    return tuple(x / BITS for x in (top, log_total, targets.amax(0), log_total - weighted / total))


@triton.jit
def _logit_gradient_kernel(
    hidden,
    weight,
    ids,
    top,  # [N], bits; so are the next two
    log_total,
    entropy,
    grad_logprob,  # [N]
    grad_entropy,  # [N], per bit
    out,  # [N, width]
    scale,
    N,
    V,
    D,
    first,
    width,
    ENTROPY: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The tile of out at its program's place: g (1[id] - p) - h p (log p + H) of columns first ..."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    places = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    columns, inside = first + places, rows < N
    z = _logits(hidden, weight, rows, columns, N, V, D, BLOCK_N, BLOCK_V, BLOCK_D) * scale
    # One after the other: far from zero their sum would round the logarithm away.
    z = z - tl.load(top + rows, inside, 0.0)[:, None] - tl.load(log_total + rows, inside, 0.0)[:, None]
    p = tl.exp2(z)
    g = tl.load(grad_logprob + rows, inside, 0.0)[:, None]
    hit = columns[None, :] == tl.load(ids + rows, inside, -1)[:, None]
    d = tl.where(hit, g, 0.0) - g * p
    if ENTROPY:
        h = tl.load(grad_entropy + rows, inside, 0.0)[:, None]
        d -= h * p * (tl.where(p > 0, z, 0.0) + tl.load(entropy + rows, inside, 0.0)[:, None])
    out += rows.to(tl.int64)[:, None] * width + places[None, :]
    tl.store(out, d.to(out.dtype.element_ty), inside[:, None] & (places[None, :] < width))


def logit_gradient(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    saved: tuple[Tensor, Tensor, Tensor],
    g: Tensor,
    h: Tensor | None,
    temperature: float,
    first: int,
    out: Tensor,
) -> None:
    """Write g (1[id] - p) - h p (log p + H) of the columns first .. first + width into out [N, width].

    saved: maximum, log of the sum, entropy, as `statistics` gives them; g, h: [N], fp32. Contiguous, N > 0.
    """
    (N, D), width = hidden.shape, out.shape[1]
    assert all(x.is_contiguous() for x in (hidden, weight, ids, *saved, g, out))
    tile = TILES[hidden.element_size()]
    grid = (triton.cdiv(N, tile["BLOCK_N"]), triton.cdiv(width, tile["BLOCK_V"]))
    statistics = [x * BITS for x in saved]
    per_bit = g if h is None else h / BITS
    scale, sizes = BITS / temperature, (N, len(weight), D, first, width)
    tile = tile | {"ENTROPY": h is not None}
    _logit_gradient_kernel[grid](hidden, weight, ids, *statistics, g, per_bit, out, scale, *sizes, **tile)


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
