"""The benchmark of the drift monitor, on made-up scores and a small image."""

from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
import torch

from benchmarks import drift
from benchmarks.drift import CHANGES, FIELDS, SHARES, Measured, main, rows_of, tables


def test_each_change_keeps_the_shape_and_the_range_and_changes_the_image():
    image = torch.rand(3, 32, 40, generator=torch.Generator().manual_seed(0))
    for change in CHANGES.values():
        changed = change(image)
        assert changed.shape == image.shape
        assert 0 <= changed.min() <= changed.max() <= 1
        assert not torch.equal(changed, image)
    assert torch.equal(CHANGES["shift 8 px"](image)[..., 8:], image[..., :-8])


@pytest.mark.parametrize("folds", [None, np.linspace(-1, 3, 20)])
def test_rows_count_alarms_and_delays(folds):
    good = np.random.default_rng(0).normal(size=40)
    measured = Measured(good, {"shift": good + 4}, np.array([9.0]), folds)
    rows = list(rows_of(measured, streams=4, length=200, rate=0.01))
    other = "stream" if folds is None else "folds"
    assert [row["calibration"] for row in rows] == ["held out"] * (2 + len(SHARES)) + [other] * (2 + len(SHARES))
    assert all({*row} == {*FIELDS} - {"category", "model"} for row in rows)
    calm, *_, shifted = rows[: 2 + len(SHARES)]
    assert (calm["alarms"], calm["early"], calm["delay"]) == ("0", "0", "")
    assert (shifted["alarms"], shifted["early"]) == ("4", "0")
    assert float(shifted["delay"]) == pytest.approx(22, abs=8)


def test_a_finished_category_is_not_run_again(monkeypatch, tmp_path):
    made = Mock(side_effect=RuntimeError("a category is run"))
    for name, value in {"GoodAndBad": made, "offline_backbone": lambda: "resnet18", "logging": Mock()}.items():
        monkeypatch.setattr(drift, name, value)
    output = tmp_path / "rows.csv"
    row = dict.fromkeys(FIELDS, "1") | {"category": "Assembly", "calibration": "folds"}
    pd.DataFrame([row | {"model": name} for name in ("WtFlow", "brightness")]).to_csv(output, index=False)
    main(output=output)
    for model in ("Pradot", "appearance"):
        with pytest.raises(RuntimeError, match="a category is run"):
            main(output=output, model=model)
    pd.DataFrame([row | {"model": name} for name in ("brightness", "sharpness")]).to_csv(output, index=False)
    main(output=output, model="appearance")


def test_the_tables_have_delays_and_alarms_without_a_change():
    row = {"model": "WtFlow", "streams": 4, "early": 0}
    rows = [
        {"category": "tray", "calibration": "held out", "change": "none", "alarms": 1, "delay": ""},
        {"category": "tray", "calibration": "held out", "change": "shift 2 px", "alarms": 4, "delay": 22},
        {"category": "tray", "calibration": "folds", "change": "shift 2 px", "alarms": 4, "early": 1, "delay": 90.5},
        {"category": "tray", "calibration": "folds", "change": "blur 1 px", "alarms": 0, "delay": ""},
        {"category": "tray", "calibration": "folds", "change": "5% anomalous", "alarms": 0, "delay": ""},
    ]
    found = pd.DataFrame([row | each for each in rows])
    found["delay"] = pd.to_numeric(found.delay)
    delays, alarms = (each.splitlines() for each in tables(found))
    assert delays[0] == "| change | WtFlow, tray, held out | WtFlow, tray, folds |"
    assert delays[2:] == ["| shift 2 px | 22 | 90.5 (3 of 4) |", "| blur 1 px |  | (0 of 4) |"]
    assert alarms[2:] == ["| none | 1 of 4 |  |", "| 5% anomalous |  | 0 of 4 |"]
