"""What a threshold promises, and which images are behind it."""

import json
from pathlib import Path

import pytest

from anomalib_ot.decide.post_processor import ConformalPostProcessor
from anomalib_ot.fitting.calibration import Calibration
from anomalib_ot.host.calibration import FOLDS, HELD_OUT, CalibrationScores

PATHS = [Path(f"{index}.png") for index in range(4)]


def calibrated(rate, source=FOLDS):
    processor = ConformalPostProcessor(rate)
    processor.calibrate(CalibrationScores((0.2, 0.9, 0.1, 0.2), (), source))
    return processor


def test_the_least_certain_images_come_first_with_the_share_that_scores_as_high():
    calibration = Calibration.of(calibrated(0.3), PATHS)
    assert calibration.p_values == [(PATHS[1], 0.25), (PATHS[0], 0.75), (PATHS[3], 0.75), (PATHS[2], 1.0)]
    promise = calibration.promise
    assert (promise.false_alarm_rate, promise.supported_rate, promise.calibration_images) == (0.3, 0.3, 4)
    assert Calibration.from_plain(json.loads(json.dumps(calibration.plain))) == calibration


def test_scores_of_other_images_are_not_ascribed_to_those_of_the_training():
    calibration = Calibration.of(calibrated(0.01, HELD_OUT), PATHS)
    assert calibration.p_values == []
    assert calibration.promise.supported_rate == pytest.approx(1 / 5)
    assert calibration.promise.calibration_source == HELD_OUT
