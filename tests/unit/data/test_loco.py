import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import Resize

from anomalib_ot.data import LOCODataset, MVTecLOCOAD, image_defects, read_defects
from anomalib_ot.data.defects import read_defect_masks

DATA = Path(__file__).resolve().parents[4] / "shared" / "data" / "tray"


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, np.uint8)).save(path)


@pytest.fixture
def category(tmp_path):
    root = tmp_path / "bottle"
    for name in ("train/good/000", "validation/good/000", "test/good/000", "test/logical_anomalies/007"):
        save(root / f"{name}.png", np.full((6, 8, 3), 200))
    mask = np.zeros((2, 6, 8))
    mask[0, :2, :4] = 255
    mask[1, 4:, 4:] = 251
    for number in range(2):
        save(root / f"ground_truth/logical_anomalies/007/{number:03d}.png", mask[number])
    return root


def test_mask_is_the_union_of_the_defects(category):
    normal, anomalous = LOCODataset(category, "test")
    assert (int(normal.gt_label), int(anomalous.gt_label)) == (0, 1)
    assert normal.gt_mask.shape == (6, 8)
    assert not normal.gt_mask.any()
    assert anomalous.gt_mask.nonzero().tolist() == [[i, j] for i in (0, 1) for j in range(4)] + [
        [i, j] for i in (4, 5) for j in range(4, 8)
    ]
    assert anomalous.mask_path == str(category / "ground_truth" / "logical_anomalies" / "007")
    assert read_defect_masks(anomalous.mask_path).sum((1, 2)).tolist() == [8, 8]


def test_mask_is_resized_with_the_image(category):
    item = LOCODataset(category, "test", Resize((12, 16)))[1]
    assert item.image.shape == (3, 12, 16)
    assert item.gt_mask[:4, :8].all()
    assert item.gt_mask[8:, 8:].all()
    assert item.gt_mask.sum() == 64


def test_splits(category):
    datamodule = MVTecLOCOAD(category.parent, "bottle", num_workers=0)
    datamodule.setup()
    assert [len(data) for data in (datamodule.train_data, datamodule.val_data, datamodule.test_data)] == [1, 1, 2]
    assert (datamodule.category, datamodule.train_data.category, datamodule.task.value) == (
        "bottle",
        "bottle",
        "segmentation",
    )
    assert datamodule.val_data[0].image_path == str(category / "validation" / "good" / "000.png")
    batch = next(iter(datamodule.test_dataloader()))
    assert batch.gt_mask.flatten(1).sum(1).tolist() == [0, 16]


@pytest.mark.parametrize("mode", ["same_as_test", "from_test", "synthetic"])
def test_anomalib_splits_the_samples(category, mode):
    for number in range(1, 4):
        save(category / f"train/good/{number:03d}.png", np.full((64, 64, 3), 200))
        save(category / f"test/good/{number:03d}.png", np.full((64, 64, 3), 200))
    datamodule = MVTecLOCOAD(category.parent, "bottle", num_workers=0, val_split_mode=mode, seed=0)
    datamodule.setup()
    assert datamodule.val_data.has_normal
    assert all(torch.isfinite(item.image).all() for item in datamodule.val_data)


def test_missing_category(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no category folder .*bottle"):
        LOCODataset(tmp_path / "bottle", "train")


def test_no_images(category):
    (category / "validation" / "good" / "000.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"there are no images .*bottle/validation/\*/\*.png"):
        LOCODataset(category, "val")


def test_anomalous_image_without_masks(category):
    for mask in (category / "ground_truth" / "logical_anomalies" / "007").iterdir():
        mask.unlink()
    with pytest.raises(FileNotFoundError, match=r"the anomalous image .*test/logical_anomalies/007.png has no masks"):
        LOCODataset(category, "test")


def test_unreadable_image(category):
    (category / "train" / "good" / "000.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"cannot read .*train/good/000.png: "):
        LOCODataset(category, "train")[0]


def test_a_bomb_is_named(category, monkeypatch):
    path = category / "train" / "good" / "000.png"
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    for read in (lambda: LOCODataset(category, "train")[0], lambda: image_defects(path)):
        with pytest.raises(ValueError, match=r"cannot read .*train/good/000.png: .*exceeds limit"):
            read()


def test_masks_of_another_size(category):
    folder = category / "ground_truth" / "logical_anomalies" / "007"
    save(folder / "000.png", np.full((3, 4), 255))
    with pytest.raises(ValueError, match=r"the masks in .*007 differ in size"):
        LOCODataset(category, "test")[1]
    (folder / "001.png").unlink()
    with pytest.raises(ValueError, match=r"the masks in .*007 and the image .*007.png differ in size"):
        LOCODataset(category, "test")[1]


def configure(category, *entries):
    """Write what (pixel value, threshold, whether it is relative) says."""
    config = category / "defects_config.json"
    names = ("pixel_value", "saturation_threshold", "relative_saturation")
    config.write_text(
        json.dumps([{"defect_name": "scratch", **dict(zip(names, entry, strict=False))} for entry in entries])
    )
    return config


def test_defects_saturate_as_configured(category):
    configure(category, (255, 0.7, True), (251, 3, False))
    dataset = LOCODataset(category, "test", Resize((12, 16)))
    defects = dataset.defects(1)
    assert (defects.masks.shape, defects.masks.dtype) == ((2, 6, 8), torch.uint8)
    assert torch.equal(defects.masks, read_defect_masks(dataset[1].mask_path))
    # 70 % of 8 pixels are 5.6.
    assert defects.saturation.tolist() == [5, 3]
    assert defects.saturation.dtype == torch.float64
    assert read_defects(dataset[1].mask_path).saturation.tolist() == [5, 3]
    assert image_defects(dataset[1].image_path).saturation.tolist() == [5, 3]


def test_a_defect_saturates_between_a_pixel_and_its_area(category):
    configure(category, (255, 0.01, True), (251, 700, False))
    assert LOCODataset(category, "test").defects(1).saturation.tolist() == [1, 8]


def test_normal_image_has_no_defects(category):
    defects = LOCODataset(category, "test").defects(0)
    assert defects.masks.shape == (0, 6, 8)
    assert defects.saturation.shape == (0,)
    (category / "test" / "good" / "000.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"cannot read .*test/good/000.png: "):
        image_defects(category / "test" / "good" / "000.png")


def test_configuration_is_read_again_when_it_changes(category):
    configure(category, (255, 1.0, True), (251, 3, False))
    dataset = LOCODataset(category, "test")
    assert dataset.defects(1).saturation.tolist() == [8, 3]
    config = configure(category, (255, 1.0, True), (251, 4, False))
    os.utime(config, ns=(0, 0))
    assert dataset.defects(1).saturation.tolist() == [8, 4]


def test_missing_configuration(category):
    dataset = LOCODataset(category, "test")
    with pytest.raises(FileNotFoundError, match=r"bottle/defects_config.json is missing: it gives the area"):
        dataset.defects(1)


@pytest.mark.parametrize(
    "entries",
    [
        [(255, 1.0, True), (255, 2, False)],
        [(0, 1.0, True)],
        [(256, 1.0, True)],
        [(255, 0, False)],
        [(255, 1.1, True)],
        [(255, "1", True)],
        [(255, 1.0, 1)],
        [(255, 1.0)],
    ],
)
def test_invalid_configuration(category, entries):
    configure(category, *entries)
    with pytest.raises(
        ValueError, match=r"bottle/defects_config.json must list defects, each with its own pixel_value from 1 to 255"
    ):
        LOCODataset(category, "test").defects(1)


@pytest.mark.parametrize("text", ["{", "3", '{"pixel_value": 255}'])
def test_configuration_of_another_form(category, text):
    configure(category).write_text(text)
    with pytest.raises(ValueError, match=r"bottle/defects_config.json must list defects"):
        LOCODataset(category, "test").defects(1)


@pytest.mark.parametrize(
    ("levels", "found"),
    [([[0, 255], [0, 0]], r"\[255\]"), ([[251, 252], [0, 0]], r"\[251, 252\]"), ([[0, 0], [0, 0]], r"\[\]")],
)
def test_a_mask_holds_one_known_pixel_value(category, levels, found):
    configure(category, (251, 1.0, True), (252, 1.0, True))
    folder = category / "ground_truth" / "logical_anomalies" / "007"
    (folder / "001.png").unlink()
    save(folder / "000.png", np.array(levels))
    expected = rf"007/000.png must contain exactly one .* besides 0, from \[251, 252\] of .*config.json, not {found}"
    with pytest.raises(ValueError, match=expected):
        read_defects(folder)


def test_folder_without_masks(category):
    configure(category, (255, 1.0, True))
    folder = category / "ground_truth" / "logical_anomalies" / "008"
    for read in (read_defects, read_defect_masks):
        with pytest.raises(FileNotFoundError, match=r"there are no masks .*008/\*.png"):
            read(folder)


@pytest.mark.skipif(not DATA.is_dir(), reason=f"there is no {DATA}")
def test_real_category():
    datamodule = MVTecLOCOAD(DATA, "breakfast_box", num_workers=0)
    datamodule.setup()
    assert [len(data) for data in (datamodule.train_data, datamodule.val_data, datamodule.test_data)] == [120, 20, 125]
    samples = datamodule.test_data.samples
    assert samples.label.value_counts().to_dict() == {"logical_anomalies": 45, "structural_anomalies": 40, "good": 40}
    for index in (0, 40, 124):
        item = datamodule.test_data[index]
        files = sorted(Path(samples.mask_path[index]).glob("*.png")) if samples.mask_path[index] else []
        union = np.zeros(item.image.shape[-2:], bool)
        for file in files:
            union |= np.asarray(Image.open(file)) > 0
        assert np.array_equal(item.gt_mask.numpy(), union)
        assert union.any() == bool(item.gt_label)
        defects = datamodule.test_data.defects(index)
        assert len(defects.masks) == len(defects.saturation) == len(files)
        assert torch.equal(defects.masks.any(0), item.gt_mask > 0)
        areas = defects.masks.sum((1, 2))
        for file, area, saturation in zip(files, areas.tolist(), defects.saturation.tolist(), strict=True):
            level = np.asarray(Image.open(file)).max()
            assert saturation == {255: area, 254: min(700, area), 253: area // 2, 252: area}[level]
