"""Shares of tasks solved, and their 95 % intervals.

The twins of a task (its index in another category) have goals in common: solving one says something about the
others. So intervals over several categories are clustered by index. Runs of several seeds played the same
tasks: what is said of a method counts the chance of the tasks and that of the seeds.
"""

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

Z = 1.96  # standard errors on each side
# Quantiles of Student's t at 97.5 % for 1 to 9 degrees of freedom.
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


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


def student(values: Sequence[float]) -> tuple[float, float]:
    """(mean, half of its 95 % interval of Student's t); nan for what too few values cannot say."""
    n = len(values)
    if not n:
        return math.nan, math.nan
    middle = sum(values) / n
    if n < 2:
        return middle, math.nan
    spread = sum((value - middle) ** 2 for value in values) / (n - 1)
    return middle, quantile(n - 1) * math.sqrt(spread / n)


def quantile(freedom: int) -> float:
    """That of Student's t at 97.5 %, to three digits: from a table, beyond it by the first terms of its
    expansion about the normal one."""
    if freedom <= len(T):
        return T[freedom - 1]
    first, second = (Z**3 + Z) / 4, (5 * Z**5 + 16 * Z**3 + 3 * Z) / 96
    return Z + first / freedom + second / freedom**2


def by_task(rewards: Sequence[Sequence[float]]) -> list[float]:
    """Each task's mean over the seeds, of rewards [seeds][n tasks]."""
    return [sum(column) / len(column) for column in zip(*rewards, strict=True)]


def half_over_seeds(rewards: Sequence[Sequence[float]]) -> float:
    """Half of the interval of Student's t over the seeds' means; 0 of one seed, which says nothing of it."""
    return 0.0 if len(rewards) < 2 else student([sum(row) / len(row) for row in rewards])[1]


def over_seeds(rewards: Sequence[Sequence[float]], clusters: Sequence[Hashable]) -> Share:
    """Mean of rewards [seeds][n tasks], with an interval for other tasks and other seeds: to each side the
    root of the squares of what `share_of` has for each task's mean, and of `half_over_seeds`. That is on the
    safe side, as the chance of the tasks is in the seeds' means, too."""
    found, half = share_of(by_task(rewards), clusters), half_over_seeds(rewards)
    low, high = (math.hypot(found.share - found.low, half), math.hypot(found.high - found.share, half))
    return found._replace(low=max(0.0, found.share - low), high=min(1.0, found.share + high))


def difference_over_seeds(
    after: Sequence[Sequence[float]], before: Sequence[Sequence[float]], clusters: Sequence[Hashable]
) -> Share:
    """Mean of after - before on the same tasks, each [seeds][n tasks], not the same seeds: the interval of
    `difference`, and of both over seeds, combined as in `over_seeds`. Where no task changed, that of the
    tasks is what as many independent ones, none of which changed, can say."""
    found = difference(by_task(after), by_task(before), clusters)
    tasks = found.high - found.share or wilson(0.0, len(set(clusters)))[1]
    half = math.hypot(tasks, half_over_seeds(after), half_over_seeds(before))
    return found._replace(low=found.share - half, high=found.share + half)


def difference(after: Sequence[float], before: Sequence[float], clusters: Sequence[Hashable]) -> Share:
    """Mean of after - before on the same tasks, with its clustered normal interval."""
    if not after:
        return Share(math.nan, math.nan, math.nan, 0)
    changes = [new - old for new, old in zip(after, before, strict=True)]
    mean, half = sum(changes) / len(changes), Z * clustered_error(changes, clusters)
    return Share(mean, mean - half, mean + half, len(changes))
