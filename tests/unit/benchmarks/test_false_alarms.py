"""The benchmark of promised and realised rates of false alarms."""

import numpy as np
import pandas as pd
import pytest

from anomalib_ot.comparison import Plan
from benchmarks.false_alarms import FIELDS, GoodAndBad, adaptive, rows_of, table


@pytest.fixture(scope="module")
def plan(backbone, tmp_path_factory):
    root = str(tmp_path_factory.mktemp("datasets"))
    data = {"class_path": "Assembly", "init_args": {"root": root, "n_train": 10, "n_validation": 1, "n_test": 4}}
    settings = {"layers": ["blocks.4"], "training_steps": 2, "width": 16}
    models = {"WtFlow": {"class_path": "WtFlow", "init_args": settings}}
    return Plan(models, {"tray": data}, backbone, ("blocks.4",), (64, 64))


def test_splits_divide_the_good_images_and_each_threshold_has_its_rows(plan):
    images = GoodAndBad(plan, "tray")
    splits = list(images.splits(0, [6, 99, None]))
    assert [split.name for split in splits] == ["6", "all"]
    for split in splits:
        assert not {*split.training} & {*split.tested}
    assert {*splits[1].training, *splits[1].tested} == set(range(len(images.good)))
    assert splits[0].tested == splits[1].tested
    rows = [row for split in splits for row in rows_of(plan, images, split, "WtFlow")]
    assert all(row.keys() == {*FIELDS} for row in rows)
    assert {row["threshold"] for row in rows} == {
        "folds",
        "held out",
        "maximum",
        "adaptive",
        "adaptive, no anomalies",
    }
    found = table(pd.DataFrame(rows).replace("", float("nan")))
    assert len(found.splitlines()) == 1 + 2 * 13
    assert "promised %" in found


def test_without_anomalies_the_threshold_of_anomalib_is_that_of_the_host():
    assert adaptive(np.array([0.1, 0.2]), np.array([0.5, 0.6])) == pytest.approx(0.5)
    assert adaptive(np.array([0.1, 0.2]), np.empty(0)) == pytest.approx(0.2)
