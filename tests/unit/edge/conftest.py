"""A small exported model with a calibration, and images for it."""

import numpy as np
import pytest
import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from PIL import Image

from anomalib_ot import WtFlow

SIZE = (64, 64)


@pytest.fixture(scope="package")
def images(tmp_path_factory):
    """A folder of grey squares; the abnormal ones have a patch that is slightly brighter."""
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for split, count in (("good", 9), ("good_test", 2), ("bad", 3)):
        (folder / split).mkdir()
        for index in range(count):
            pixels = generator.integers(90, 110, (72, 80, 3), dtype=np.uint8)
            if split == "bad":
                pixels[20:50, 20:50] += np.uint8(4 * index + 2)
            Image.fromarray(pixels).save(folder / split / f"{index}.png")
    return folder


@pytest.fixture(scope="package")
def exported(images, tmp_path_factory):
    """The folder of an exported model."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("exported")
    settings = {"layers": ["layer3"], "pre_trained": False, "image_size": SIZE, "visualizer": False, "evaluator": False}
    model = WtFlow(
        "test_resnet", width=16, whitened_channels=8, training_steps=2, batch_size=4, global_modes=0, **settings
    )
    splits = {"normal_dir": "good", "abnormal_dir": "bad", "normal_test_dir": "good_test"}
    data = Folder("squares", **splits, root=images, num_workers=0, val_split_mode="same_as_test", seed=0)
    engine = Engine(default_root_dir=folder, accelerator="cpu", logger=False, enable_progress_bar=False)
    engine.fit(model, datamodule=data)
    return model.to_openvino(folder / "export").parent
