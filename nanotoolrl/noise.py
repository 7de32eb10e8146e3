"""The noise of sampling: a random number for every token of every row, from its key alone."""

import torch
from torch import Tensor


def uniform(seed: int, streams: Tensor, places: Tensor) -> Tensor:
    """Random numbers in [0, 1), fp64, one per (seed, stream, place): a counter-based generator (splitmix64),
    so that a sequence's noise depends on nothing but its own key. int64 arithmetic wraps, as it should."""
    step, first, second = (_signed(x) for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))

    def shifted(x: Tensor, bits: int) -> Tensor:
        return (x >> bits) & ((1 << (64 - bits)) - 1)  # zeros come in from the left

    def mix(x: Tensor) -> Tensor:
        x = (x ^ shifted(x, 30)) * first
        x = (x ^ shifted(x, 27)) * second
        return x ^ shifted(x, 31)

    key = mix(torch.full_like(streams, _signed(seed)) * step + step)
    key = mix((key ^ streams) * step + step)
    key = mix((key ^ places) * step + step)
    return shifted(key, 11).double() / 2.0**53


def _signed(x: int) -> int:
    """The int64 with the same bits as x modulo 2^64."""
    return (x + 2**63) % 2**64 - 2**63
