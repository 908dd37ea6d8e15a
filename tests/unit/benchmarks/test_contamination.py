"""The benchmark of bad parts among good training images."""

import numpy as np
import pandas as pd
import pytest
import torch

from anomalib_ot.comparison import Plan
from benchmarks.contamination import FIELDS, Folders, groups, row_of, table


@pytest.fixture(scope="module")
def folders(backbone, tmp_path_factory):
    root = str(tmp_path_factory.mktemp("datasets"))
    data = {"class_path": "Assembly", "init_args": {"root": root, "n_train": 16, "n_validation": 1, "n_test": 4}}
    model = {"class_path": "WtFlow", "init_args": {"layers": ["blocks.4"], "width": 16}}
    return Folders(Plan({"WtFlow": model}, {"tray": data}, backbone, ("blocks.4",), (64, 64)), "tray", 12, 3)


@pytest.mark.slow
def test_a_folder_has_its_share_of_anomalous_images_that_are_not_in_the_test(folders):
    assert folders.good == 16
    clean, is_bad = folders.folder(0, 0.0)
    assert len(clean) == 12
    assert not is_bad.any()
    mixed, is_bad = folders.folder(0, 0.25)
    assert len({*mixed.tolist()}) == 12
    assert is_bad.sum() == 3
    assert {*mixed[~is_bad].tolist()} < {*clean.tolist()}
    assert mixed.max() < folders._ends[1]
    # Good training images, anomalous ones of folders, and three of both kinds in the test.
    assert len(folders.maps) == folders._ends[1] + 6


def test_a_row_counts_what_is_named_and_has_the_aurocs_of_three_fits(folders):
    row = row_of(folders, 0, 0.25, steps=2)
    assert row.keys() == {*FIELDS}
    assert (row["good"], row["bad"]) == ("9", "3")
    assert all(0 <= float(row[name]) <= 100 for name in ("clean", "mixed", "cleaned"))
    assert row_of(folders, 0, 0.25, steps=0).keys() == {*FIELDS} - {"clean", "mixed", "cleaned"}


def test_the_table_adds_up_folders_and_ends_with_all_categories():
    rows = [("a", 0, 0.1, 90, 10, 1, 4, 95.0, 80.0, 90.0), ("a", 1, 0.1, 90, 10, 2, 6, np.nan, np.nan, np.nan)]
    lines = table(pd.DataFrame(rows, columns=FIELDS)).splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["a", "10.0", "10", "of", "20", "1.7", "95.0", "80.0", "90.0"],
        ["all", "10.0", "10", "of", "20", "1.7", "95.0", "80.0", "90.0"],
    ]


def test_groups_names_the_categories_and_pairs_that_are_wrong():
    maps = {each: torch.randn(12, 4, 2, 2, generator=torch.Generator().manual_seed(0)) for each in ("a", "b", "c")}
    maps["a"][:6] += 9
    maps["c"] += 99
    assert groups(maps) == "Not one group: a of 3\nNot two groups: a + b of 3 pairs"
