from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import Resize

from anomalib_ot.data import LOCODataset, MVTecLOCOAD
from anomalib_ot.data.loco import read_defect_masks

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


def test_masks_of_another_size(category):
    folder = category / "ground_truth" / "logical_anomalies" / "007"
    save(folder / "000.png", np.full((3, 4), 255))
    with pytest.raises(ValueError, match=r"the masks in .*007 differ in size"):
        LOCODataset(category, "test")[1]
    (folder / "001.png").unlink()
    with pytest.raises(ValueError, match=r"the masks in .*007 are not of the size of .*007.png"):
        LOCODataset(category, "test")[1]


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
