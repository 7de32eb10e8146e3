"""What is noted of a policy update: its metrics, and which way it pushed the control tokens.

Shapes: N trained tokens, C control tokens, L places in a message.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nanotoolrl.gpu import distributed
from nanotoolrl.objective import Tokens
from nanotoolrl.probes import control_probabilities, logit_gradient, placed_gradient
from nanotoolrl.trajectory import Trajectory


@dataclass
class Notes:
    """What is noted of a policy update, summed up by `metrics`.

    Rows that are not the policy's own (hinted, oracle) stay out of `clipped` and `gaps`. Oracle rows also
    stay out of `entropies`.
    """

    started: float = field(default_factory=time.perf_counter)
    tokens: int = 0
    losses: list[float] = field(default_factory=list)
    norms: list[float | None] = field(default_factory=list)  # None: the update was skipped
    clipped: list[bool] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    gradients: Tensor | None = None  # [2, C], see `logit_gradient`
    forces: Tensor | None = None  # [L, 2, C], see `placed_gradient`
    probe_seconds: float = 0.0
    sft_losses: list[float] = field(default_factory=list)
    sft_tokens: int = 0

    @torch.no_grad()
    def take(self, tokens: Tokens, clipped: Tensor, entropy: Tensor | None, first_update: bool) -> None:
        """Note a micro-batch after its backward pass. clipped, entropy: [N]."""
        lengths = [len(row.tokens) for row in tokens.rows]
        own = tokens.of("policy")  # [N]
        self.tokens += sum(lengths)
        self.clipped += clipped[own].tolist()
        if first_update and entropy is not None:
            self.entropies += entropy[~tokens.of("oracle")].tolist()
            self.gaps += (tokens.logprobs - tokens.old).abs()[own].tolist()
        started = time.perf_counter()
        gradients, forces = pushes(tokens)
        self.gradients = gradients if self.gradients is None else self.gradients + gradients
        self.forces = forces if self.forces is None else self.forces + forces
        self.probe_seconds += time.perf_counter() - started

    def take_supervised(self, loss: float, examples: list[Trajectory]) -> None:
        """Note an SFT loss that rode along."""
        if examples:
            self.sft_losses.append(loss)
            self.sft_tokens += sum(row.sampled_tokens for row in examples)
            self.tokens += sum(len(examples[i].tokens) for i in distributed.share(len(examples)))

    def metrics(self) -> dict[str, Any]:
        """Columns of metrics.csv; nan where there is nothing to average."""
        found = distributed.gathered([] if self.gradients is None else [self.gradients.cpu()])
        forces = distributed.gathered([] if self.forces is None else [self.forces.cpu()])
        columns = {
            "loss": mean(self.losses),
            "entropy": mean(distributed.gathered(self.entropies)),
            "grad_norm": mean([norm for norm in self.norms if norm is not None]),
            "clip_fraction": mean(distributed.gathered(self.clipped)),
            "train_tok_s": distributed.total(self.tokens) / (time.perf_counter() - self.started),
            "forward_tokens": distributed.total(self.tokens),
            "logprob_gap": max(distributed.gathered(self.gaps), default=math.nan),
            "logit_gradient": torch.stack(found).sum(0).tolist() if found else None,
            "net_push": torch.stack(forces).sum(0).tolist() if forces else None,
            "probe_seconds": self.probe_seconds,
        }
        sft = {"sft_loss": mean(self.sft_losses), "sft_tokens": self.sft_tokens}
        return columns | (sft if self.sft_losses else {})


def pushes(tokens: Tokens) -> tuple[Tensor, Tensor]:
    """Which way the policy loss of a micro-batch pushes the logits of control tokens, through the log-probs
    (an entropy or SFT term pushes, too, and is not counted): by `logit_gradient` [2, C] and by
    `placed_gradient` [L, 2, C]."""
    run = tokens.run
    ids = tokens.ids[tokens.mask]
    logprobs = tokens.logprobs
    assert logprobs.grad is not None  # after the backward pass
    temperature = run.config.temperature
    p = control_probabilities(
        tokens.hidden, run.policy.head, ids, logprobs, run.control, temperature
    )  # [N, C]
    push = -logprobs.grad / temperature / run.masters.scale
    return logit_gradient(push, ids, p, run.control), placed_gradient(push, ids, p, run.control, tokens.place)


def mean(values: Sequence[float]) -> float:
    """The mean; nan of nothing."""
    return sum(values) / len(values) if values else math.nan
