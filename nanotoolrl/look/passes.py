"""pass@k and pass^k: whether one of k rollouts of a task solves it, or all of them do.

Both are unbiased, from n rollouts of which c succeed: pass@k = 1 - C(n - c, k) / C(n, k) (Chen et al. 2021,
arXiv 2107.03374), pass^k = C(c, k) / C(n, k) (tau-bench, arXiv 2406.12045). pass@k says what reinforcement
learning could find; pass^k how far a model can be relied upon.
"""

import math
from collections.abc import Hashable, Sequence

from nanotoolrl.look.intervals import Share, share_of


def pass_at(n: int, c: int, k: int) -> float:
    """The probability that of k of the n rollouts, c of which succeed, one does. 1 <= k <= n, 0 <= c <= n."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def pass_all(n: int, c: int, k: int) -> float:
    """The probability that k of the n rollouts, c of which succeed, all do. 1 <= k <= n, 0 <= c <= n."""
    return math.comb(c, k) / math.comb(n, k)


def passes(rewards: Sequence[float], clusters: Sequence[Hashable], samples: int) -> dict[str, Share]:
    """Both, for k = 1, 2, 4, ... and the number of samples, of tasks whose reward is the mean over so many
    rollouts; intervals are clustered. pass^1, which is pass@1, is left out."""
    solved = [round(samples * reward) for reward in rewards]
    ks = sorted({2**i for i in range(samples.bit_length())} | {samples})
    found = {f"pass@{k}": share_of([pass_at(samples, c, k) for c in solved], clusters) for k in ks}
    return found | {
        f"pass^{k}": share_of([pass_all(samples, c, k) for c in solved], clusters) for k in ks[1:]
    }
