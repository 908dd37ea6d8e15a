"""What verdicts promise, and which images are used."""

from pathlib import Path

import pytest

from anomalib_ot.decide.post_processor import ConformalPostProcessor
from anomalib_ot.fitting.handed_over import Look, Verdicts
from anomalib_ot.host.calibration import FOLDS, HELD_OUT, CalibrationScores
from anomalib_ot.inspection import Finding, Inspection

PATHS = [Path(f"{index}.png") for index in range(4)]


def calibrated(rate, source=FOLDS):
    processor = ConformalPostProcessor(rate)
    processor.calibrate(CalibrationScores((0.2, 0.9, 0.1, 0.2), (), source))
    return processor


def test_the_least_certain_images_come_first_with_the_share_that_scores_as_high():
    verdicts = Verdicts.of(calibrated(0.3), PATHS)
    assert verdicts.p_values == [(PATHS[1], 0.25), (PATHS[0], 0.75), (PATHS[3], 0.75), (PATHS[2], 1.0)]
    assert (verdicts.asked, verdicts.supported, verdicts.count) == (0.3, 0.3, 4)


def test_scores_of_other_images_are_not_ascribed_to_those_of_the_training():
    verdicts = Verdicts.of(calibrated(0.01, HELD_OUT), PATHS)
    assert verdicts.p_values == []
    assert verdicts.supported == pytest.approx(1 / 5)
    assert verdicts.source == HELD_OUT


def test_what_is_dropped_is_not_used():
    inspection = Inspection(PATHS, [Finding(Path("x.png"), "blank", "It is white."), Finding(PATHS[0], "size", "Big.")])
    look = Look(inspection, [], [PATHS[2]], [PATHS])
    assert look.used == [PATHS[0], PATHS[1], PATHS[3]]
    assert look.left_out == 2
