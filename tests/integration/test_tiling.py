"""Large pictures through anomalib's tiler, as its own models take them."""

import numpy as np
import pytest
import torch
from anomalib.callbacks import TilerConfigurationCallback
from anomalib.data import Folder, PredictDataset
from anomalib.data.utils.tiler import ImageUpscaleMode, Tiler
from anomalib.engine import Engine
from PIL import Image

from anomalib_ot import Duo, FewShot, Foct, Pradot, WtFlow

SIZE = (96, 160)
SHARED = {"layers": ["layer2"], "pre_trained": False, "evaluator": False, "visualizer": False}
MODELS = {
    "Pradot": lambda **given: Pradot(**{"prototypes_per_cell": 1, "epochs": 1, "batch_size": 2, **SHARED, **given}),
    "Foct": lambda **given: Foct(**{"rotations": 1, "support_steps": 1, **SHARED, **given}),
    "WtFlow": lambda **given: WtFlow(**{"width": 16, "training_steps": 2, "batch_size": 2, **SHARED, **given}),
    "Duo": lambda **given: Duo(
        pradot={"prototypes_per_cell": 1, "epochs": 1},
        wt_flow={"width": 16, "training_steps": 2},
        batch_size=2,
        **{**SHARED, **given},
    ),
}


# Size of the image and stride of the tiles.
TILES = {"side by side": (SIZE, 32), "overlapping": (SIZE, 16), "padded": ((80, 136), 32)}


def draw(path, size, generator, defect=None):
    """A picture of coarse colours, the same each time but for noise, with a white square where there is a defect."""
    height, width = size
    coarse = np.random.default_rng(0).integers(0, 160, (6, 10, 3), dtype=np.uint8)
    picture = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.NEAREST)).astype(np.int16)
    picture += generator.integers(0, 20, (height // 4, width // 4, 1)).repeat(4, 0).repeat(4, 1)[:height, :width]
    if defect is not None:
        top, left, side = defect
        picture[top : top + side, left : left + side] = 255
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(path, compress_level=1)


def pictures(root, size, defect):
    generator = np.random.default_rng(1)
    for kind, number in (("good", 8), ("good_test", 2)):
        for index in range(number):
            draw(root / kind / f"{index}.png", size, generator)
    draw(root / "bad" / "0.png", size, generator, defect)
    return Folder(
        "large",
        root=root,
        normal_dir="good",
        normal_test_dir="good_test",
        abnormal_dir="bad",
        train_batch_size=2,
        eval_batch_size=1,
        num_workers=0,
        val_split_mode="same_as_test",
    )


def anomaly_map(model, data, root, tile_size, stride):
    """The map of the defective picture, from a model that sees tiles alone, in training and afterwards."""
    model.model.feature_extractor.register_forward_pre_hook(
        lambda _, images: pytest.fail(f"an image of {images[0].shape}") if images[0].shape[-1] > tile_size else None
    )
    tiler = TilerConfigurationCallback(enable=True, tile_size=tile_size, stride=stride)
    engine = Engine(
        default_root_dir=root, accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[tiler]
    )
    engine.fit(model, datamodule=FewShot(data, 2) if isinstance(model, Foct) else data)
    (prediction,) = engine.predict(model, dataset=PredictDataset(root / "bad"))
    return prediction.anomaly_map[0].squeeze()


def highest(anomaly_map):
    return divmod(int(anomaly_map.argmax()), anomaly_map.shape[-1])


@pytest.mark.in_turn
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("tiles", TILES)
def test_a_defect_is_found_where_it_is(name, tiles, tmp_path):
    size, stride = TILES[tiles]
    torch.manual_seed(0)
    data = pictures(tmp_path, size, (40, 104, 16))
    model = MODELS[name](backbone="resnet18", image_size=size)
    found = anomaly_map(model, data, tmp_path, 32, stride)
    assert found.shape == size
    row, column = highest(found)
    assert 36 <= row < 60
    assert 100 <= column < 124


@pytest.mark.parametrize("name", MODELS)
def test_one_tile_is_the_picture(name):
    model = MODELS[name](backbone="resnet18", image_size=SIZE).model.eval()
    images = torch.rand(3, 3, *SIZE)
    whole = model.extract(images)
    model.tiler = Tiler(SIZE, SIZE)
    tiled = model.extract(images)
    torch.testing.assert_close(tiled, whole, rtol=1e-4, atol=1e-4)


def test_each_cell_is_of_the_tile_that_it_is_in():
    model = MODELS["Pradot"](backbone="resnet18").model.eval()
    images = torch.rand(2, 3, 96, 160)
    model.tiler = Tiler((32, 64), (32, 64))
    tiled = model.extract(images)["layer2"]
    model.tiler = None
    assert tiled.shape[-2:] == (12, 24 - 4)
    alone = model.extract(images[:, :, 32:64, 64:128])["layer2"]
    torch.testing.assert_close(tiled[:, :, 4:8, 8:16], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("tiler", "reason"),
    [
        (Tiler(32, 12), r"of layer layer2, which have about \(8, 8\) pixels"),
        (Tiler(128, 128), "exceeds image size"),
        (Tiler(32, 32, mode=ImageUpscaleMode.INTERPOLATION), "must be padding, not interpolation"),
    ],
)
@pytest.mark.parametrize("name", MODELS)
def test_tiles_that_do_not_do_are_refused(name, tiler, reason):
    model = MODELS[name](backbone="resnet18").model.eval()
    model.tiler = tiler
    with pytest.raises(ValueError, match=reason):
        model.extract(torch.rand(1, 3, *SIZE))
