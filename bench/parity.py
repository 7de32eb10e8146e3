"""How far the sampler's log-probs are from the trainer's."""

from dataclasses import dataclass

import torch
from torch import Tensor

from bench.steps import grouped
from nanotoolrl.env import Episode, Task
from nanotoolrl.model import Policy, pad
from nanotoolrl.sampler import Sampler


@dataclass
class Parity:
    """How far the trainer's log-probs of a sampled token are from the sampler's, over N tokens: 99th
    percentile and maximum of the absolute difference in nats, share of ratios outside [0.9, 1.1]. `itself`:
    the largest difference of the trainer's, 8 rows at a time, from its own, row by row: what no sampler can
    be blamed for."""

    N: int
    p99: float
    largest: float
    outside: float
    itself: float

    def __str__(self) -> str:
        return (
            f"{self.N} sampled tokens: |trainer - sampler| p99 {self.p99:.1e}, max {self.largest:.1e} nats, "
            f"{self.outside:.3%} of the ratios outside [0.9, 1.1];\n"
            f"|trainer - trainer in other micro-batches| max {self.itself:.1e} nats"
        )

    def wrong(self, dtype: torch.dtype) -> bool:
        """Whether rounding in this dtype cannot be the reason: a wrong mask or position is far beyond it."""
        return not (self.largest <= 1e-4 if dtype == torch.float32 else self.outside <= 0.05)


@torch.no_grad()
def check_parity(policy: Policy, tasks: list[Task], group: int = 4, temperature: float = 1.0) -> Parity:
    """Roll out ragged episodes, run them through the trainer's forward, and compare."""
    episodes = [Episode(task) for task in grouped(tasks, group)]
    rows = Sampler(policy).rollout(episodes, temperature=temperature)

    def trained(size: int) -> Tensor:
        parts = [rows[start : start + size] for start in range(0, len(rows), size)]
        batches = [pad([(row.tokens, row.loss_mask) for row in part], policy.device) for part in parts]
        return torch.cat([policy.logprobs(*batch, temperature)[0] for batch in batches]).cpu().double()

    sampled = [x for row in rows for x, flag in zip(row.logprobs, row.loss_mask) if flag]
    together = trained(8)
    gap = together - torch.tensor(sampled, dtype=torch.float64)
    size, outside = gap.abs(), ((gap.exp() - 1).abs() > 0.1).double().mean().item()
    itself = (together - trained(1)).abs().max().item()
    return Parity(len(gap), size.quantile(0.99).item(), size.max().item(), outside, itself)
