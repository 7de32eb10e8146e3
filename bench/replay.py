"""What the peers of the benchmark, generate and TRL, replay given rollouts with."""

import torch
from torch import Tensor

from nanotoolrl.trajectory import Trajectory


class Replay:
    """A logits processor that leaves one token possible in each row."""

    def __init__(self, wanted: list[list[int]], prompt_width: int, fill: int) -> None:
        longest = max(map(len, wanted)) + 1
        self.table = torch.tensor([ids + [fill] * (longest - len(ids)) for ids in wanted])
        self.prompt_width = prompt_width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        column = self.table[:, input_ids.shape[1] - self.prompt_width, None].to(scores.device)
        return scores.fill_(float("-inf")).scatter_(1, column, 0.0)


def messages_of(row: Trajectory) -> list[list[int]]:
    """The sampled ids of a trajectory, message by message."""
    spoken: list[list[int]] = []
    for t, (token, mask) in enumerate(zip(row.tokens, row.loss_mask)):
        if mask:
            spoken = spoken if row.loss_mask[t - 1] else [*spoken, []]
            spoken[-1].append(token)
    return spoken
