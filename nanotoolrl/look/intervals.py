"""Shares of tasks solved, and their 95 % intervals.

The twins of a task (its index in another category) have goals in common: solving one says something about the
others. So intervals over several categories are clustered by index.
"""

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

Z = 1.96  # standard errors on each side


class Share(NamedTuple):
    """A share of n tasks, or the difference of two shares of the same n tasks, and its interval."""

    share: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{100 * self.share:.1f} [{100 * self.low:.1f}, {100 * self.high:.1f}] n={self.n}"


def wilson(share: float, n: float) -> tuple[float, float]:
    """(low, high): the Wilson score interval of a share of n independent tasks; (nan, nan) for n = 0."""
    if n == 0:
        return math.nan, math.nan
    middle = (share + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z * math.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n)) / (1 + Z * Z / n)
    return max(0.0, middle - half), min(1.0, middle + half)


def clustered_error(values: Sequence[float], clusters: Sequence[Hashable]) -> float:
    """Standard error of the mean of values that are independent between clusters only; nan for one cluster.

    sqrt(C / (C - 1) sum_c (sum of cluster c's deviations from the mean)^2) / n, C clusters.
    """
    mean = sum(values) / len(values)
    sums: dict[Hashable, float] = {}
    for value, cluster in zip(values, clusters, strict=True):
        sums[cluster] = sums.get(cluster, 0.0) + value - mean
    count = len(sums)
    if count < 2:
        return math.nan
    return math.sqrt(count / (count - 1) * sum(x * x for x in sums.values())) / len(values)


def share_of(rewards: Sequence[float], clusters: Sequence[Hashable]) -> Share:
    """Mean of rewards in [0, 1] with a Wilson interval for as many independent tasks as these are worth.

    That is share (1 - share) / error^2 with the clustered error, at most n, at least the number of clusters
    where the error is 0.
    """
    n = len(rewards)
    if n == 0:
        return Share(math.nan, math.nan, math.nan, 0)
    share = sum(rewards) / n
    error = clustered_error(rewards, clusters)
    count = len(set(clusters))
    worth = min(n, share * (1 - share) / error**2) if error > 0 else count
    return Share(share, *wilson(share, worth), n)


def over_seeds(rewards: Sequence[Sequence[float]], clusters: Sequence[Hashable]) -> Share:
    """Mean of rewards [seeds][n tasks] with the interval of `share_of` for each task's mean over the seeds:
    tasks are drawn anew, the seeds are not."""
    return share_of([sum(column) / len(column) for column in zip(*rewards, strict=True)], clusters)


def difference(after: Sequence[float], before: Sequence[float], clusters: Sequence[Hashable]) -> Share:
    """Mean of after - before on the same tasks, with its clustered normal interval."""
    if not after:
        return Share(math.nan, math.nan, math.nan, 0)
    changes = [new - old for new, old in zip(after, before, strict=True)]
    mean, half = sum(changes) / len(changes), Z * clustered_error(changes, clusters)
    return Share(mean, mean - half, mean + half, len(changes))
