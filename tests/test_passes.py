"""pass@k and pass^k beside what they mean: over all ways to choose k of the rollouts."""

import itertools
import math

import pytest

from nanotoolrl.look.passes import pass_all, pass_at, passes


@pytest.mark.parametrize("n, c", [(1, 0), (1, 1), (4, 0), (4, 1), (4, 3), (4, 4), (6, 2)])
def test_over_all_choices(n, c):
    outcomes = [1] * c + [0] * (n - c)
    for k in range(1, n + 1):
        choices = list(itertools.combinations(outcomes, k))
        assert pass_at(n, c, k) == pytest.approx(sum(map(any, choices)) / len(choices))
        assert pass_all(n, c, k) == pytest.approx(sum(map(all, choices)) / len(choices))


def test_of_tasks():
    """Of six rollouts: k in powers of two, and six; one rollout is success itself."""
    rewards = [0.0, 0.5, 1.0, 1 / 6]
    found = passes(rewards, ["a", "a", "b", "c"], 6)
    assert list(found) == ["pass@1", "pass@2", "pass@4", "pass@6", "pass^2", "pass^4", "pass^6"]
    assert found["pass@1"].share == pytest.approx(sum(rewards) / 4) and found["pass@1"].n == 4
    assert found["pass@6"].share == 0.75 and found["pass^6"].share == 0.25
    assert found["pass^2"].share == pytest.approx((3 / 15 + 1) / 4)
    ats = [share.share for name, share in found.items() if "@" in name]
    assert ats == sorted(ats) and not any(math.isnan(share.low) for share in found.values())
