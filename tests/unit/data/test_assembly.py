import json
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
import yaml
from anomalib.data import AnomalibDataModule
from PIL import Image

from anomalib_ot.data import Assembly
from anomalib_ot.data.assembly import DEFECTS_CONFIG
from anomalib_ot.data.tray import LOGICAL_ANOMALIES, SIZE, STRUCTURAL_ANOMALIES, Tray

SMALL = {"n_train": 2, "n_validation": 1, "n_test": 3}
COUNTS = {
    "train/good": 2,
    "validation/good": 1,
    "test/good": 3,
    "test/logical_anomalies": 3,
    "test/structural_anomalies": 3,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("assembly")
    Assembly(root, **SMALL).prepare_data()
    return root


@pytest.fixture(scope="module")
def tray():
    return Tray(seed=3)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def read(path):
    return np.asarray(Image.open(path))


def test_same_seed_same_bytes(root, tmp_path):
    Assembly(tmp_path, **SMALL).prepare_data()
    assert contents(tmp_path / "tray") == contents(root / "tray")


def test_other_seed_other_pictures(root, tmp_path):
    Assembly(tmp_path, **SMALL, seed=1).prepare_data()
    names = [path for path in contents(root / "tray") if path.suffix == ".png" and "ground_truth" not in path.parts]
    assert len(names) == sum(COUNTS.values())
    assert all((tmp_path / "tray" / name).read_bytes() != (root / "tray" / name).read_bytes() for name in names)


def test_no_picture_twice(root):
    pictures = [content for name, content in contents(root / "tray").items() if "good" in name.parts]
    assert len(set(pictures)) == len(pictures) == 6


def test_layout(root):
    images = [path.relative_to(root / "tray") for path in (root / "tray").glob("*/*/*.png")]
    assert {
        folder.as_posix(): len(list(names)) for folder, names in groupby(sorted(images), lambda p: p.parent)
    } == COUNTS
    assert {read(root / "tray" / image).shape for image in images} == {(SIZE, SIZE, 3)}


def test_pixel_value_of_a_mask_names_its_defect(root):
    config = json.loads((root / "tray" / "defects_config.json").read_text())
    names = {entry["pixel_value"]: entry["defect_name"] for entry in config}
    assert sorted(names.values()) == sorted([*LOGICAL_ANOMALIES, *STRUCTURAL_ANOMALIES])
    for kind, defects in (("logical", LOGICAL_ANOMALIES), ("structural", STRUCTURAL_ANOMALIES)):
        folders = sorted((root / "tray" / "ground_truth" / f"{kind}_anomalies").iterdir())
        assert [folder.name for folder in folders] == ["000", "001", "002"]
        for folder, defect in zip(folders, defects, strict=True):
            masks = [read(path) for path in sorted(folder.iterdir())]
            assert len(masks) == (2 if defect == "swapped_part" else 1)
            for mask in masks:
                background, value = np.unique(mask)
                assert (background, names[value], mask.shape) == (0, defect, (SIZE, SIZE))


@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("defect", STRUCTURAL_ANOMALIES)
def test_structural_defect_changes_its_mask_and_nothing_else(tray, defect, index):
    normal, no_masks = tray.picture((0, index))
    damaged, (mask,) = tray.picture((0, index), defect)
    change = np.abs(damaged.astype(int) - normal).max(-1)
    assert no_masks == []
    assert not change[~mask].any()
    assert np.median(change[mask]) > 20
    assert 40 < mask.sum() < 700


@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("defect", LOGICAL_ANOMALIES)
def test_logical_defect_changes_only_the_places_of_its_masks(tray, defect, index):
    normal, _ = tray.picture((0, index))
    anomalous, masks = tray.picture((0, index), defect)
    change = np.abs(anomalous.astype(int) - normal).max(-1)
    places = np.zeros_like(masks[0])
    for mask in masks:
        row, column = 80 * (np.argwhere(mask).mean(0) // 80).astype(int)
        places[row : row + 96, column : column + 96] = True
    assert not change[~places].any()
    assert all(np.median(change[mask]) > 20 for mask in masks)
    saturation = {entry["defect_name"]: entry["saturation_threshold"] for entry in DEFECTS_CONFIG}[defect]
    assert all(mask.sum() >= saturation for mask in masks)


def test_unknown_defect(tray):
    with pytest.raises(ValueError, match=r"unknown defect 'rust'; choose from swapped_part, .*chip"):
        tray.picture((0, 0), "rust")


def test_interrupted_generation_leaves_nothing(tmp_path, monkeypatch):
    picture = Tray.picture

    def interrupted(self, key, defect=None):
        if key == (3, 1):
            raise KeyboardInterrupt
        return picture(self, key, defect)

    monkeypatch.setattr(Tray, "picture", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Assembly(tmp_path, **SMALL).prepare_data()
    assert list(tmp_path.iterdir()) == []


def test_pictures_of_a_faster_process_stay(tmp_path, monkeypatch):
    def overtaken(folder, **_):
        folder.mkdir()
        (tmp_path / "tray").mkdir()
        (tmp_path / "tray" / "faster").touch()

    monkeypatch.setattr("anomalib_ot.data.assembly.write_category", overtaken)
    Assembly(tmp_path, **SMALL).prepare_data()
    assert contents(tmp_path) == {Path("tray/faster"): b""}


def test_pictures_are_reused(root, monkeypatch):
    def regenerated(*_, **__):
        pytest.fail("the pictures were drawn again")

    monkeypatch.setattr(Tray, "picture", regenerated)
    Assembly(root, **SMALL).prepare_data()


def test_pictures_of_other_settings_are_refused(root):
    before = contents(root)
    with pytest.raises(FileExistsError, match=r'tray was written with .*"seed": 0.*, not .*"seed": 5.*: remove it'):
        Assembly(root, **SMALL, seed=5).prepare_data()
    assert contents(root) == before


def test_foreign_folder_is_refused(tmp_path):
    (tmp_path / "tray").mkdir()
    with pytest.raises(FileExistsError, match="tray was not written by Assembly: remove it"):
        Assembly(tmp_path, **SMALL).prepare_data()


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"n_train": 0}, "n_train must be at least 1, not 0"),
        ({"n_validation": 0}, "n_validation must be at least 1, not 0"),
        ({"n_test": -1}, "n_test must be at least 1, not -1"),
        ({"seed": -1}, "seed must be at least 0, not -1"),
    ],
)
def test_invalid_settings(tmp_path, argument, message):
    with pytest.raises(ValueError, match=message):
        Assembly(tmp_path, **argument)


def test_batches(root):
    datamodule = Assembly(root, **SMALL)
    datamodule.prepare_data()
    datamodule.setup()
    train = next(iter(datamodule.train_dataloader()))
    assert train.image.shape == (2, 3, SIZE, SIZE)
    assert not train.gt_label.any()
    for loader in (datamodule.val_dataloader(), datamodule.test_dataloader()):
        batch = next(iter(loader))
        assert batch.gt_label.int().tolist() == [int("good" not in path) for path in batch.image_path]
        assert batch.gt_label.sum() == 6
        assert batch.gt_mask.shape == (9, SIZE, SIZE)
        assert batch.gt_mask.flatten(1).any(1).tolist() == batch.gt_label.tolist()


def test_validation_folder_holds_normal_images(root):
    datamodule = Assembly(root, **SMALL, val_split_mode="from_dir")
    datamodule.setup()
    assert datamodule.val_data.samples.label_index.tolist() == [0]


def test_from_config(root, tmp_path):
    config = {"class_path": "anomalib_ot.data.Assembly", "init_args": {"root": str(root), **SMALL}}
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(config))
    datamodule = AnomalibDataModule.from_config(tmp_path / "data.yaml")
    datamodule.prepare_data()
    assert isinstance(datamodule, Assembly)
