"""The decode step's attention on a CPU. gpu/kernels.py has that of a GPU, cache.py asks for one of them.

Shapes: B rows, H query heads, K key-value heads, R = H / K, W width of a head, P and S tokens of the longest
prompt and of the longest row after it.
"""

import math

import torch
from torch import Tensor

from nanotoolrl.attention import Rows


class Together:
    """Attention of a decode step on a CPU, for all rows at once: a few large products in place of many small.

    The queries of rows that share a prompt are put side by side, so that its keys and values are read once.
    Rows' own tokens are read where they are, up to the longest; what lies behind a row's end is masked. An
    example of three rows in slots 0 to 2, the first two of one prompt of P tokens, each with at most S more:

        prompt   seats               scores of prompts   own scores     softmax over both
        0        query 0, query 1    [2, K, 2, P]        [3, K, 1, S]   [3, K, 1, P + S]
        1        query 2, empty
    """

    def __init__(self, kv_heads: int, dtype: torch.dtype, rows: Rows) -> None:
        slots, lengths, prompts, prompt_lengths = rows
        B, self.K, device = len(slots), kv_heads, slots.device
        self.live, self.S, self.P = (int(x.max()) for x in (slots + 1, lengths, prompt_lengths))
        self.slots = self.by_slot = None
        if self.live > B:  # rows that wait have slots between these
            self.slots, self.by_slot = slots, torch.zeros(self.live, dtype=torch.long, device=device)
            self.by_slot[slots] = torch.arange(B, device=device)
        self.own_mask = self._mask(picked(lengths, self.by_slot), self.S, dtype)
        if self.P:
            count = torch.bincount(prompts)  # rows of each prompt
            order = prompts.argsort(stable=True)
            place = torch.arange(B, device=device) - (count.cumsum(0) - count)[prompts[order]]
            self.prompts, self.seats = len(count), int(count.max())
            self.seat = torch.empty_like(prompts).index_copy_(0, order, place) + prompts * self.seats
            self.seated = torch.zeros(self.prompts * self.seats, dtype=torch.long, device=device)
            self.seated[self.seat] = torch.arange(B, device=device)
            known = torch.zeros_like(count).index_copy_(0, prompts, prompt_lengths)
            self.prompt_mask = self._mask(known, self.P, dtype)

    def _mask(self, lengths: Tensor, widest: int, dtype: torch.dtype) -> Tensor:
        """[places K, 1, widest], -inf behind the lengths [places]."""
        behind = torch.arange(widest, device=lengths.device) >= lengths[:, None]
        mask = torch.zeros_like(behind, dtype=dtype).masked_fill_(behind, -math.inf)
        return mask.repeat_interleave(self.K, 0)[:, None]

    def __call__(self, query: Tensor, prompts: Tensor, own: Tensor) -> Tensor:
        """What queries [B, H, W] gather from keys and values, both [2, places, K, capacity, W]."""
        (B, H, W), K = query.shape, own.shape[2]
        query = query.view(B, K, -1, W)  # query heads that share keys are queries of one head
        keys, values = own[:, : self.live, :, : self.S].flatten(1, 2)  # [live K, S, W], views
        z = self._scores(picked(query, self.by_slot).flatten(0, 1), keys, self.own_mask)
        z = picked(z.view(self.live, K, -1, self.S), self.slots)  # [B, K, R, S]
        if self.P:
            of_prompt = prompts[:, : self.prompts, :, : self.P].flatten(1, 2)  # [2, prompts K, P, W]
            first = self._scores(self._seated(query), of_prompt[0], self.prompt_mask)
            z = torch.cat([self._stood_up(first), z], -1)  # [B, K, R, P + S]
        p = z.softmax(-1)
        found = torch.bmm(picked(p[..., self.P :], self.by_slot).flatten(0, 1), values)
        found = picked(found.view(self.live, K, -1, W), self.slots)  # [B, K, R, W]
        if self.P:
            found = found + self._stood_up(torch.bmm(self._seated(p[..., : self.P]), of_prompt[1]))
        return found.view(B, H, W)

    def _scores(self, query: Tensor, keys: Tensor, mask: Tensor) -> Tensor:
        """Scores [places K, n, width] of queries [places K, n, W] for keys [places K, width, W]."""
        return torch.baddbmm(mask, query, keys.mT, alpha=query.shape[-1] ** -0.5)

    def _seated(self, x: Tensor) -> Tensor:
        """x [B, K, R, n] with the rows of a prompt side by side: [prompts K, seats R, n]."""
        K, R, n = x.shape[1:]
        seats = x.index_select(0, self.seated).view(self.prompts, self.seats, K, R, n)
        return seats.transpose(1, 2).reshape(self.prompts * K, -1, n)

    def _stood_up(self, x: Tensor) -> Tensor:
        """x [prompts K, seats R, n], row by row again: [B, K, R, n]."""
        x = x.view(self.prompts, self.K, self.seats, -1, x.shape[-1]).transpose(1, 2)
        return x.flatten(0, 1).index_select(0, self.seat)


def picked(x: Tensor, index: Tensor | None) -> Tensor:
    """What x has at the index; all of it without one."""
    return x if index is None else x.index_select(0, index)
