"""Small random images and an engine for them."""

import numpy as np
import pytest
from anomalib.data import Folder
from anomalib.engine import Engine
from PIL import Image


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """A folder of grey squares; the abnormal ones have a white patch."""
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for split, count in (("good", 10), ("good_test", 4), ("bad", 4), ("mask", 4)):
        (folder / split).mkdir()
        for index in range(count):
            picture = generator.integers(90, 110, (72, 80), dtype=np.uint8)
            if split == "mask":
                picture[:] = 0
            if split in {"bad", "mask"}:
                picture[20:50, 20:50] = 255
            Image.fromarray(picture).save(folder / split / f"{index}.png")
    return folder


@pytest.fixture
def data(root):
    def make(**arguments):
        defaults = {
            "normal_dir": "good",
            "abnormal_dir": "bad",
            "normal_test_dir": "good_test",
            "mask_dir": "mask",
            "train_batch_size": 4,
            "eval_batch_size": 4,
            "num_workers": 0,
            "val_split_mode": "same_as_test",
        }
        return Folder(name="squares", root=root, **{**defaults, **arguments})

    return make


@pytest.fixture
def engine(tmp_path):
    def make(**arguments):
        return Engine(
            default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_progress_bar=False, **arguments
        )

    return make


@pytest.fixture
def checkpoint():
    """Where an engine left its checkpoint."""
    return lambda engine: engine.trainer.checkpoint_callback.best_model_path
