"""What the control tokens are doing, measured on a frozen set of ground-truth conversations."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nanotoolrl.chat import control_tokens
from nanotoolrl.env import Task
from nanotoolrl.logprob import token_logprob
from nanotoolrl.model import Policy, pad
from nanotoolrl.sampler import demonstration

ROWS_AT_ONCE = 512  # probe positions whose whole distributions exist at a time
SPURIOUS_FLOOR = 1e-6


class ProbeSet:
    """Ground-truth conversations, what the assistant writes in them, and the model to compare with.

    Keeps the start's hidden states [N, D] and a copy of its head [V, D]. "Control" positions are those whose
    next token is a control token. The first position of a message, where calling and answering can both be
    honest, is left out of the spurious probabilities.
    """

    def __init__(self, policy: Policy, tasks: Sequence[Task], format: str) -> None:
        self.control = control_tokens(policy.chat, format)
        self.control_ids = torch.tensor(list(self.control.values()), device=policy.device)  # [C]
        rows = [demonstration(policy.chat, task, format) for task in tasks]
        self.ids, self.mask = pad([(row.tokens, row.loss_mask) for row in rows], policy.device)
        first = self.mask & ~self.mask.roll(1, 1)  # a message begins where the assistant takes over
        self.first = first[self.mask]  # [N]
        self.targets = self.ids[self.mask]  # [N]
        with torch.inference_mode():
            self.start_hidden, self.start_head = self._hidden(policy), policy.head.detach().clone()
            self.start_spurious = self._measure(policy)[1]

    def _hidden(self, policy: Policy) -> Tensor:
        return torch.cat(
            [policy.hidden(i[None])[:, :-1][m[None, 1:]] for i, m in zip(self.ids, self.mask, strict=True)]
        )  # [N, D]

    def _measure(self, policy: Policy) -> tuple[dict[str, float], dict[str, float]]:
        hidden = self._hidden(policy)
        logprobs = token_logprob(hidden, policy.head, self.targets)[0]  # [N]
        head = policy.head[self.control_ids].float()
        target_logits = (hidden.float() * policy.head[self.targets].float()).sum(1)
        normaliser = target_logits - logprobs  # log-sum-exp of each row
        p = (hidden.float() @ head.T - normaliser[:, None]).exp()  # [N, C]
        is_next = self.targets[:, None] == self.control_ids  # [N, C]
        wrong = ~is_next & ~self.first[:, None]
        spurious = (p * wrong).sum(0) / wrong.sum(0)  # [C]
        required = (p * is_next).sum(0) / is_next.sum(0)  # [C], nan where a token is never next
        control = is_next.any(1)
        kl = [
            _kl(hidden[i], policy.head, self.start_hidden[i], self.start_head) for i in _chunks(len(hidden))
        ]
        columns = {
            "kl": sum(kl) / len(hidden),
            "spurious_control": spurious.mean().item(),
            "required_control": required.nanmean().item(),
            "nll_control": -logprobs[control].mean().item(),
            "nll_content": -logprobs[~control].mean().item(),
        }
        return columns, dict(zip(self.control, spurious.tolist(), strict=True))

    @torch.inference_mode()
    def measure(self, policy: Policy) -> tuple[dict[str, float], str]:
        """(metrics columns, the control token that spurious_growth belongs to).

        Columns: kl, mean KL(policy || start) in nats over the assistant's positions; spurious_control and
        required_control, mean probability over control tokens where they are not, and are, the next token;
        nll_control and nll_content, mean negative log-likelihood in nats; spurious_growth, the largest ratio
        of a control token's spurious probability (at least 1e-6) to that at the start.
        """
        columns, spurious = self._measure(policy)
        growth = {
            token: max(p, SPURIOUS_FLOOR) / max(self.start_spurious[token], SPURIOUS_FLOOR)
            for token, p in spurious.items()
        }
        worst = max(growth, key=growth.get)
        return columns | {"spurious_growth": growth[worst]}, worst


def _chunks(n: int) -> list[slice]:
    return [slice(i, i + ROWS_AT_ONCE) for i in range(0, n, ROWS_AT_ONCE)]


def _kl(hidden: Tensor, head: Tensor, other_hidden: Tensor, other_head: Tensor) -> float:
    """Sum over rows of KL between two models' next-token distributions."""
    logp = torch.log_softmax(hidden.float() @ head.float().T, -1)
    logq = torch.log_softmax(other_hidden.float() @ other_head.float().T, -1)
    return (logp.exp() * (logp - logq)).sum().item()
