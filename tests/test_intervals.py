"""Shares and their intervals, by hand and against simulation."""

import math
import random

import pytest

from nanotoolrl.look.intervals import (
    Share,
    clustered_error,
    difference,
    difference_over_seeds,
    over_seeds,
    quantile,
    share_of,
    student,
    wilson,
)


def test_wilson_interval_by_hand():
    low, high = wilson(0.8, 10)
    assert (round(low, 3), round(high, 3)) == (0.49, 0.943)
    assert wilson(0, 20)[0] == pytest.approx(0, abs=1e-12) and wilson(1, 20)[1] == pytest.approx(1)
    assert all(math.isnan(x) for x in wilson(0, 0))


def test_clustered_error_by_hand():
    """Mean 1/2; the clusters' sums of deviations are 1, -1 and 0."""
    assert clustered_error([1, 1, 0, 0, 1, 0], "aabbcc") == pytest.approx(math.sqrt(3 / 2 * 2) / 6)
    assert math.isnan(clustered_error([1, 0], "aa"))


def test_without_twins_it_is_the_interval_of_independent_tasks():
    rewards = [1.0] * 30 + [0.0] * 70
    found = share_of(rewards, range(100))
    assert found[:1] == (0.3,) and found[1:3] == pytest.approx(wilson(0.3, 100), abs=1e-3)
    assert str(Share(0.3, 0.2, 0.4, 100)) == "30.0 [20.0, 40.0] n=100"


def test_twins_that_agree_are_worth_one_task():
    rewards = [x for x in [1.0] * 30 + [0.0] * 70 for _ in range(4)]
    found = share_of(rewards, [i // 4 for i in range(400)])
    assert found.n == 400 and found[1:3] == pytest.approx(wilson(0.3, 100), abs=1e-3)
    nothing = share_of([0.0] * 8, [i // 4 for i in range(8)])
    assert nothing[:3] == (0.0, *wilson(0.0, 2)), "all alike: a cluster counts as one task"
    assert share_of([], [])[3] == 0 and difference([], [], [])[3] == 0


def test_a_difference_is_paired():
    """The same shares, of the same tasks, then of others."""
    before = [1.0, 0.0] * 50
    assert difference(before, before, range(100))[:3] == (0.0, 0.0, 0.0)
    other = difference(before[::-1], before, range(100))
    assert other.share == 0 and other.low == -other.high == pytest.approx(-1.96 / math.sqrt(99), rel=0.01)
    gain = difference([1.0] * 100, before, range(100))
    assert gain.share == 0.5 and 0.4 < gain.low < gain.high < 0.6


def test_intervals_of_student():
    """Two values: half of the interval is t (12.706) times the standard error, here half the distance."""
    assert student([0.3, 0.5]) == pytest.approx((0.4, 12.706 * 0.1))
    assert student([0.2])[0] == 0.2 and math.isnan(student([0.2])[1])
    assert math.isnan(student([])[0])
    assert [round(quantile(n), 2) for n in (1, 9, 10, 20, 1000)] == [12.71, 2.26, 2.23, 2.09, 1.96]


def test_over_seeds():
    """One seed is that seed; seeds that agree add nothing; those that do not widen the interval as the sum of
    squares says."""
    one, two, tasks = [1.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.0], "aabb"
    assert over_seeds([one], tasks) == share_of(one, tasks) == over_seeds([one, one], tasks)
    alone, both = share_of([0.5, 0.0, 1.0, 0.5], tasks), over_seeds([one, two], tasks)
    assert both.share == 0.5 and (both.low, both.high) == (0.0, 1.0), "two seeds say little"
    many = [[float((i + seed) % 4 == 0) for i in range(40)] for seed in range(5)]
    many[4] = many[3][:36] + [0.0] * 4  # one seed a task fewer
    alone, both = share_of([sum(c) / 5 for c in zip(*many)], range(40)), over_seeds(many, range(40))
    half = student([sum(row) / 40 for row in many])[1]
    assert both.high - both.share == pytest.approx(math.hypot(alone.high - alone.share, half))
    assert both.share - both.low == pytest.approx(math.hypot(alone.share - alone.low, half))


def test_a_difference_over_seeds():
    """Of one seed each it is `difference`; a method beside itself is 0; scattered seeds widen it."""
    before, after = [1.0, 0.0] * 20, [1.0, 1.0] * 10 + [0.0, 0.0] * 10
    assert difference_over_seeds([after], [before], range(40)) == difference(after, before, range(40))
    same = difference_over_seeds([after] * 3, [after] * 3, range(40))
    assert same[:3] == pytest.approx((0, -0.0876, 0.0876), abs=1e-4), "as wilson(0, 40) has it"
    wide = difference_over_seeds([after, [0.0] * 40, after], [before], range(40))
    narrow = difference([2 / 3 * x for x in after], before, range(40))
    half = math.hypot(narrow.high - narrow.share, student([0.5, 0.0, 0.5])[1])
    assert wide.share == narrow.share and wide.high - wide.share == pytest.approx(half)


@pytest.mark.slow
@pytest.mark.parametrize("agree", [0.0, 0.5, 1.0])
def test_the_intervals_cover_the_truth(agree):
    """Drawn 400 times: clusters of four tasks, each a copy of the first with probability `agree`."""
    rng, covered, unclustered = random.Random(0), 0, 0
    for _ in range(400):
        rewards, clusters = [], []
        for cluster in range(60):
            rate = rng.choice([0.1, 0.5])  # some goals are harder
            first = float(rng.random() < rate)
            for _ in range(4):
                clusters.append(cluster)
                rewards.append(first if rng.random() < agree else float(rng.random() < rate))
        found = share_of(rewards, clusters)
        covered += found.low <= 0.3 <= found.high
        low, high = wilson(found.share, found.n)
        unclustered += low <= 0.3 <= high
    assert covered >= 0.92 * 400
    assert unclustered < (0.93 if agree == 0 else 0.85) * 400, "what clustering is for"
