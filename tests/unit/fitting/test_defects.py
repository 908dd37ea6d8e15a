"""What the page says of synthetic defects."""

import numpy as np
import pytest
from PIL import Image

from anomalib_ot.fitting.defects import defects_of
from anomalib_ot.selection import Candidate, Detected, Trial
from anomalib_ot.synthetic import KINDS


def trial(*areas):
    detection = tuple(Detected(area, contrast, contrast / 2, 7) for area in areas for contrast in (0.5, 1.0))
    return Trial(Candidate("A", "Duo"), {}, 0.0, 1.0, 1.0, 0.05, detection)


@pytest.mark.parametrize(
    ("size", "areas", "about"),
    [
        ((64, 48), (0.004, 0.016, 0.064), "Defects of 1.6 %"),
        ((12, 9), (0.064,), "Defects of 6.4 %"),
        ((500, 6), (0.004, 0.016, 0.064), "Defects of 1.6 %"),
        # Reduced for the page, it has too few pixels.
        ((500, 2), (0.004, 0.016), None),
        ((4, 4), (), None),
    ],
)
def test_examples_are_drawn_where_there_is_room(tmp_path, size, areas, about):
    random = np.random.default_rng(0)
    Image.fromarray(random.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).save(tmp_path / "image.png")
    made = defects_of(trial(*areas), tmp_path / "image.png", 0)
    assert len(made.examples) == (1 + len(KINDS) if about else 0)
    assert not about or made.about_examples.startswith(about)
    curves = made.chart.curves if made.chart else ()
    assert [curve.label for curve in curves] == (["contrast 1", "contrast 0.5"] if len(areas) > 1 else [])
    assert all(len(row) == 1 + len(areas) for row in made.rows)
    assert made.about.startswith("Shares of the defects" if areas else "The images are too small")


def test_a_curve_rises_with_the_shares(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "image.png")
    made = defects_of(trial(0.016, 0.064), tmp_path / "image.png", 0)
    assert [curve.points for curve in made.chart.curves] == [[(0, 0.5), (1, 0.5)], [(0, 0.25), (1, 0.25)]]
    assert made.rows == [["1", "50", "50"], ["0.5", "25", "25"]]
