"""What the page shows of a stream: the images and the places that changed."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.transforms.v2.functional import gaussian_blur

from anomalib_ot.decide import DriftMonitor
from anomalib_ot.monitor.appearance import appearance_of
from anomalib_ot.monitor.course import Course
from anomalib_ot.monitor.page import draw_course, drift_page
from anomalib_ot.monitor.watching import summary


def course_of(sign, reference=(), before=30, after=30):
    """Good images, and then images whose scores and right halves of maps are higher or lower."""
    random = np.random.default_rng(0)
    course = Course({"score": DriftMonitor(random.normal(size=60))}, reference)
    for index in range(before + after):
        drifted = sign * 6.0 * (index >= before)
        anomaly_map = torch.zeros(48, 96)
        anomaly_map[:, 48:] += drifted
        course.add(Path(f"{index:03}.png"), {"score": random.normal() + drifted}, anomaly_map)
    return course


@pytest.mark.parametrize("sign", [1, -1])
def test_images_and_places_that_changed_are_found(sign):
    course = course_of(sign)
    assert course.drifted == "score"
    assert abs(course.since()[0].states["score"].index - 30) <= 3
    assert course.alarms["score"].states["score"].index > 30
    scores = sorted((each.values["score"] for each in course.since()), key=lambda score: -sign * score)
    assert [each.values["score"] for each in course.changed(4)] == scores[:4]
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
    assert (course.drifted, course.since(), course.changed(3), course.mean_maps()) == (None, [], [], None)
    empty = Course({"score": DriftMonitor([0.0, 1.0])})
    assert (empty.drifted, empty.since(), empty.since("score")) == (None, [], [])


def test_an_image_without_a_finite_score_leaves_no_trace():
    monitors = {"brightness": DriftMonitor(None), "score": DriftMonitor([0.0, 1.0])}
    course = Course(monitors)
    with pytest.raises(ValueError, match="a score must be finite"):
        course.add(Path("x.png"), {"brightness": 0.5, "score": float("nan")}, torch.zeros(48, 96))
    assert not course.seen
    assert [monitor.to_dict()["scores"] for monitor in monitors.values()] == [[], []]


def test_the_page_escapes_names_and_says_which_files_are_gone():
    course = course_of(1)
    course.skipped[Path("<b>.png")] = "cannot read <b>.png"
    about = {"model": "WtFlow", "checkpoint": "<i>", "data": "line", "reference": None, "value_range": None}
    page = drift_page(course, about, summary(course))
    assert "<b>" not in page
    assert "<i>" not in page
    assert page.count("The file is no longer there") == 7
    assert re.search(r"drift to higher scores \(-?0\.\d+ to [56]\.\d+\), probably since 0", page)
    assert "No image has been scored yet" in drift_page(Course({"score": DriftMonitor([0.0, 1.0])}), about, "")


def test_each_panel_names_its_lines():
    upper, lower = draw_course(course_of(1)).axes
    assert [text.get_text() for text in upper.get_legend().get_texts()] == ["alarm", "drift began"]
    assert [text.get_text() for text in lower.get_legend().get_texts()] == ["mean of 25", "drift began"]
    _, lower = draw_course(course_of(1, before=5, after=0)).axes
    assert lower.get_legend() is None


def test_light_and_focus_drift_without_the_scores():
    """The darker half of the stream raises an alarm of the brightness, and later one of the sharpness."""
    random = np.random.default_rng(0)
    monitors = {"score": DriftMonitor(random.normal(size=60), 0.005)}
    course = Course(monitors | {name: DriftMonitor(None, 0.0025) for name in ("brightness", "sharpness")})
    for index in range(160):
        values = {
            "score": random.normal(),
            "brightness": random.normal() - 4 * (index >= 60),
            "sharpness": random.normal() + 4 * (index >= 110),
        }
        course.add(Path(f"{index:03}.png"), values, torch.zeros(8, 8))
    assert [*course.alarms] == ["brightness", "sharpness"]
    assert [course.is_higher(name) for name in course.alarms] == [False, True]
    assert abs(course.since()[0].states["brightness"].index - 60) <= 3
    assert abs(course.since("sharpness")[0].states["sharpness"].index - 110) <= 3
    assert course.changed(1)[0].values["brightness"] == min(each.values["brightness"] for each in course.seen)
    line = summary(course)
    values = {name: np.array([each.values[name] for each in course.seen]) for name in course.alarms}
    for name, began in (("brightness", 60), ("sharpness", 110)):
        expected = (np.median(values[name][:began]), np.median(values[name][began:]))
        assert course.medians(name) == pytest.approx(expected, abs=0.1)
    before, since = (f"{each:.4g}" for each in course.medians("brightness"))
    assert line.startswith(f"160 images: drift to lower brightness ({before} to {since}), probably since 0")
    assert "; drift to higher sharpness (" in line
    page = drift_page(course, {"model": "", "checkpoint": "", "data": "", "reference": None, "value_range": None}, line)
    assert "of the score raises an alarm at 200, that of the brightness at 400 and that of the sharpness at 400" in page
    assert "with a probability of at most 1 %" in page
    assert "these have the lowest brightness" in page


def test_brightness_is_the_mean_and_sharpness_falls_with_the_focus_and_not_with_the_light():
    image = torch.rand(3, 32, 40, generator=torch.Generator().manual_seed(0))
    first = appearance_of(image)
    darker, blurred = appearance_of(0.8 * image), appearance_of(gaussian_blur(image, 5, 1.0))
    assert first["brightness"] == pytest.approx(float(image.mean()))
    assert darker["brightness"] == pytest.approx(0.8 * first["brightness"])
    assert darker["sharpness"] == pytest.approx(first["sharpness"], rel=0.01)
    assert blurred["brightness"] == pytest.approx(first["brightness"], rel=0.01)
    assert blurred["sharpness"] < 0.5 * first["sharpness"]
    # Each pixel differs from both neighbours by one, and the mean is a half.
    checks = (torch.arange(8)[:, None] + torch.arange(6)).remainder(2).float().expand(3, 8, 6)
    assert appearance_of(checks)["sharpness"] == pytest.approx(2 / (0.5 + 1 / 255))
    assert appearance_of(torch.zeros(3, 1, 6)) == {"brightness": 0.0, "sharpness": 0.0}
