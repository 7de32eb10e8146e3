"""Who looks at what: how queries gather from keys and values, in whole sequences and in those that grow.

Shapes: B rows, T tokens, H query heads, K key-value heads (each serves H / K of them), W width of a head.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# (layer, query [B, H, T, W], key [B, K, T, W], value [B, K, T, W]) -> what the queries gathered [B, H, T, W].
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


def causal(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Every token looks at itself and all before it."""
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def masked(visible: Tensor) -> Attend:
    """Tokens look where `visible` [T, T] is True: row t holds what token t sees."""
    return lambda layer, query, key, value: under_mask(query, key, value, visible)


def under_mask(query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
    """What the queries [B, H, T, W] gather from keys and values [B, K, width, W] that they may see.

    On a GPU each key-value head is repeated for its query heads: `enable_gqa` beside a mask is slow there.
    """
    if query.is_cuda:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    return F.scaled_dot_product_attention(query, key, value, visible, enable_gqa=not query.is_cuda)


def decode_attention(query: Tensor, keys: Tensor, values: Tensor, slots: Tensor, lengths: Tensor) -> Tensor:
    """What queries [B, H, W] gather from the first `lengths` [B] positions of `slots` [B] of a layer's keys
    and values [slots, K, capacity, W]: what the kernel of this name does (gpu/kernels.py), row by row."""
    (B, H, W), K = query.shape, keys.shape[1]
    query = query.reshape(B, K, -1, W)  # query heads that share keys are queries of one head
    out = torch.empty_like(query)
    for i, (slot, length) in enumerate(zip(slots.tolist(), lengths.tolist(), strict=True)):
        k, v = keys[slot, :, :length], values[slot, :, :length]
        out[i] = F.scaled_dot_product_attention(query[i][None], k[None], v[None])[0]
    return out.view(B, H, W)
