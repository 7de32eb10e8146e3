"""The Triton kernels: softmax statistics of a linear layer, their backward pass, attention of a decode step.

Imported only where they run: on a GPU, or under TRITON_INTERPRET=1 in the tests. Each has a twin in plain
torch that it is tested against (logprob.py, decode.py). Sums are in fp32, whatever the inputs. Exponents are
base 2, with log2(e) folded into the scale of the logits: "bits" below are nats times log2(e).
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanotoolrl.attention import Rows

BITS = 1 / math.log(2)  # per nat
WAVES = 4  # programs per processor that the forward pass asks for
# Tiles of logits by element size: the fp32 accumulator and its exponentials must fit the registers.
TILES = {
    2: {"BLOCK_N": 128, "BLOCK_V": 128, "BLOCK_D": 64, "num_warps": 8, "num_stages": 3},
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


# -------------------------------------------------------------------------------------------------- sampling
@triton.jit
def _pick_kernel(
    logits,  # [B, V]
    noise,  # [B], fp32
    forced,  # [B]
    ids,  # [B]
    logprobs,  # [B]
    scale,
    V,
    GREEDY: tl.constexpr,
    FORCED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row: a first pass finds maximum and sum, a second the id whose share of the sum holds the noise."""
    row = tl.program_id(0)
    logits += row.to(tl.int64) * V
    top, total, chosen = float("-inf"), 0.0, 0
    for start in range(0, V, BLOCK):
        places = start + tl.arange(0, BLOCK)
        z = tl.load(logits + places, places < V, float("-inf")) * scale
        highest = tl.max(z, 0)
        chosen = tl.where(highest > top, start + tl.argmax(z, 0), chosen)
        new_top = tl.maximum(top, highest)
        total = total * tl.exp2(top - new_top) + tl.sum(tl.exp2(z - new_top), 0)
        top = new_top
    if not GREEDY:
        goal, below, passed, last = tl.load(noise + row) * total, 0.0, 0, 0
        for start in range(0, V, BLOCK):
            places = start + tl.arange(0, BLOCK)
            z = tl.load(logits + places, places < V, float("-inf")) * scale
            exps = tl.exp2(z - top)
            cumulated = below + tl.cumsum(exps, 0)
            passed += tl.sum(((cumulated <= goal) & (places < V)).to(tl.int32), 0)
            below = tl.max(cumulated, 0)
            last = tl.maximum(last, tl.max(tl.where(exps > 0, places, 0), 0))
        # Rounding may lead past the last possible token, or to an impossible one.
        z = tl.load(logits + tl.minimum(passed, last)) * scale
        chosen = tl.where(tl.exp2(z - top) > 0, tl.minimum(passed, last), last)
    if FORCED:
        wanted = tl.load(forced + row)
        chosen = tl.where(wanted >= 0, wanted.to(tl.int32), chosen)
    tl.store(ids + row, chosen.to(tl.int64))
    tl.store(logprobs + row, (tl.load(logits + chosen) * scale - top - tl.log2(total)) * 0.6931471805599453)


def pick(
    logits: Tensor, noise: Tensor | None, forced: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor]:
    """(ids [B], log-probs [B] in nats) sampled from softmax(logits [B, V] / temperature), fp32.

    noise: in [0, 1), one per row, or None for the likeliest id. forced: an id per row that is taken instead,
    or a negative number.
    """
    B, V = logits.shape
    ids = torch.empty(B, dtype=torch.long, device=logits.device)
    logprobs = torch.empty(B, dtype=torch.float32, device=logits.device)
    flags = {"GREEDY": noise is None, "FORCED": forced is not None}
    noise = logprobs if noise is None else noise.float().clamp(max=1 - 2**-24)  # never 1
    forced = ids if forced is None else forced
    block = min(4096, triton.next_power_of_2(V))
    scale = BITS / temperature
    _pick_kernel[(B,)](logits.contiguous(), noise, forced, ids, logprobs, scale, V, **flags, BLOCK=block)
    return ids, logprobs


# ------------------------------------------------------------------------------------------ decode attention
@triton.jit
def _attention_kernel(
    query,  # [B, kv_heads * GROUP, DIM]
    keys,  # [places, kv_heads, capacity, DIM]
    values,
    places,  # [B]
    lengths,  # [B]
    out,  # [B, heads, parts, DIM], fp32
    statistics,  # [2, B, heads, parts]: maximum in bits, sum
    scale,
    capacity,
    first,  # of the parts that are made here
    parts,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """One row, one key-value head and the query heads that share it, one split of the row's length there."""
    row, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    kv_heads, splits = tl.num_programs(1), tl.num_programs(2)
    length = tl.load(lengths + row).to(tl.int32)
    share = tl.cdiv(tl.cdiv(length, splits), BLOCK_T) * BLOCK_T
    end = tl.minimum(split * share + share, length)
    heads, dims = tl.arange(0, HEADS), tl.arange(0, PADDED)
    mine = (heads < GROUP)[:, None] & (dims < DIM)[None, :]
    head = (row * kv_heads + kv_head) * GROUP + heads
    q = tl.load(query + head[:, None] * DIM + dims[None, :], mine, 0.0)
    store = (tl.load(places + row) * kv_heads + kv_head) * capacity * DIM  # 64-bit, as places are
    top = tl.full((HEADS,), float("-inf"), tl.float32)
    total = tl.zeros((HEADS,), tl.float32)
    acc = tl.zeros((HEADS, PADDED), tl.float32)
    for start in range(split * share, end, BLOCK_T):
        positions = start + tl.arange(0, BLOCK_T)
        spot = store + positions[:, None] * DIM + dims[None, :]
        inside = (positions < end)[:, None] & (dims < DIM)[None, :]
        k = tl.load(keys + spot, inside, 0.0)
        z = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # [HEADS, BLOCK_T]
        z = tl.where((positions < end)[None, :], z, float("-inf"))
        new_top = tl.maximum(top, tl.max(z, 1))
        p = tl.exp2(z - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        v = tl.load(values + spot, inside, 0.0)
        acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        total = total * shrink + tl.sum(p, 1)
        top = new_top
    place = head * parts + first + split
    tl.store(out + place[:, None] * DIM + dims[None, :], acc, mine)
    tl.store(statistics + place, top, heads < GROUP)
    plane = tl.num_programs(0) * kv_heads * GROUP * parts
    tl.store(statistics + plane + place, total, heads < GROUP)


@triton.jit
def _merge_kernel(
    parts,  # [B * heads, splits, DIM]
    statistics,  # [2, B * heads, splits]
    out,  # [B * heads, DIM]
    splits,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """One query head of one row: weigh the splits by their sums. An empty split has maximum -inf, sum 0."""
    head, dims, each = tl.program_id(0), tl.arange(0, PADDED), tl.arange(0, SPLITS)
    place = head * splits + each
    top = tl.load(statistics + place, each < splits, float("-inf"))
    total = tl.load(statistics + tl.num_programs(0) * splits + place, each < splits, 0.0)
    weight = tl.exp2(top - tl.max(top, 0))
    inside = (each < splits)[:, None] & (dims < DIM)[None, :]
    acc = tl.load(parts + place[:, None] * DIM + dims[None, :], inside, 0.0)
    merged = tl.sum(acc * weight[:, None], 0) / tl.sum(total * weight, 0)
    tl.store(out + head * DIM + dims, merged.to(out.dtype.element_ty), dims < DIM)


def decode_attention(rows: Rows, query: Tensor, prompts: Tensor, own: Tensor) -> Tensor:
    """Attention [B, heads, head_dim] of one query [B, heads, head_dim] per row over its prompt and its own
    tokens, whose keys and values are in prompts and own [2, places, kv_heads, capacity, head_dim].

    Nothing behind a length is read. A row has at least one token of its own.
    """
    (B, heads, DIM), kv_heads = query.shape, own.shape[2]
    assert prompts.is_contiguous() and own.is_contiguous()
    group, padded = heads // kv_heads, max(16, triton.next_power_of_2(DIM))
    stores = ((prompts, rows.prompts, rows.prompt_lengths), (own, rows.slots, rows.lengths))
    # Enough programs for the GPU, each with at least a few blocks of a full row.
    most = 2 * _processors(query.device) // (B * kv_heads)
    splits = [max(1, min(store.shape[3] // 256, most)) for store, *_ in stores]
    found = torch.empty(B, heads, sum(splits), DIM, dtype=torch.float32, device=query.device)
    statistics = torch.empty(2, B, heads, sum(splits), dtype=torch.float32, device=query.device)
    sizes = {"GROUP": group, "HEADS": max(16, triton.next_power_of_2(group)), "DIM": DIM, "PADDED": padded}
    query = query.contiguous()
    for (store, places, lengths), first, count in zip(stores, (0, splits[0]), splits):
        where = (*store, places.contiguous(), lengths.contiguous(), found, statistics)
        numbers = (DIM**-0.5 * BITS, store.shape[3], first, sum(splits))
        _attention_kernel[B, kv_heads, count](query, *where, *numbers, **sizes, BLOCK_T=64, num_warps=4)
    out = torch.empty_like(query)
    sizes = {"DIM": DIM, "PADDED": padded, "SPLITS": triton.next_power_of_2(sum(splits))}
    _merge_kernel[(B * heads,)](found, statistics, out, sum(splits), **sizes, num_warps=1)
    return out
