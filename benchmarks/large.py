"""An image of 8,000 x 6,000 pixels at its full size, with anomalib's tiler.

Run as ``python -m benchmarks.large``, on Linux. Each model is fitted to two such images and scores a third one with a
white square, in a separate process. The models store statistics for each cell, and there are 187,500 cells at stride
16. Few channels are therefore whitened, and the grid of the prototypes is coarser.
"""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from anomalib.callbacks import TilerConfigurationCallback
from anomalib.data import PredictDataset
from anomalib.engine import Engine
from jsonargparse import auto_cli
from lightning.pytorch import seed_everything
from PIL import Image

from anomalib_ot import Foct, Pradot, WtFlow
from anomalib_ot.offline import offline_backbone

from .load import drawn
from .watch import peak_memory, timed

HEIGHT, WIDTH, TILE = 6000, 8000, 1000
# Top, left and side of the defect.
DEFECT = (2600, 5200, 160)
LAYER = ["blocks.4"]
# Settings that limit the memory with this number of cells.
FRUGAL: dict[str, tuple[type, dict[str, Any]]] = {
    "Pradot": (Pradot, {"prototypes_per_cell": 0.01, "whitened_channels": 16, "epochs": 2, "batch_size": 1}),
    "WtFlow": (WtFlow, {"whitened_channels": 16, "training_steps": 20, "batch_size": 1}),
    "Foct": (Foct, {"foreground_ratio": 0.005, "background_ratio": 0.005, "rotations": 1}),
}


def main(names: tuple[str, ...] = tuple(FRUGAL), threads: int = 2, seed: int = 0) -> None:
    """Print time and memory of fitting and scoring, and the position of the highest pixel.

    Args:
        names: Models to run.
        threads: Number of threads for torch.
        seed: Random seed.
    """
    with TemporaryDirectory() as folder:
        draw(Path(folder), seed)
        for name in names:
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                print(pool.submit(run, name, Path(folder), threads, seed).result(), flush=True)


def draw(root: Path, seed: int) -> None:
    """Write two normal images for training, one for testing and one with a defect."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 160, (60, 80, 3), dtype=np.uint8))
    part = np.asarray(coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)).astype(np.int16)
    for kind, number in (("good", 2), ("good_test", 1), ("bad", 1)):
        (root / kind).mkdir()
        for index in range(number):
            image = part + generator.integers(0, 20, (HEIGHT // 4, WIDTH // 4, 1)).repeat(4, 0).repeat(4, 1)
            if kind == "bad":
                top, left, side = DEFECT
                image[top : top + side, left : left + side] = 255
            Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(root / kind / f"{index}.png", compress_level=1)


def run(name: str, root: Path, threads: int, seed: int) -> str:
    """Fit a model, score the image with the defect, and return time and memory as text."""
    torch.set_num_threads(threads)
    seed_everything(seed, workers=True, verbose=False)
    kind, frugal = FRUGAL[name]
    model = kind(offline_backbone(), LAYER, image_size=(HEIGHT, WIDTH), evaluator=False, visualizer=False, **frugal)
    tiler = TilerConfigurationCallback(enable=True, tile_size=TILE, stride=TILE)
    with TemporaryDirectory() as folder:
        engine = Engine(
            default_root_dir=folder, accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[tiler]
        )
        _, fitted = timed(lambda: engine.fit(model, datamodule=drawn(root, 1)))
        predictions, scored = timed(lambda: engine.predict(model, dataset=PredictDataset(root / "bad")))
    row, column = divmod(int(predictions[0].anomaly_map[0].squeeze().argmax()), WIDTH)
    top, left, side = DEFECT
    where = "in" if top <= row < top + side and left <= column < left + side else "outside"
    return (
        f"{name}: fitted in {fitted:.0f} s, scored in {scored:.0f} s, {peak_memory():.1f} GB peak; "
        f"the highest pixel is {where} the defect"
    )


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
