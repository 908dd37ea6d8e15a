"""Detection curves of scores with known results."""

import pytest
import torch

from anomalib_ot.selection import Detected, detection_curve
from anomalib_ot.selection.detection import detected_shares
from anomalib_ot.synthetic import AREAS, CONTRASTS, KINDS


def test_larger_defects_are_detected_by_a_score_that_counts_their_pixels(paths):
    def changed(image):
        assert image.shape == (3, 72, 72)
        # Stains are drawn in one colour, and the disc and its background are between these levels.
        return ((image > 0.9) | (image < 0.2)).any(0).float().mean()

    rows = detection_curve(changed, 0.01, paths, images=4, kinds=["scratch"], areas=[0.004, 0.06], contrasts=[1.0])
    assert rows == [Detected("scratch", 0.004, 1.0, 0.0, 4), Detected("scratch", 0.06, 1.0, 1.0, 4)]


def test_the_maximum_of_a_map_is_its_score(paths):
    rows = detection_curve(lambda _: torch.eye(4)[None], 0.5, paths, images=1)
    assert len(rows) == len(KINDS) * len(AREAS) * len(CONTRASTS)
    assert all(row.share == row.count == 1 for row in rows)


def test_shares_are_of_all_kinds():
    labels = [("blur", 0.1, 1.0), ("stain", 0.1, 1.0), ("blur", 0.1, 0.5)]
    assert detected_shares(labels, [True, False, True]) == [
        Detected(None, 0.1, 0.5, 1.0, 1),
        Detected(None, 0.1, 1.0, 0.5, 2),
    ]


def test_no_images_are_refused():
    with pytest.raises(ValueError, match="paths must be at least one good image"):
        detection_curve(lambda _: 0.0, 0.5, [])
