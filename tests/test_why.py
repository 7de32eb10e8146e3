"""The formulas of docs/why.md, against sums over everything that can be sampled."""

import pytest
import torch


def expected_push(p, good, spared=(), guard=0.0):
    """E[w A (1[x = k] - p_k)] over tokens x and two outcomes: A = 1 with probability good[x], else -1."""
    push = torch.zeros_like(p)
    for x in range(len(p)):
        for advantage, chance in ((1.0, good[x]), (-1.0, 1 - good[x])):
            weight = 1 - guard if advantage < 0 and x in spared else 1.0
            push += p[x] * chance * weight * advantage * (torch.eye(len(p))[x] - p)
    return push


P = torch.tensor([0.5, 0.2, 0.2, 0.1])


def test_on_policy_the_push_is_a_covariance():
    good = torch.tensor([0.1, 0.3, 0.2, 0.9])
    advantage = 2 * good - 1  # its mean where x was sampled
    covariance = P * advantage - P * (P * advantage).sum()
    torch.testing.assert_close(expected_push(P, good), covariance)
    same = expected_push(P, torch.full((4,), 0.1))
    torch.testing.assert_close(same, torch.zeros(4), atol=1e-6, rtol=0), "however bad, nothing coherent"


@pytest.mark.parametrize("guard", [0.0, 0.25, 1.0])
def test_the_rest_that_a_guard_leaves(guard):
    """g a p_k (1 - p_S) on spared tokens, and as much in sum down on the others."""
    good, spared = torch.full((4,), 0.1), (0, 3)
    push = expected_push(P, good, spared, guard)
    share = P[list(spared)].sum()
    bad = 0.9  # E[|A|] over bad rollouts, a place's share of them included
    for k in spared:
        assert push[k].item() == pytest.approx((guard * bad * P[k] * (1 - share)).item(), abs=1e-6)
    assert push.sum().item() == pytest.approx(0, abs=1e-6) and (guard == 0 or push[1] < 0 > push[2])
