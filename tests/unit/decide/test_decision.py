"""Decisions from the files of an export."""

import json
from dataclasses import replace

import numpy as np
import pytest

from anomalib_ot.decide.conformal import ConformalScale, UnsupportedRateWarning
from anomalib_ot.decide.decision import Decision, Level, calibration_of
from anomalib_ot.images.reading import Reading

SCORES = np.arange(1.0, 100.0)


@pytest.fixture
def decision():
    return Decision(
        "WtFlow",
        0.05,
        Level(SCORES, ConformalScale(95.0, 49.0)),
        Level(2 * SCORES, ConformalScale(190.0, 98.0)),
        Reading(is_full_range=True, value_range=(0, 4095)),
    )


@pytest.fixture
def exported(tmp_path, decision):
    path = tmp_path / "model.xml"
    path.write_text("graph")
    path.with_suffix(".bin").write_bytes(b"weights")
    decision.write(path)
    return path


def test_what_is_written_is_loaded(exported):
    loaded = Decision.load(exported)
    assert (loaded.model, loaded.false_alarm_rate) == ("WtFlow", 0.05)
    assert np.array_equal(loaded.image.scores, SCORES)
    assert loaded.pixel.scale == ConformalScale(190.0, 98.0)
    assert loaded.reading == Reading(is_full_range=True, value_range=(0, 4095))
    assert set(json.loads(calibration_of(exported).read_text())["files"]) == {"model.xml", "model.bin"}


def test_only_the_files_of_the_export_are_checked(tmp_path, decision):
    """A name with characters of a glob pattern, and foreign files beside it that change later."""
    path = tmp_path / "model[1].xml"
    for suffix in (".xml", ".bin", ".log", ".old.bin"):
        path.with_name(f"model[1]{suffix}").write_text("content")
    path.with_name("model1.bin").write_text("of another model")
    decision.write(path)
    assert set(json.loads(calibration_of(path).read_text())["files"]) == {"model[1].xml", "model[1].bin"}
    path.with_suffix(".log").write_text("more")
    assert Decision.load(path).model == "WtFlow"


def test_verdicts_are_those_of_any_rate(decision):
    raw = decision.raw_scores(decision.image.scale.shown(np.array([50.0, 95.5, 99.5])))
    np.testing.assert_allclose(raw, [50.0, 95.5, 99.5])
    assert decision.is_anomalous(raw).tolist() == [False, True, True]
    assert decision.is_anomalous(raw, 0.01).tolist() == [False, False, True]
    np.testing.assert_allclose(decision.p_values(raw), [0.51, 0.05, 0.01])
    with pytest.warns(UnsupportedRateWarning):
        decision.is_anomalous(raw, 0.001)


def test_the_p_value_of_a_pixel_compares_it_with_the_highest_pixels_of_good_images(decision):
    maps = np.array([[[199.0, 1.0], [190.5, 198.0]]])
    np.testing.assert_allclose(decision.p_values_of_pixels(maps), [[[0.01, 1.0], [0.05, 0.02]]])
    # A pixel is above the threshold of a rate if and only if its p-value is at most the rate.
    assert np.array_equal(decision.p_values_of_pixels(maps) <= 0.05, maps > decision.pixel_threshold(0.05))
    with pytest.raises(ValueError, match="a score is NaN"):
        decision.p_values_of_pixels([np.nan])
    with pytest.raises(ValueError, match="WtFlow has no anomaly maps"):
        replace(decision, pixel=None).p_values_of_pixels(maps)


def test_an_image_is_anomalous_if_and_only_if_its_mask_has_a_pixel(decision):
    generator = np.random.default_rng(0)
    scores, maps = generator.uniform(0, 120, 200), generator.uniform(0, 220, (200, 1, 3, 3))
    for rate in (None, 0.2, 0.5):
        masks = decision.masks(scores, maps, rate)
        assert np.array_equal(masks.any((1, 2, 3)), decision.is_anomalous(scores, rate))
        above = maps > decision.pixel_threshold(rate)
        has_some = masks.any((1, 2, 3)) & above.any((1, 2, 3))
        assert np.array_equal(masks[has_some], above[has_some])


def test_a_model_without_maps_has_no_masks(decision):
    bare = Decision(decision.model, 0.05, decision.image)
    with pytest.raises(ValueError, match="WtFlow has no anomaly maps"):
        bare.pixel_threshold()


def test_the_calibration_of_another_file_is_refused(exported):
    exported.with_suffix(".bin").write_bytes(b"others")
    with pytest.raises(ValueError, match=r"calibration of another WtFlow: model\.bin is not the file"):
        Decision.load(exported)
    exported.with_suffix(".bin").unlink()
    with pytest.raises(ValueError, match=r"model\.bin is not the file"):
        Decision.load(exported)


def test_the_calibration_of_a_file_of_another_name_is_refused(exported):
    other = exported.with_suffix(".onnx")
    other.write_text("graph")
    with pytest.raises(ValueError, match=r"not the calibration of model\.onnx, but of model\.bin, model\.xml"):
        Decision.load(other)


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"image": None},
        {"image": {"scores": [1.0], "shown": None}},
        {"image": {"scores": [1.0, float("nan")], "shown": None}},
        {"false_alarm_rate": 2},
        {"files": 3},
    ],
)
def test_a_damaged_calibration_is_refused(exported, change):
    place = calibration_of(exported)
    place.write_text(json.dumps({**json.loads(place.read_text()), **change}))
    with pytest.raises(ValueError, match=r"model\.calibration\.json"):
        Decision.load(exported)
    place.write_text("{")
    with pytest.raises(ValueError, match="is not a calibration file of this anomalib-ot, or is damaged"):
        Decision.load(exported)


def test_without_a_calibration_the_error_names_the_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no model\.calibration\.json beside"):
        Decision.load(tmp_path / "model.xml")


def test_raw_scores_may_be_shown_as_they_are():
    assert Level(SCORES).raw([3.0, 4.0]).tolist() == [3.0, 4.0]


def test_shown_scores_of_0_and_1_are_infinite(decision):
    raw = decision.raw_scores([0.0, 1.0])
    assert raw.tolist() == [-np.inf, np.inf]
    assert decision.is_anomalous(raw).tolist() == [False, True]
