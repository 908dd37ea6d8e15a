"""Tests of ensembles, the mean of normalised scores and maps."""

from dataclasses import replace

import numpy as np
import pytest

from anomalib_ot.comparison import Key, Plan, Predictions, Record, evaluate, read_records, write_record
from anomalib_ot.comparison.ensemble import average, ensemble_runs

A, B = Key("tray", "A"), Key("tray", "B")
CLASSES = {"A": {"class_path": "Padim"}, "B": {"class_path": "Patchcore"}}
PLAN = Plan(CLASSES, {"tray": {"class_path": "Assembly"}}, ensembles=("A+B",))


def predictions(seed, **changes):
    rng = np.random.default_rng(seed)
    said = {
        "images": [f"/data/test/{'bent' if index > 3 else 'good'}/{index}.png" for index in range(8)],
        "kinds": ["good"] * 4 + ["bent"] * 4,
        "labels": np.array([0] * 4 + [1] * 4),
        "scores": rng.normal(size=8).astype(np.float32),
        "maps": rng.random((8, 4, 4)).astype(np.float32),
        "truth": np.arange(8)[:, None, None] * np.tri(4) > 3,
    }
    return Predictions(**{**said, **changes})


def test_average():
    first, second = predictions(0), predictions(1)
    both = average([(A, first), (B, second)])
    np.testing.assert_allclose(both.scores, (first.scores + second.scores) / 2, rtol=1e-6)
    np.testing.assert_allclose(both.maps, (first.maps + second.maps) / 2, rtol=1e-6)
    assert average([(A, first), (B, replace(second, maps=None))]).maps is None


def test_the_p_values_of_a_member_are_not_those_of_the_mean():
    first = replace(predictions(0), p_values=np.full(8, 0.5))
    assert average([(A, first), (B, predictions(1))]).p_values is None


def test_different_images_are_refused():
    other = predictions(1)
    other.images[0] = "/data/test/good/other.png"
    with pytest.raises(ValueError, match="B on tray, seed 0 and A on tray, seed 0 were tested on different images"):
        average([(A, predictions(0)), (B, other)])


def test_maps_of_different_sizes_are_refused():
    with pytest.raises(ValueError, match="differ in size; give the models one image_size"):
        average([(A, predictions(0)), (B, predictions(1, maps=np.zeros((8, 2, 2), dtype=np.float32)))])


def keep(tmp_path, key, seed, **changes):
    costs = {"fit_s": 2.0, "ms_per_image": 3.0, "peak_mib": 100.0 + seed, "size_mib": 1.0, "parameters": 7}
    record = Record(key, costs=costs, environment={"time": f"{seed} o'clock"})
    return write_record(tmp_path, replace(record, **changes), predictions(seed))


def test_an_ensemble_is_a_run_like_any_other(tmp_path):
    first, second = keep(tmp_path, A, 0), keep(tmp_path, B, 1)
    ensemble_runs(tmp_path, PLAN)
    (found,) = (record for record in read_records(tmp_path) if record.key.model == "A+B")
    expected = average([(A, first.predictions), (B, second.predictions)])
    assert found.metrics == pytest.approx(evaluate(expected)[0])
    assert found.test_set == first.test_set
    assert found.costs == {"fit_s": 4, "ms_per_image": 6, "peak_mib": 101, "size_mib": 2, "parameters": 14}


def test_it_is_made_again_when_a_member_was(tmp_path):
    keep(tmp_path, A, 0)
    keep(tmp_path, B, 1)
    ensemble_runs(tmp_path, PLAN)
    folder = tmp_path / Key("tray", "A+B").folder
    before = folder.stat().st_ino
    ensemble_runs(tmp_path, PLAN)
    assert folder.stat().st_ino == before
    keep(tmp_path, B, 2)
    ensemble_runs(tmp_path, PLAN)
    assert folder.stat().st_ino != before


def test_it_fails_with_its_member(tmp_path):
    keep(tmp_path, A, 0)
    keep(tmp_path, B, 1, error="Traceback\nRuntimeError: no memory")
    ensemble_runs(tmp_path, PLAN)
    (found,) = (record for record in read_records(tmp_path) if record.key.model == "A+B")
    assert found.message == "B on tray, seed 0 failed: RuntimeError: no memory"


def test_members_that_tell_neither_time_nor_costs_make_an_ensemble(tmp_path):
    for key in (A, B):
        keep(tmp_path, key, 0, costs={"fit_s": 2.0}, environment={})
    (made,) = ensemble_runs(tmp_path, PLAN)
    assert made.costs == {"fit_s": 4.0}
