"""Attention of a decode step, the slow and obvious way."""

import torch
from torch import Tensor

from nanotoolrl.attention import Rows


def attention_case(
    rows: Rows, heads: int, kv_heads: int, dim: int, behind: float = 0.0, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """(query, prompts, own) of random numbers for rows; where no row has a token there is `behind`."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(len(rows.slots), heads, dim, generator=generator)
    stores = []
    for places, lengths in ((rows.prompts, rows.prompt_lengths), (rows.slots, rows.lengths)):
        store = torch.randn(2, int(places.max()) + 2, kv_heads, 512, dim, generator=generator)
        known = torch.zeros(store.shape[1], dtype=torch.long).index_copy_(0, places, lengths)
        for place, length in enumerate(known):
            store[:, place, :, length:] = behind
        stores.append(store)
    return query, *stores


def attention_row_by_row(rows: Rows, query: Tensor, prompts: Tensor, own: Tensor) -> Tensor:
    """What queries [B, H, W] gather, a row at a time from its prompt and its own tokens put together."""
    found = []
    for i, (slot, length, prompt, prompt_length) in enumerate(zip(*(x.tolist() for x in rows))):
        parts = [prompts[:, prompt, :, :prompt_length], own[:, slot, :, :length]]
        keys, values = torch.cat(parts, 2).repeat_interleave(query.shape[1] // own.shape[2], 1)
        p = (keys @ query[i][:, :, None] * query.shape[2] ** -0.5).softmax(1)  # [H, length, 1]
        found.append((p * values).sum(1))
    return torch.stack(found)
