"""Given rollouts, played again token by token: what makes timings of different samplers comparable."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nanotoolrl.decode import Decoder
from nanotoolrl.logprob import HAS_TRITON
from nanotoolrl.model import Policy
from nanotoolrl.sampler import Sampler
from nanotoolrl.trajectory import Trajectory

FREE = -1  # in place of a given id: sample
INDEX = 2**32 - 1  # bits of a noise stream that are the episode's index


class ReplayDecoder(Decoder):
    """Samples what `table` [rows, places] says, with the policy's log-probs; where that is FREE, or ends, it
    samples as ever."""

    def __init__(self, policy: Policy, table: Tensor, seed: int = 0, fast: bool | None = None) -> None:
        super().__init__(policy, seed, policy.device.type == "cuda" and HAS_TRITON if fast is None else fast)
        free = table.new_full((len(table), 1), FREE)
        self.table = torch.cat([table, free], 1).to(policy.device)
        self.wanted = self.table[:, -1]

    def choose(
        self, hidden: Tensor, streams: Tensor, places: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        self.wanted = self.table[streams & INDEX, places.clamp(max=self.table.shape[1] - 1)]  # [B]
        return super().choose(hidden, streams, places, temperature)

    def draw(self, logits: Tensor, noise: Tensor | None, temperature: float) -> tuple[Tensor, Tensor]:
        if logits.is_cuda and HAS_TRITON:
            from nanotoolrl.gpu.kernels import pick  # needs Triton

            return pick(logits, noise, self.wanted, temperature)
        ids, _ = super().draw(logits, noise, temperature)
        ids = torch.where(self.wanted == FREE, ids, self.wanted)
        return ids, torch.log_softmax(logits / temperature, -1).gather(1, ids[:, None])[:, 0]


class ReplaySampler(Sampler):
    """A sampler whose rollouts are given: `rows`, in the order of the episodes."""

    def __init__(self, policy: Policy, rows: Sequence[Trajectory], **settings: Any) -> None:
        super().__init__(policy, **settings)
        longest = max(len(row.tokens) for row in rows)
        table = torch.full((len(rows), longest), FREE)
        for i, row in enumerate(rows):
            mask = torch.tensor(row.loss_mask)
            table[i, : len(mask)][mask] = torch.tensor(row.tokens)[mask]
        self.decoder = ReplayDecoder(policy, table, self.decoder.seed, self.decoder.graphs is not None)


class ReplayProcessor:
    """A logits processor for transformers' generate that leaves one token possible in each row."""

    def __init__(self, wanted: list[list[int]], prompt_width: int, fill: int) -> None:
        longest = max(map(len, wanted)) + 1
        self.table = torch.tensor([ids + [fill] * (longest - len(ids)) for ids in wanted])
        self.prompt_width = prompt_width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        column = self.table[:, input_ids.shape[1] - self.prompt_width, None].to(scores.device)
        return scores.fill_(float("-inf")).scatter_(1, column, 0.0)
