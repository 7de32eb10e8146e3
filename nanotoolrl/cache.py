"""The KV cache, and how the transformer's layers reach it.

A prompt is stored once, however many rows share it. What follows it in a row is in the row's slot. A position
counts from the start of the prompt: the next token of a row stands at its prompt's length plus its own.

Shapes: B rows, T tokens, K key-value heads, W width of a head.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from nanotoolrl.attention import Attend, Rows, causal, under_mask
from nanotoolrl.model import Policy
from nanotoolrl.together import Together

CAPACITY_STEP = 128  # a store grows by so many positions


class Store:
    """Keys and values in preallocated memory, [2, places, K, capacity, W] per layer."""

    def __init__(self, policy: Policy) -> None:
        shape = policy.model.shape
        nothing = torch.zeros(
            2, 0, shape.kv_heads, 0, shape.head_width, dtype=policy.dtype, device=policy.device
        )
        self.kv_heads, self.layers = shape.kv_heads, [nothing] * shape.layers
        self.size = self.capacity = 0

    def grow(self, size: int, capacity: int) -> None:
        """Make room for `size` places of `capacity` positions, rounded up."""
        if size <= self.size and capacity <= self.capacity:
            return
        self.size = max(size, self.size)
        self.capacity = max(self.capacity, -(-capacity // CAPACITY_STEP) * CAPACITY_STEP)
        for layer, old in enumerate(self.layers):  # one by one: twice as much at a time is not there
            new = old.new_zeros(2, self.size, old.shape[2], self.capacity, old.shape[4])
            new[:, : old.shape[1], :, : old.shape[3]] = old
            self.layers[layer] = new

    def clear(self) -> None:
        """Fill it with zeros."""
        for store in self.layers:
            store.zero_()

    def move(self, old: int, new: int, length: int) -> None:
        """Copy the first `length` positions of a place to another."""
        for store in self.layers:
            store[:, new, :, :length] = store[:, old, :, :length]

    def spots(self, places: Tensor, positions: Tensor) -> Tensor:
        """Where `write` puts the tokens at `positions` [B, T] of `places` [B], as rows of W numbers."""
        K = self.kv_heads
        heads = torch.arange(2 * K, device=places.device).view(2, 1, K, 1)
        stored = (heads // K * self.size + places.view(1, -1, 1, 1)) * K + heads % K  # [2, B, K, 1]
        return (stored * self.capacity + positions[:, None]).flatten()

    def write(self, layer: int, spots: Tensor, key: Tensor, value: Tensor) -> None:
        """Put `key` and `value` [B, K, T, W] at their spots."""
        W = key.shape[-1]
        self.layers[layer].view(-1, W).index_copy_(0, spots, torch.stack([key, value]).view(-1, W))


class Cache:
    """The prompts of a rollout, and what its rows have of their own.

    What is behind a row's end is read under a mask, so it must be a number: a rollout begins with zeros, and
    one that was spoiled by NaN leaves nothing behind.
    """

    def __init__(self, policy: Policy, fast: bool = False) -> None:
        self.prompts, self.own = Store(policy), Store(policy)
        self.gathering: Any = partial(Together, self.own.kv_heads, policy.dtype)
        if fast:
            from nanotoolrl.gpu import kernels  # needs Triton

            self.gathering = partial(partial, kernels.decode_attention)

    def prompting(self, places: Tensor, positions: Tensor) -> Attend:
        """Prompts are read, right-padded: tokens at `positions` [B, T], stored in `places` [B]."""
        spots = self.prompts.spots(places, positions)

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            self.prompts.write(layer, spots, key, value)
            return causal(layer, query, key, value)

        return attend

    def extending(self, rows: Rows, positions: Tensor) -> Attend:
        """Rows get new tokens at `positions` [B, T] of their slots, which look at all up to themselves.

        A row is read to its own end, by itself.
        """
        spots = self.own.spots(rows.slots, positions)
        ends = positions.amax(1) + 1
        reads = list(zip(*(x.tolist() for x in (rows.prompts, rows.prompt_lengths, rows.slots, ends))))
        columns = torch.arange(max(P + end for _, P, _, end in reads), device=positions.device)
        masks = [columns[: P + end] <= P + at[:, None] for (_, P, _, end), at in zip(reads, positions)]

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            self.own.write(layer, spots, key, value)
            prompts, own, found = self.prompts.layers[layer], self.own.layers[layer], []
            for i, (prompt, P, slot, end) in enumerate(reads):
                keys, values = torch.cat([prompts[:, prompt, :, :P], own[:, slot, :, :end]], 2)[:, None]
                found.append(under_mask(query[i : i + 1], keys, values, masks[i]))
            return torch.cat(found)

        return attend

    def stepping(self, rows: Rows) -> Attend:
        """Rows get a token each, which looks at its whole row."""
        spots = self.own.spots(rows.slots, rows.lengths[:, None])
        gather = self.gathering(rows._replace(lengths=rows.lengths + 1))

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            self.own.write(layer, spots, key, value)
            return gather(query[:, :, 0], self.prompts.layers[layer], self.own.layers[layer])[:, :, None]

        return attend
