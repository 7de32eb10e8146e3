"""When a run falls, and what went first: both from what it logged, by rules that were fixed before looking.

The fall is one of sampled success. An onset is a change point of one class of tokens on the probe set.
"""

import math
from collections.abc import Sequence

from nanotoolrl.look.runfiles import RunFiles

WINDOW = 2  # steps over which sampled success is averaged
FELL = 0.25  # a fall is below this share of the best mean so far
WORTH = 0.03  # a best mean below this is nothing to fall from
HEALTHY = 0.5  # share of the best mean down to which a model counts as before the fall
RISE = 0.05  # nats: an onset is a rise by so much above the start, for good


def means(successes: Sequence[float]) -> list[float]:
    """The mean of each step's sampled success and that of the step before it; entry 0 is of step 2."""
    return [sum(successes[i : i + WINDOW]) / WINDOW for i in range(len(successes) - WINDOW + 1)]


def fall_of(successes: Sequence[float]) -> int | None:
    """The step (counted from 1) of the fall: the first at which the mean over two steps is below a quarter
    of the best one before it, if that is at least 3 %. None if there is none."""
    best = 0.0
    for i, value in enumerate(means(successes)):
        if best >= WORTH and value < FELL * best:
            return i + WINDOW
        best = max(best, value)
    return None


def worth_keeping(successes: Sequence[float]) -> str:
    """What the model after the latest step is kept as: "fall" in the step of the fall, "before-fall" where
    there was none yet and success, of the step and as a mean of two, is at least half of its best, else
    nothing."""
    fall = fall_of(successes)
    if fall is not None:
        return "fall" if fall == len(successes) else ""
    found = means(successes)
    healthy = not found or min(found[-1], successes[-1]) >= HEALTHY * max(found)
    return "before-fall" if healthy else ""


def onset_of(steps: Sequence[float], values: Sequence[float], rise: float = RISE) -> float | None:
    """The step of the first value that lies `rise` nats above the start, where all later ones do, too; None
    if there is none.

    The later ones must hold for good: a spike that goes back is no change point. Example: steps 0, 1, 2, 3
    and values 0.1, 0.2, 0.1, 0.2 have the onset 3.
    """
    found = None
    for step, value in zip(steps, values, strict=True):
        if math.isnan(value) or value - values[0] < rise:
            found = None
        elif found is None:
            found = step
    return found


def onset_interval(steps: Sequence[float], values: Sequence[float]) -> tuple[float | None, float | None]:
    """The onsets for half and for double the rise: how much the answer hangs on the threshold."""
    return onset_of(steps, values, RISE / 2), onset_of(steps, values, RISE * 2)


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean of two values or more, and its standard error."""
    middle = sum(values) / len(values)
    spread = sum((value - middle) ** 2 for value in values) / (len(values) - 1)
    return middle, math.sqrt(spread / len(values))


def pushes_up_to(run: RunFiles, last: int | None) -> list[dict[str, dict[str, list[float]]]]:
    """The logged net push (place -> token -> [from good, from bad rollouts]) of each step up to `last`, or of
    all; {} of a step that pushed nothing. None at all where it was not logged."""
    steps, found = run.details("net_push")
    of_step = dict(zip(steps, found))
    kept = [step for step in run.metrics["step"] if step and (last is None or step <= last)]
    return [of_step.get(step, {}) for step in kept] if found else []
