"""Who looks at what: how queries gather from keys and values, in whole sequences and in those that grow.

Shapes: B rows, T tokens, H query heads, K key-value heads (each serves H / K of them), W width of a head.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# (layer, query [B, H, T, W], key [B, K, T, W], value [B, K, T, W]) -> what the queries gathered [B, H, T, W].
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


def causal(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Every token looks at itself and all before it."""
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def under_mask(query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
    """What the queries [B, H, T, W] gather from keys and values [B, K, width, W] that they may see.

    On a GPU each key-value head is repeated for its query heads: `enable_gqa` beside a mask is slow there.
    """
    if query.is_cuda:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    return F.scaled_dot_product_attention(query, key, value, visible, enable_gqa=not query.is_cuda)


class Rows(NamedTuple):
    """Where B rows stand, each [B]."""

    slots: Tensor
    lengths: Tensor  # tokens of their own in their slots
    prompts: Tensor  # where their prompts are stored
    prompt_lengths: Tensor

    @classmethod
    def of(cls, feeds: Sequence[Any]) -> "Rows":
        """Those of rows that are about to be fed (`decode.Feed`)."""
        found = torch.tensor([(row.slot, row.length, row.prompt, row.prompt_length) for row in feeds])
        return cls(*found.T)
