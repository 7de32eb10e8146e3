"""What an objective sees of a micro-batch, and GRPO's own.

Shapes: R rows of a micro-batch, T tokens, D width, N trained tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from nanotoolrl.losses import policy_loss
from nanotoolrl.places import STRUCTURE
from nanotoolrl.run import Run
from nanotoolrl.trajectory import Trajectory


@dataclass(frozen=True)
class Tokens:
    """The N trained tokens of the rows of a micro-batch, as an objective sees them.

    `logprobs` [N] are differentiable. `old` [N] are those they were sampled with, `advantages` [N] those of
    their rows, `row` [N] the index of each token's row.
    """

    run: Run
    rows: list[Trajectory]
    ids: Tensor  # [R, T]
    mask: Tensor  # [R, T]
    hidden: Tensor  # [N, D]
    logprobs: Tensor
    old: Tensor
    advantages: Tensor
    row: Tensor

    @cached_property
    def control(self) -> Tensor:
        """[N], True on control tokens."""
        return torch.isin(self.ids[self.mask], self.run.control)

    @cached_property
    def place(self) -> Tensor:
        """[N], where in its message each stands: an index into PLACES."""
        structure = self.run.structure
        found = [p for row in self.rows for ids, due in row.spoken() for p in structure.places(ids, due)]
        return torch.tensor(found, dtype=torch.long, device=self.row.device)

    @cached_property
    def spared(self) -> Tensor:
        """[N], True on the tokens that `--guard` spares."""
        structure, name = self.run.structure, self.run.config.guard_tokens
        if name != "structure":
            return torch.isin(
                self.ids[self.mask], torch.tensor([*structure.named(name)], device=self.row.device)
            )
        found = [
            c == STRUCTURE for row in self.rows for ids in row.spoken_ids() for c in structure.classes(ids)
        ]
        return torch.tensor(found, device=self.row.device)

    @cached_property
    def reference(self) -> Tensor:
        """Log-probs [N] under the reference."""
        with torch.no_grad():
            temperature = self.run.config.temperature
            return self.run.reference.logprobs(self.ids, self.mask, temperature)[0]

    def of(self, source: str) -> Tensor:
        """[N], True on the tokens of rows from `source`."""
        flags = torch.tensor([row.source == source for row in self.rows], device=self.row.device)
        return flags[self.row]


Objective = Callable[[Run, Tokens], tuple[Tensor, Tensor]]  # -> (loss, whether it was clipped), both [N]


def clipped_objective(run: Run, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """GRPO's objective."""
    config = run.config
    bounds = (config.clip, config.clip_high, config.dual_clip)
    return policy_loss(tokens.logprobs, tokens.old, tokens.advantages, *bounds)


def guarded(tokens: Tokens) -> Tokens:
    """The tokens, those that `--guard` spares with (1 - guard) A where A < 0."""
    guard = tokens.run.config.guard
    if guard == 0:
        return tokens
    kept = torch.where(tokens.spared & (tokens.advantages < 0), 1 - guard, 1.0)
    return replace(tokens, advantages=tokens.advantages * kept)
