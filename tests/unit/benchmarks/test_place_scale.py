"""The benchmark of a scale for each place of the map, on made-up maps and a small Duo."""

import pandas as pd
import pytest
import torch

from anomalib_ot.comparison import Plan
from benchmarks.false_alarms import GoodAndBad
from benchmarks.place_scale import FIELDS, PLAIN, RATES, VARIANTS, rows_of, table


def test_a_scale_divides_places_that_vary_more():
    maps = torch.randn(200, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    maps[..., 6:] *= 5
    maps[..., :6] += 3
    assert VARIANTS[PLAIN](maps) == (0.0, 1.0)
    centre, spread = VARIANTS["centre and spread, floor 0.3"](maps)
    assert spread[..., 0].mean() < 0.5 * spread[..., -1].mean()
    assert centre[..., :6].mean() == pytest.approx(3, abs=0.1)
    assert VARIANTS["spread, floor 0.3"](maps)[0] == 0
    # A high floor is one scale for all places.
    flat = VARIANTS["spread, floor 3"](maps)[1]
    assert flat.max() / flat.min() < spread.max() / spread.min()


def test_each_variant_has_its_rows_and_the_best_is_compared_on_the_other_half(backbone, tmp_path):
    data = {"class_path": "Assembly", "init_args": {"root": str(tmp_path), "n_train": 10, "n_test": 4}}
    flow = {"training_steps": 2, "width": 16}
    settings = {"layers": ["blocks.4"], "pradot": {"prototypes_per_cell": 1}, "wt_flow": flow}
    plan = Plan(
        {"Duo": {"class_path": "Duo", "init_args": settings}}, {"tray": data}, backbone, ("blocks.4",), (64, 64)
    )
    images = GoodAndBad(plan, "tray")
    (split,) = images.splits(0, [None])
    rows = pd.DataFrame(rows_of(plan, images, split))
    assert {*rows} == {*FIELDS}
    assert len(rows) == 3 * len(VARIANTS) * len(RATES) * 2
    halves = rows[rows.model == "Duo"].groupby(["variant", "rate"])
    assert (halves.good.sum() == len(split.tested)).all()
    assert (halves.anomalous.sum() == len(split.anomalous)).all()
    assert "Second half, WtFlow" in table(rows)
