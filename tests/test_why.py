"""The formulas of docs/why.md, against the gradient of the loss over everything that can be sampled."""

import pytest
import torch

from nanotoolrl.config import Config
from nanotoolrl.objective import Tokens, clipped_objective
from nanotoolrl.places import PLACES
from nanotoolrl.probes import placed_gradient
from nanotoolrl.weights import weighed

P = torch.tensor([0.5, 0.2, 0.2, 0.1], dtype=torch.double)  # of four tokens at one place


class Spared(Tokens):
    """Tokens of which the ids 0 and 3 are spared."""

    @property
    def spared(self):
        return torch.isin(self.ids[self.mask], torch.tensor([0, 3]))


def expected_push(good, guard=0.0):
    """The expected push on each logit: every token x with A = 1, with probability good[x], or A = -1, times
    its probability, through the objective as it is trained."""
    ids = torch.arange(4).repeat_interleave(2)  # [N]: each token once with a good and once with a bad end
    advantages = torch.tensor([1.0, -1.0], dtype=torch.double).repeat(4)
    chance = P[ids] * torch.stack([good, 1 - good], 1).flatten()
    run = type("Run", (), {"config": Config(guard=guard)})()
    logprobs = P.log()[ids].requires_grad_()
    mask = torch.ones(1, 8, dtype=torch.bool)
    row = torch.zeros(8, dtype=torch.long)
    tokens = Spared(run, [], ids[None], mask, torch.zeros(0), logprobs, logprobs.detach(), advantages, row)
    losses, _ = clipped_objective(run, weighed(tokens))
    (push,) = torch.autograd.grad(-(chance * losses).sum(), logprobs)
    found = placed_gradient(push, ids, P.expand(8, 4), torch.arange(4), row)
    assert found.shape == (len(PLACES), 2, 4) and not found[1:].any()
    return found.sum((0, 1))


def test_on_policy_the_push_is_a_covariance():
    good = torch.tensor([0.1, 0.3, 0.2, 0.9], dtype=torch.double)
    advantage = 2 * good - 1  # its mean where x was sampled
    covariance = P * advantage - P * (P * advantage).sum()
    torch.testing.assert_close(expected_push(good), covariance)
    same = expected_push(torch.full((4,), 0.1, dtype=torch.double))
    torch.testing.assert_close(same, torch.zeros(4, dtype=torch.double), atol=1e-9, rtol=0)


@pytest.mark.parametrize("guard", [0.0, 0.25, 1.0])
def test_the_rest_that_a_guard_leaves(guard):
    """g a p_k (1 - p_S) on spared tokens, and as much in sum down on the others."""
    push = expected_push(torch.full((4,), 0.1, dtype=torch.double), guard)
    share, a = P[[0, 3]].sum(), 0.9  # a: the mean of -min(A, 0)
    for k in (0, 3):
        assert push[k].item() == pytest.approx((guard * a * P[k] * (1 - share)).item(), abs=1e-9)
    assert push.sum().item() == pytest.approx(0, abs=1e-9) and (guard == 0 or push[1] < 0 > push[2])
