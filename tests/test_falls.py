"""Falls and onsets: rules, by hand."""

import math

from nanotoolrl.look.falls import fall_of, means, onset_interval, onset_of, worth_keeping


def test_a_fall_is_below_a_quarter_of_the_best():
    success = [0.3, 0.5, 0.3, 0.1, 0.1, 0.0]
    assert means(success)[:2] == [0.4, 0.4]
    assert fall_of(success) == 6, "0.05 < 0.1; 0.1 at step 5 is not below"
    assert fall_of(success[:5]) is None
    assert fall_of([0.02, 0.02, 0.0, 0.0]) is None, "nothing to fall from"
    assert fall_of([]) is None and fall_of([0.5]) is None


def test_what_is_worth_keeping():
    success = [0.3, 0.5, 0.3, 0.1, 0.1, 0.0, 0.0]
    kept = [worth_keeping(success[: n + 1]) for n in range(len(success))]
    assert kept == ["before-fall"] * 3 + ["", "", "fall", ""]
    assert worth_keeping([0.5, 0.5, 0.0]) == "", "the mean of two steps is half of the best, the step is not"
    assert worth_keeping([0.4]) == "before-fall"


def test_an_onset_holds_for_good():
    steps = [0, 1, 2, 3, 4, 5]
    assert onset_of(steps, [0.1, 0.2, 0.1, 0.1, 0.2, 0.3]) == 4
    assert onset_of(steps, [0.1] * 6) is None
    assert onset_of(steps, [0.1, 0.2, 0.2, 0.2, 0.2, math.nan]) is None
    assert onset_of(steps, [0.3, 0.2, 0.1, 0.1, 0.1, 0.1]) is None, "a fall is no onset"
    assert onset_interval(steps, [0.1, 0.13, 0.16, 0.19, 0.22, 0.25]) == (1, 4)
