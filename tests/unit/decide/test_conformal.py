"""Thresholds, p-values and what they promise."""

import subprocess
import sys
import warnings

import numpy as np
import pytest
from scipy.stats import binomtest

from anomalib_ot.decide.conformal import (
    ConformalScale,
    UnsupportedRateWarning,
    benjamini_hochberg,
    calibration_scores,
    images_for,
    p_values,
    supported_rate,
    threshold,
    unit_of,
    why_unsupported,
)


@pytest.mark.parametrize("count", [4, 19, 20, 99, 100, 137])
@pytest.mark.parametrize("rate", [0.01, 0.05, 0.07, 0.2, 0.29, 0.9])
def test_a_score_is_above_the_threshold_if_and_only_if_its_p_value_is_at_most_the_rate(count, rate):
    generator = np.random.default_rng(count)
    known = generator.random(count)
    scores = np.concatenate([generator.random(500), known])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnsupportedRateWarning)
        limit = threshold(known, rate)
    used = max(rate, supported_rate(count))
    assert np.array_equal(scores > limit, p_values(scores, known) <= used + 1e-12)


@pytest.mark.parametrize(("count", "rate"), [(19, 0.05), (50, 0.1), (10, 0.2)])
def test_good_images_are_flagged_at_the_promised_rate(count, rate):
    generator = np.random.default_rng(0)
    draws = 4000
    flagged = 0
    for _ in range(draws):
        *known, new = generator.gamma(2, size=count + 1)
        flagged += new > threshold(known, rate)
    exact = np.floor(rate * (count + 1) + 1e-9) / (count + 1)
    assert exact <= rate
    interval = binomtest(int(flagged), draws).proportion_ci(0.999)
    assert interval.low <= exact <= interval.high


def test_ties_make_no_more_false_alarms():
    known = [0.0] * 15 + [1.0] * 5
    assert threshold(known, 0.1) == 1.0
    assert threshold(known, 0.5) == 0.0
    assert p_values([0.0, 1.0, 2.0], known).tolist() == [1.0, 6 / 21, 1 / 21]


def test_the_threshold_is_a_rank_as_written():
    known = np.random.default_rng(0).permutation(np.arange(1.0, 100.0))
    assert [threshold(known, rate) for rate in (0.01, 0.02, 0.05, 0.5)] == [99, 98, 95, 50]


def test_too_few_images_give_what_they_support_and_say_so():
    with pytest.warns(UnsupportedRateWarning, match=r"rate of 0\.01 was asked for.*10 good images.*0\.091.* 99 good"):
        assert threshold(range(10), 0.01) == 9
    assert why_unsupported(99, 0.01) is None
    assert why_unsupported(98, 0.01) is not None
    assert [images_for(rate) for rate in (0.01, 0.05, 0.1, 0.3)] == [99, 19, 9, 3]


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([1.0], "at least 2 good images, got 1; hold out more"),
        ([], "at least 2 good images, got 0"),
        ([1.0, float("nan"), 2.0], "1 of 3 scores of good images are NaN or infinite"),
        ([1.0, float("inf")], "1 of 2 scores"),
        ([0.3, 0.3, 0.3], "all 3 scores of good images are 0.3"),
    ],
)
def test_scores_that_say_nothing_are_refused(scores, message):
    for call in (calibration_scores, unit_of, lambda known: threshold(known, 0.1), lambda known: p_values(0, known)):
        with pytest.raises(ValueError, match=message):
            call(scores)


@pytest.mark.parametrize("rate", [0, 1, -0.1, 5, float("nan")])
def test_a_rate_out_of_its_range_is_refused(rate):
    with pytest.raises(ValueError, match=r"false_alarm_rate must be between 0 and 1, such as 0\.01 for 1 %"):
        threshold(range(5), rate)
    with pytest.raises(ValueError, match="false_discovery_rate must be between 0 and 1"):
        benjamini_hochberg([0.5], rate)


def test_a_score_that_is_no_number_has_no_p_value():
    with pytest.raises(ValueError, match="a score is NaN, which is neither normal nor anomalous"):
        p_values([1, float("nan")], [1, 2])


def test_benjamini_hochberg_is_the_step_up_procedure():
    generator = np.random.default_rng(0)
    for _ in range(20):
        values = np.concatenate([generator.random(12), generator.random(8) / 50])
        order = np.sort(values)
        below = np.flatnonzero(order <= 0.1 * np.arange(1, 21) / 20)
        limit = order[below[-1]] if len(below) else -1
        assert np.array_equal(benjamini_hochberg(values, 0.1), values <= limit)
    assert benjamini_hochberg([], 0.1).shape == (0,)


def test_a_discovery_exactly_at_the_limit_counts():
    # 0.1 · 3 / 10 · 10 / 3 rounds to more than 0.1.
    assert benjamini_hochberg([0.1 * 3 / 10] * 3 + [0.9] * 7, 0.1).tolist() == [True] * 3 + [False] * 7


def test_shown_scores_keep_the_order_and_are_inverted():
    scale = ConformalScale(2.5, 0.4)
    raw = np.linspace(-30, 300, 4001)
    shown = scale.shown(raw)
    assert (np.diff(shown) > 0).all()
    assert ((shown > 0) & (shown < 1)).all()
    assert np.array_equal(shown > 0.5, raw > 2.5)
    np.testing.assert_allclose(scale.raw(shown), raw, rtol=1e-10, atol=1e-10)
    assert scale.shown(2.9) == pytest.approx(0.75)
    assert [scale.shown(score) for score in (-float("inf"), float("inf"))] == [0, 1]


def test_the_unit_is_the_distance_of_the_highest_score_from_the_median():
    assert unit_of([0.0, 1.0, 4.0]) == 3.0
    assert unit_of([0.0, 4.0, 4.0]) == 4.0


def test_an_edge_device_needs_neither_torch_nor_anomalib():
    code = (
        "import sys; from anomalib_ot.decide import Decision, p_values; p_values([1], [1, 2]);"
        "print(sorted({'torch', 'anomalib', 'lightning', 'scipy'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
