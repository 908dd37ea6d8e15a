"""The benchmark of promised and realised rates of false alarms."""

from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from anomalib_ot.comparison import Plan
from benchmarks import false_alarms
from benchmarks.false_alarms import (
    FIELDS,
    RATES,
    GoodAndBad,
    Split,
    adaptive,
    conformal,
    groups_of,
    main,
    rows_of,
)
from benchmarks.promises import cases, chances, draw, guide, interval, kept, table


@pytest.fixture(scope="module")
def plan(backbone, tmp_path_factory):
    root = str(tmp_path_factory.mktemp("datasets"))
    data = {"class_path": "Assembly", "init_args": {"root": root, "n_train": 10, "n_validation": 1, "n_test": 4}}
    settings = {"layers": ["blocks.4"], "training_steps": 2, "width": 16}
    models = {"WtFlow": {"class_path": "WtFlow", "init_args": settings}}
    models["Foct"] = {"class_path": "Foct", "init_args": {"layers": ["blocks.4"], "rotations": 1, "support_steps": 2}}
    return Plan(models, {"tray": data}, backbone, ("blocks.4",), (64, 64))


@pytest.fixture(scope="module")
def images(plan):
    return GoodAndBad(plan, "tray")


@pytest.mark.slow
def test_splits_divide_the_good_images_and_each_threshold_has_its_rows(plan, images):
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
    promised = [row for row in rows if row["threshold"] in {"folds", "held out"}]
    assert all(1 <= row["rank"] <= max(1, row["rate"] * (row["calibration"] + 1) + 1e-9) for row in promised)
    assert [row["calibration"] for row in promised[::5]] == [6, 2, 8, 2]
    (split, _) = splits
    assert {row["threshold"] for row in rows_of(plan, images, split, "WtFlow", has_held_out=False)} == {"folds"}
    found = table(pd.DataFrame(rows).replace("", float("nan")))
    assert len(found.splitlines()) == 1 + 2 * 13
    assert "promised %" in found


def test_the_features_of_an_image_are_those_of_its_file(images):
    """anomalib sorts samples by path, and test images come before training images then."""
    images.data.train_data.samples = images.good
    places = {path: place for place, path in enumerate(images.data.train_data.samples.image_path)}
    assert [*places] != images.good.image_path.tolist()
    for index in (0, 3, len(images.good) - 1):
        image = images.data.train_data[places[images.good.image_path[index]]].image
        ((layer, found),) = images.features_of([index]).items()
        torch.testing.assert_close(found, images.extractor.of(image)[layer])


def test_foct_has_the_rows_of_its_support_images_and_the_plot_shows_them(plan, images, tmp_path):
    (split,) = images.splits(0, [4])
    rows = [*rows_of(plan, images, split, "Foct")]
    assert [(row["threshold"], row["rate"], row["calibration"], row["rank"]) for row in rows] == [
        ("support", rate, 4, 1) for rate in RATES
    ]
    assert {row["split"] for row in rows} == {"random"}
    draw(pd.DataFrame(rows), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size


def test_no_group_is_both_in_the_training_and_in_the_test(images, monkeypatch):
    groups = [f"part {index % 5}" for index in range(len(images.groups))]
    monkeypatch.setattr(images, "groups", groups)
    for seed in range(4):
        (split,) = images.splits(seed, [None])
        parts = (split.training, split.tested, split.anomalous)
        trained, tested, bad = ({groups[index] for index in each} for each in parts)
        assert not trained & tested
        assert not trained & bad
        assert {*split.training, *split.tested} == set(range(len(images.good)))
    monkeypatch.setattr(images, "groups", ["a" if index else "b" for index in range(len(groups))])
    (split,) = images.splits(0, [None])
    assert split.training
    assert split.tested


def test_a_contaminated_folder_has_its_share_of_anomalous_images_which_are_not_tested(images, monkeypatch):
    monkeypatch.setattr(images, "_contaminated", 0.2)
    for split in images.splits(0, [2, None]):
        bad = {index for index in split.training if index >= len(images.good)}
        assert len(bad) == max(1, round(0.2 * len(split.training)))
        assert not bad & {*split.anomalous}
        assert len(images.training_data(split.training).train_data) == len(split.training)
        assert not images.data.train_data.samples.label_index.any()
    assert {*bad, *split.anomalous} == set(range(len(images.good), len(images.groups)))


def test_groups_are_found_in_names_and_sizes_or_refused(tmp_path):
    paths = [str(tmp_path / name) for name in ("part1_0.png", "part2_0.png", "part1_1.png")]
    for width, path in enumerate(paths, 5):
        Image.new("L", (width, 4)).save(path)
    assert groups_of(paths, "part[0-9]+") == ["part1", "part2", "part1"]
    assert groups_of(paths, "[0-9]+x[0-9]+") == ["5x4", "6x4", "7x4"]
    with pytest.raises(ValueError, match=r"'lot' is not in 'part1_0.png 5x4'"):
        groups_of(paths, "lot")
    with pytest.raises(ValueError, match="at least two groups, but all images are 'part'"):
        groups_of(paths, "part")


def test_without_anomalies_the_threshold_of_anomalib_is_that_of_the_host():
    assert adaptive(np.array([0.1, 0.2]), np.array([0.5, 0.6])) == pytest.approx(0.5)
    assert adaptive(np.array([0.1, 0.2]), np.empty(0)) == pytest.approx(0.2)


def test_exchangeable_splits_keep_the_promise_at_the_level_of_the_test():
    random = np.random.default_rng(0)
    within = 0
    for _ in range(300):
        calibration, good = random.normal(size=39), random.normal(size=400)
        limit, supported = conformal(calibration, 0.05)
        rank, found = (calibration >= limit).sum(), (good > limit).sum()
        row = {"supported": supported, "calibration": 39, "rank": rank, "false_alarms": found, "good": 400}
        within += kept(SimpleNamespace(**row))
    assert within / 300 >= 0.93
    assert not kept(SimpleNamespace(**row | {"false_alarms": 100}))


def test_a_split_is_written_as_a_whole_or_not_at_all(monkeypatch, tmp_path):
    """An interruption between two fits leaves no row, and a finished split is not run again."""
    row = dict.fromkeys(FIELDS, "1") | {"category": "Assembly", "model": "WtFlow"}
    row |= {"images": "6", "threshold": "folds"}
    calls = []

    def interrupted_once(_plan, _images, split, _model, **_):
        calls.append(split.seed)
        yield row | {"seed": split.seed}
        if len(calls) == 2:
            raise KeyboardInterrupt
        yield row | {"seed": split.seed}

    images = Mock(splits=lambda seed, _: [Split("6", seed, [], [], [])], how="1")
    for name, value in {"GoodAndBad": lambda *_: images, "rows_of": interrupted_once, "logging": Mock()}.items():
        monkeypatch.setattr(false_alarms, name, value)
    monkeypatch.setattr(false_alarms, "offline_backbone", lambda: "resnet18")
    settings = {"output": tmp_path / "rows.csv", "seeds": 2, "models": ["WtFlow"]}
    with pytest.raises(KeyboardInterrupt):
        main(**settings)
    assert list(pd.read_csv(settings["output"]).seed) == [0, 0]
    main(**settings)
    assert calls == [0, 1, 1]
    assert list(pd.read_csv(settings["output"]).seed) == [0, 0, 1, 1]


def rows(counts, good=100, rank=1, calibration=19, **values):
    """Rows of as many splits as there are counts of false alarms."""
    row = {"category": "tray", "model": "Duo", "images": "19", "split": "random", "threshold": "folds", "rate": 0.05}
    row |= {"supported": 0.05, "calibration": calibration, "rank": rank, "good": good, "detected": 3, "anomalous": 4}
    return pd.DataFrame([row | {"seed": seed, "false_alarms": count} | values for seed, count in enumerate(counts)])


def test_the_interval_covers_images_and_thresholds_that_are_random():
    rate, low, high = interval(rows([0]))
    assert (rate, low) == (0, 0)
    assert high == pytest.approx(0.036, abs=1e-3)
    rate, low, high = interval(rows([0, 20] * 4))
    assert rate == pytest.approx(0.1)
    # Half a width of 1.96 deviations of the mean of eight shares.
    assert high - rate == pytest.approx(1.96 * np.std([0, 0.2] * 4, ddof=1) / 8**0.5)
    assert interval(rows([10] * 8))[1:] == pytest.approx((0.080, 0.123), abs=1e-3)


def test_cases_count_a_threshold_once_and_name_the_categories_that_break_the_promise():
    sound = rows([5, 0])
    lower = sound.assign(rate=0.01)
    broken = rows([60], category="screw")
    found = cases(pd.concat([sound, lower, broken])).splitlines()
    assert len(found) == 2
    assert found[1].split()[:6] == ["Duo", "folds", "random", "3", "66.7", "66.7"]
    assert found[1].endswith("screw 0 of 1")
    more, fewer = chances(next(sound.itertuples()))
    assert 0.2 < more < 0.9
    assert more + fewer > 1


def test_the_tables_of_the_guide_have_a_row_for_each_threshold():
    known = pd.concat([rows([5, 0]), rows([9, 3], rate=0.1, supported=0.1, rank=2), rows([0], model="Foct")])
    unpromised = rows([30], threshold="maximum", rate=np.nan, supported=np.nan)
    first, second = guide(pd.concat([known.assign(rate=0.01, supported=0.05).iloc[:2], known, unpromised])).split(
        "\n\n"
    )
    assert first.splitlines() == [
        "| images | promised | Duo | detected | Foct | detected |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| 19 | 5 % | 2.5 % (0.0 to 7.4) | 75 % | 0.0 % (0.0 to 3.6) | 75 % |",
        "| 19 | 10 % | 6.0 % (0.1 to 11.9) | 75 % |  |  |",
    ]
    assert second.splitlines()[2] == "| 19 | maximum | 30.0 % (21.2 to 40.0) | 75 % |"
