"""Time and memory of fitting and predicting for different numbers of images.

Run as ``python -m benchmarks.load``, on Linux. Each fit and each prediction runs in a separate process. Only the
feature cache should grow with the number of images, up to its budget; with ``--feature_cache disk`` or ``none``,
nothing should. Memory is reported without and with the pages of files. Pages of a cache on disk stay resident as long
as no other process needs the memory.

``anomalib predict`` keeps every image with its map and mask until it ends, unless ``--return_predictions false`` is
set. The first number of images is predicted both ways.
"""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch
from anomalib.data import Folder, PredictDataset
from anomalib.engine import Engine
from jsonargparse import auto_cli
from lightning.pytorch import seed_everything
from PIL import Image
from torch.utils.data import DataLoader

from anomalib_ot import FewShot, Foct, Pradot, WtFlow
from anomalib_ot.features.store import CachePlace
from anomalib_ot.offline import offline_backbone

from .watch import peak_memory, timed, watched

Name = Literal["Pradot", "Foct", "WtFlow"]
BATCH = 32
TEST = 8
# Foct has no cache and is always fitted to this number of images.
SHOTS = 4


def main(
    model: Name = "Pradot",
    pictures: tuple[int, ...] = (1000, 10000),
    size: int = 256,
    image_size: int = 128,
    feature_cache: CachePlace = "auto",
    threads: int = 2,
    seed: int = 0,
) -> None:
    """Print seconds and memory for each number of images.

    Args:
        model: Model to fit. Pradot trains for two epochs with one prototype per cell, WtFlow for fifty steps.
        pictures: Numbers of images to fit and to predict.
        size: Height and width of the images, in pixels.
        image_size: Height and width that the model resizes them to.
        feature_cache: Where the model keeps features.
        threads: Number of threads for torch.
        seed: Random seed.
    """
    for count in pictures:
        with TemporaryDirectory() as folder:
            root = Path(folder)
            draw(root, count, size, seed)
            report(f"{model} fits {count} images", fit, root, model, image_size, feature_cache, threads, seed)
            report(f"{model} predicts {count} images", predict, root, model, threads)
            if count == pictures[0]:
                report(f"{model} predicts {count} images and keeps all", predict_and_keep, root, model, threads)


def draw(root: Path, count: int, size: int, seed: int) -> None:
    """Write images of one part under varying light: ``count`` for training and a few for testing."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 256, (12, 12, 3), dtype=np.uint8))
    part = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), np.float32)
    for kind, number in (("good", count), ("good_test", TEST), ("bad", TEST)):
        (root / kind).mkdir()
        for index in range(number):
            noise = generator.normal(0, 8, (size // 4, size // 4, 3)).repeat(4, 0).repeat(4, 1)
            image = part * generator.uniform(0.9, 1.1) + noise
            if kind == "bad":
                image[size // 4 : size // 2, size // 4 : size // 2] = 255
            Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(root / kind / f"{index:06d}.jpg")


def drawn(root: Path, batch: int) -> Folder:
    """The images in ``good``, ``good_test`` and ``bad``, in batches of a size."""
    return Folder(
        "drawn",
        root=root,
        normal_dir="good",
        normal_test_dir="good_test",
        abnormal_dir="bad",
        train_batch_size=batch,
        eval_batch_size=batch,
        num_workers=0,
        val_split_mode="same_as_test",
    )


def report(name: str, work: Callable[..., None], *arguments: Any) -> None:
    """Call a function in a separate process, and print its time and memory."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        seconds, before, highest, resident = pool.submit(_measured, work, *arguments).result()
    print(
        f"{name}: {seconds:.0f} s, peak {highest:.2f} GB, of which {before:.2f} GB before the call, "
        f"{resident:.2f} GB with pages of files",
        flush=True,
    )


def fit(root: Path, name: Name, image_size: int, feature_cache: CachePlace, threads: int, seed: int) -> None:
    """Fit a model and save its checkpoint."""
    torch.set_num_threads(threads)
    seed_everything(seed, workers=True, verbose=False)
    shared = {
        "backbone": offline_backbone(),
        "layers": ["blocks.4"],
        "image_size": (image_size, image_size),
        "evaluator": False,
        "visualizer": False,
    }
    cached = {"feature_cache": feature_cache}
    makers: dict[Name, Callable[[], Any]] = {
        "Pradot": lambda: Pradot(prototypes_per_cell=1, epochs=2, **cached, **shared),
        "WtFlow": lambda: WtFlow(training_steps=50, **cached, **shared),
        "Foct": lambda: Foct(rotations=1, **shared),
    }
    folder = drawn(root, BATCH)
    engine = Engine(default_root_dir=root, accelerator="cpu", logger=False, enable_progress_bar=False)
    engine.fit(makers[name](), datamodule=FewShot(folder, SHOTS) if name == "Foct" else folder)
    engine.trainer.save_checkpoint(root / "model.ckpt")


def predict(root: Path, name: Name, threads: int) -> None:
    """Predict all training images in batches, and discard each result."""
    _predict(root, name, threads, keep=False)


def predict_and_keep(root: Path, name: Name, threads: int) -> None:
    """Predict all training images in batches, and keep all results until the end, the default of anomalib."""
    _predict(root, name, threads, keep=True)


def _predict(root: Path, name: Name, threads: int, *, keep: bool) -> None:
    torch.set_num_threads(threads)
    kind = {"Pradot": Pradot, "Foct": Foct, "WtFlow": WtFlow}[name]
    model = kind.load_from_checkpoint(root / "model.ckpt")
    data = PredictDataset(root / "good")
    loader = DataLoader(data, batch_size=BATCH, collate_fn=data.collate_fn)
    engine = Engine(default_root_dir=root, accelerator="cpu", logger=False, enable_progress_bar=False)
    engine.predict(model, dataloaders=loader, return_predictions=keep)


def _measured(work: Callable[..., None], *arguments: Any) -> tuple[float, float, float, float]:
    """Seconds; GB without pages of files before and at the peak; GB with pages of files at the peak."""
    with watched(_own_memory, 0.02) as readings:
        _, seconds = timed(lambda: work(*arguments))
    return seconds, readings[0], max(readings), peak_memory()


def _own_memory() -> float:
    """Resident memory of this process without pages of files, in GB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024 / 1e9


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
