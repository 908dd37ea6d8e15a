"""Pictures of a camera of twelve bits, in folders of anomalib's and in LOCO's layout."""

import json

import numpy as np
import pytest
import torch
from anomalib.data import Folder, PredictDataset
from lightning.pytorch.trainer.states import TrainerFn
from PIL import Image
from torchvision.transforms.v2 import Compose, RandomHorizontalFlip, Resize

from anomalib_ot import FewShot
from anomalib_ot.data import FullRange, FullRangePredictDataset, LOCODataset, MVTecLOCOAD, read_defects

CAMERA = (0, 4095)


def values(seed):
    return np.random.default_rng(seed).integers(300, 4096, (8, 12)).astype(np.uint16)


def save(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(content).save(path)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Good and bad parts, with a mask of the left half, and one picture of eight bits among them."""
    root = tmp_path_factory.mktemp("parts")
    for folder in ("good", "good_later", "bad"):
        for number in range(4):
            save(root / folder / f"{number}.png", values(number))
    save(root / "good" / "old.png", (values(9) // 16).astype(np.uint8))
    left = np.zeros((8, 12), np.uint8)
    left[:, :6] = 255
    for number in range(4):
        save(root / "masks" / f"{number}.png", left)
    return root


def folder(root, **settings):
    folders = {"normal_dir": "good", "normal_test_dir": "good_later", "abnormal_dir": "bad", "mask_dir": "masks"}
    settings = {"val_split_mode": "same_as_test", "num_workers": 0} | settings
    return Folder("parts", root=root, **folders, **settings)


def ready(data):
    data.prepare_data()
    data.setup(TrainerFn.FITTING)
    return data


def assert_as_in_the_file(item):
    """A picture has all that its file has."""
    content = np.asarray(Image.open(item.image_path))
    scaled = content / (255 if content.dtype == np.uint8 else 4095)
    np.testing.assert_allclose(item.image, np.stack([scaled] * 3), atol=1e-6)


def test_a_folder_is_read_by_the_range_of_the_camera_in_all_parts(parts):
    data = ready(FullRange(folder(parts), CAMERA))
    assert [len(part) for part in (data.train_data, data.val_data, data.test_data)] == [5, 8, 8]
    for part in (data.train_data, data.val_data, data.test_data, data.predict_dataloader().dataset):
        for item in part:
            assert_as_in_the_file(item)
    assert sum(int(item.gt_mask.sum()) for item in data.test_data) == 4 * 48
    assert data.name == "parts"


def test_the_data_module_is_left_as_it_was(parts):
    inner = folder(parts)
    ready(FullRange(inner, CAMERA))
    assert float(ready(inner).train_data[0].image.min()) == 1


@pytest.mark.parametrize("around", [True, False], ids=["around few shots", "within few shots"])
def test_few_shots_of_it(parts, around):
    data = ready(
        FullRange(FewShot(folder(parts), 3), CAMERA) if around else FewShot(FullRange(folder(parts), CAMERA), 3)
    )
    drawn = ready(FewShot(folder(parts), 3)).train_data.samples.image_path
    assert [item.image_path for item in data.train_data] == [*drawn]
    for item in (*data.train_data, *data.val_data):
        assert_as_in_the_file(item)


def test_pictures_and_masks_are_augmented_together_and_as_often_as_without(parts):
    augmentations = Compose([RandomHorizontalFlip(), Resize((16, 24))])
    with_mask = ready(FullRange(folder(parts, augmentations=augmentations), CAMERA)).test_data[0]
    assert with_mask.image.shape == (3, 16, 24)
    assert with_mask.gt_mask.shape == (16, 24)
    flipped = Compose([RandomHorizontalFlip(1)])
    bad = ready(FullRange(folder(parts, augmentations=flipped), CAMERA)).test_data[0]
    assert bad.gt_label == 1
    np.testing.assert_allclose(bad.image[0], values(0)[:, ::-1] / 4095, atol=1e-6)
    assert bad.gt_mask[:, 6:].all()
    assert not bad.gt_mask[:, :6].any()


def test_batches_are_as_those_of_any_data_module(parts):
    batch = next(iter(ready(FullRange(folder(parts), CAMERA)).val_dataloader()))
    assert batch.image.shape == (8, 3, 8, 12)
    assert batch.gt_label.sum() == 4
    assert 0.05 < float(batch.image.mean()) < 0.95


@pytest.mark.parametrize("part", ["val", "test"])
def test_synthetic_anomalies_are_refused(parts, part):
    with pytest.raises(ValueError, match="synthetic anomalies on images that it reads as 8-bit images"):
        FullRange(folder(parts, **{f"{part}_split_mode": "synthetic"}), CAMERA)


@pytest.mark.parametrize("make", [lambda **settings: FullRange(folder("parts"), **settings), MVTecLOCOAD])
def test_a_range_that_is_none_is_refused_before_anything_is_read(make):
    with pytest.raises(ValueError, match="value_range must be two finite numbers"):
        make(value_range=(1, 0))


def test_pictures_to_predict(parts):
    data = FullRangePredictDataset(parts / "good", value_range=CAMERA)
    assert [item.image_path for item in data] == [item.image_path for item in PredictDataset(parts / "good")]
    for item in data:
        assert_as_in_the_file(item)
    assert FullRangePredictDataset(parts / "bad", Resize((4, 4)), CAMERA)[0].image.shape == (3, 4, 4)


@pytest.fixture
def category(tmp_path):
    """A category in LOCO's layout, with a scratch."""
    for part in ("train/good", "validation/good", "test/good", "test/logical_anomalies"):
        save(tmp_path / "tray" / part / "000.png", values(0))
    mask = np.zeros((8, 12), np.uint8)
    mask[0] = 255
    save(tmp_path / "tray/ground_truth/logical_anomalies/000/000.png", mask)
    entry = {"defect_name": "scratch", "pixel_value": 255, "saturation_threshold": 1.0, "relative_saturation": True}
    (tmp_path / "tray/defects_config.json").write_text(json.dumps([entry]))
    return tmp_path / "tray"


def test_categories_in_locos_layout_have_all_sixteen_bits_or_the_range_of_the_camera(category):
    np.testing.assert_allclose(LOCODataset(category, "train")[0].image[0], values(0) / 65535, atol=1e-6)
    data = ready(MVTecLOCOAD(category.parent, "tray", num_workers=0, value_range=CAMERA))
    for part in (data.train_data, data.val_data, data.test_data):
        for item in part:
            assert_as_in_the_file(item)


def test_a_mask_of_sixteen_bits_does_not_pass_for_another_defect(category):
    folder = category / "ground_truth/logical_anomalies/000"
    mask = np.zeros((8, 12), np.uint16)
    mask[0] = 300
    save(folder / "000.png", mask)
    # As anomalib reads it, 300 is 255.
    with pytest.raises(ValueError, match=r"must contain exactly one .* from \[255\] .* not \[300\]"):
        read_defects(folder)
    mask[0] = 255
    save(folder / "000.png", mask)
    assert torch.equal(read_defects(folder).masks[0], torch.from_numpy(mask > 0).byte())
