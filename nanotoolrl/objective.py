"""What an objective sees of a micro-batch, and GRPO's own.

Shapes: R rows of a micro-batch, T tokens, D width, N trained tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from nanotoolrl.losses import cispo_loss, gspo_loss, policy_loss
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
    conflict: Tensor | None = None  # [N], see `weights.conflicts`
    unweighed: Tensor | None = (
        None  # [N], advantages before `weights.token_weights`, where these were applied
    )

    @property
    def own_advantages(self) -> Tensor:
        """[N], the advantages of their rows, whatever a token weighs: a weight of 0 says nothing of a row."""
        return self.advantages if self.unweighed is None else self.unweighed

    @cached_property
    def message(self) -> Tensor:
        """[N], the index of each token's message among all of the micro-batch."""
        lengths = [len(ids) for row in self.rows for ids in row.spoken_ids()]
        index = torch.arange(len(lengths), device=self.row.device)
        return index.repeat_interleave(torch.tensor(lengths, device=self.row.device))

    @cached_property
    def passed(self) -> Tensor:
        """[N], True on the tokens of turns before the first one that failed; of a row whose turns all passed,
        on all of them."""
        found = []
        for row in self.rows:
            failed = next((i for i, verdict in enumerate(row.verdicts) if not verdict.passed), row.turns)
            for i, ids in enumerate(row.spoken_ids()):
                found += [i < len(row.turn_of) and row.turn_of[i] < failed] * len(ids)
        return torch.tensor(found, dtype=torch.bool, device=self.row.device)

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
        return self.run.reference_logprobs(self.ids, self.mask)

    @cached_property
    def cut(self) -> Tensor:
        """[N], True on the tokens of rows that a limit ended."""
        return torch.tensor([row.cut for row in self.rows], device=self.row.device)[self.row]

    def of(self, source: str) -> Tensor:
        """[N], True on the tokens of rows from `source`."""
        flags = torch.tensor([row.source == source for row in self.rows], device=self.row.device)
        return flags[self.row]


Objective = Callable[[Run, Tokens], tuple[Tensor, Tensor]]  # -> (loss, whether it was clipped), both [N]


def clipped_objective(run: Run, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """GRPO's objective, or the one that `--loss` names."""
    config = run.config
    given = tokens.logprobs, tokens.old, tokens.advantages
    if config.loss == "cispo":
        return cispo_loss(*given, config.clip_high)
    if config.loss == "gspo":
        return gspo_loss(*given, tokens.row, config.clip, config.clip_high)
    return policy_loss(*given, config.clip, config.clip_high, config.dual_clip)
