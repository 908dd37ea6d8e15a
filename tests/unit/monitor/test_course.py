"""What the page shows of a stream: the images and the places that changed."""

from pathlib import Path

import numpy as np
import pytest
import torch

from anomalib_ot.decide import DriftMonitor
from anomalib_ot.monitor.course import Course
from anomalib_ot.monitor.page import draw_course, drift_page
from anomalib_ot.monitor.watching import summary


def course_of(sign, reference=(), before=30, after=30):
    """Good images, and then images whose scores and right halves of maps are higher or lower."""
    random = np.random.default_rng(0)
    course = Course(DriftMonitor(random.normal(size=60)), reference)
    for index in range(before + after):
        drifted = sign * 6.0 * (index >= before)
        anomaly_map = torch.zeros(48, 96)
        anomaly_map[:, 48:] += drifted
        course.add(Path(f"{index:03}.png"), random.normal() + drifted, anomaly_map)
    return course


@pytest.mark.parametrize("sign", [1, -1])
def test_images_and_places_that_changed_are_found(sign):
    course = course_of(sign)
    assert abs(course.since[0].state.index - 30) <= 3
    assert course.alarm.state.index > 30
    scores = sorted((each.score for each in course.since), key=lambda score: -sign * score)
    assert [each.score for each in course.changed(4)] == scores[:4]
    before, since = course.mean_maps()
    assert before.shape == since.shape == (16, 32)
    assert not before.any()
    assert not since[:, :16].any()
    assert (sign * since[:, 16:] > 5).all()


def test_maps_of_the_reference_are_before_the_drift():
    assert course_of(1, before=0).mean_maps() is None
    before, _ = course_of(1, [torch.full((48, 96), 2.0)], before=0).mean_maps()
    assert (before == 2).all()


def test_a_stream_without_an_alarm_has_no_change():
    course = course_of(1, after=0)
    assert (course.alarm, course.since, course.changed(3), course.mean_maps()) == (None, [], [], None)
    empty = Course(DriftMonitor([0.0, 1.0]))
    assert (empty.alarm, empty.since) == (None, [])


def test_an_image_without_a_finite_score_leaves_no_trace():
    course = course_of(1)
    with pytest.raises(ValueError, match="a score must be finite"):
        course.add(Path("x.png"), float("nan"), torch.zeros(48, 96))
    assert len(course.seen) == 60


def test_the_page_escapes_names_and_says_which_files_are_gone():
    course = course_of(1)
    course.skipped[Path("<b>.png")] = "cannot read <b>.png"
    about = {"model": "WtFlow", "checkpoint": "<i>", "data": "line", "reference": None}
    page = drift_page(course, about, summary(course))
    assert "<b>" not in page
    assert "<i>" not in page
    assert page.count("The file is no longer there") == 7
    assert "drift to higher scores, probably since" in page
    assert "No image has been scored yet" in drift_page(Course(DriftMonitor([0.0, 1.0])), about, "")


def test_each_panel_names_its_lines():
    upper, lower = draw_course(course_of(1)).axes
    assert [text.get_text() for text in upper.get_legend().get_texts()] == ["alarm", "drift began"]
    assert [text.get_text() for text in lower.get_legend().get_texts()] == ["mean of 25", "drift began"]
    _, lower = draw_course(course_of(1, before=5, after=0)).axes
    assert lower.get_legend() is None
