"""The KV cache, and how the transformer's layers reach it.

Shapes: B rows, T tokens, H query heads, K key-value heads, W width of a head.
"""

import torch
from torch import Tensor

from nanotoolrl.attention import Attend, decode_attention, under_mask
from nanotoolrl.model import Policy

CAPACITY_STEP = 128  # the cache grows by so many positions


class Cache:
    """Keys and values of all rows in preallocated memory, [slots, K, capacity, W] per layer.

    Memory is kept from one rollout to the next: what stands behind a row's end is never read.
    """

    def __init__(self, policy: Policy, fast: bool = False) -> None:
        shape = policy.model.shape
        nothing = torch.zeros(
            0, shape.kv_heads, 0, shape.head_width, dtype=policy.dtype, device=policy.device
        )
        self.layers = [[nothing, nothing] for _ in range(shape.layers)]  # keys, values
        self.size = self.capacity = 0
        self.attention = decode_attention
        if fast:
            from nanotoolrl.gpu import kernels  # needs Triton

            self.attention = kernels.decode_attention

    def grow(self, size: int, capacity: int) -> None:
        """Make room for `size` rows of `capacity` positions, rounded up."""
        if size <= self.size and capacity <= self.capacity:
            return
        self.size = max(size, self.size)
        self.capacity = max(self.capacity, -(-capacity // CAPACITY_STEP) * CAPACITY_STEP)
        for layer in self.layers:
            for k, old in enumerate(layer):  # one by one: twice as much at a time is not there
                layer[k] = self._grown(old)

    def _grown(self, old: Tensor) -> Tensor:
        new = old.new_zeros(self.size, old.shape[1], self.capacity, old.shape[3])
        new[: old.shape[0], :, : old.shape[2]] = old
        return new

    def copy_row(self, source: int, targets: list[int], width: int) -> None:
        """Give `targets` the first `width` positions of row `source`."""
        for layer in self.layers:
            for store in layer:
                store[targets, :, :width] = store[source, :, :width].clone()

    # ---- how the transformer's layers reach it
    def extending(self, slots: Tensor, positions: Tensor, behind: Tensor) -> Attend:
        """The rows in `slots` [B] get new tokens at `positions` [B, T], which look at all up to themselves.

        Where `behind` [B, width] is True a row has ended. What an earlier row left there is read as zeros.
        """
        columns = torch.arange(behind.shape[1], device=behind.device)
        visible = columns <= positions[:, None, :, None]  # [B, 1, T, width]

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            self._write(layer, slots, positions, key, value)
            keys, values = (
                store[slots, :, : behind.shape[1]].masked_fill_(behind[:, None, :, None], 0)
                for store in self.layers[layer]
            )  # copies [B, K, width, W]
            return under_mask(query, keys, values, visible)

        return attend

    def stepping(self, slots: Tensor, lengths: Tensor) -> Attend:
        """The rows in `slots` [B], of `lengths` [B], get a token each, which looks at its whole row."""

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            self._write(layer, slots, lengths[:, None], key, value)
            keys, values = self.layers[layer]
            return self.attention(query[:, :, 0], keys, values, slots, lengths + 1)[:, :, None]

        return attend

    def _write(self, layer: int, slots: Tensor, positions: Tensor, key: Tensor, value: Tensor) -> None:
        """Put `key` and `value` [B, K, T, W] at `positions` [B, T] of `slots` [B]."""
        for store, new in zip(self.layers[layer], (key, value), strict=True):
            store[slots[:, None], :, positions] = new.transpose(1, 2)
