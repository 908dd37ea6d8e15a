"""Tests of the promised and realised false alarms of a run."""

import numpy as np
import pytest
import torch

from anomalib_ot.comparison.verdicts import Verdicts
from anomalib_ot.decide.post_processor import ConformalPostProcessor
from anomalib_ot.host.calibration import FOLDS, HELD_OUT, TRAINED, CalibrationScores

RAW = torch.tensor([1.0, 20.0, 17.5, 30.0, 16.0, 18.5])
LABELS = np.array([0, 0, 0, 1, 1, 1])
IMAGES = list("abcdef")


def processor(source=HELD_OUT, **settings):
    made = ConformalPostProcessor(**settings)
    made.calibrate(CalibrationScores(tuple(map(float, range(19))), (), source))
    return made


def verdicts(made, validated=()):
    return Verdicts.of(made, RAW, LABELS, IMAGES, validated)


def test_images_above_the_threshold_are_counted():
    # The second highest of the scores 0 to 18 promises 10 %.
    expected = Verdicts(0.1, 0.1, 19, HELD_OUT, 2, 3, 2, 3, calibrated_on_test=False)
    assert verdicts(processor(false_alarm_rate=0.1)) == expected


def test_too_few_images_for_the_rate_promise_what_they_support():
    # The highest score is the threshold.
    expected = Verdicts(0.01, 0.05, 19, HELD_OUT, 1, 3, 2, 3, calibrated_on_test=False)
    assert verdicts(processor(false_alarm_rate=0.01)) == expected


@pytest.mark.parametrize(
    ("source", "validated", "expected"),
    [(HELD_OUT, {"x"}, False), (HELD_OUT, {"x", "b"}, True), (TRAINED, {"b"}, True), (FOLDS, {"b"}, False)],
)
def test_calibration_on_test_images_is_noted(source, validated, expected):
    assert verdicts(processor(source), validated).calibrated_on_test is expected


@pytest.mark.parametrize("made", [ConformalPostProcessor(), processor(enable_thresholding=False), None])
def test_no_promise_has_no_verdicts(made):
    assert verdicts(made) is None


@pytest.mark.parametrize(
    ("count", "message"), [({"false_alarms": 4}, "from 0 to 3"), ({"good_images": 0}, "good_images must be at least 1")]
)
def test_impossible_counts_are_refused(count, message):
    counts = {"false_alarms": 0, "good_images": 3, "detected": 0, "anomalous_images": 3, **count}
    with pytest.raises(ValueError, match=message):
        Verdicts(0.1, 0.1, 19, HELD_OUT, calibrated_on_test=False, **counts)
