"""The whole four-part model of the paper on features of the shape of ResNet-50, including extraction.

Run as ``python -m benchmarks.whole``. Pradot has the paper's size: two layers, two α, 16 prototypes per cell, batches
of 64 and up to 50 epochs. The weights are random, because only the shapes matter.
"""

import time
from pathlib import Path
from tempfile import mkdtemp
from typing import Literal

import torch
from anomalib.engine import Engine
from jsonargparse import auto_cli
from lightning.pytorch import seed_everything

from anomalib_ot import Assembly, Pradot

from .watch import peak_memory


def main(images: int = 320, threads: int = 2, seed: int = 0, accelerator: Literal["cpu", "cuda"] = "cpu") -> None:
    """Print the seconds and the peak memory of a fit.

    Args:
        images: Number of training images.
        threads: Number of threads for torch.
        seed: Random seed.
        accelerator: Device to train on.
    """
    torch.set_num_threads(threads)
    seed_everything(seed, workers=True, verbose=False)
    folder = Path(mkdtemp())
    data = Assembly(folder, n_train=images)
    data.prepare_data()
    size = {"prototypes_per_cell": 16, "batch_size": 64, "epochs": 50}
    model = Pradot(pre_trained=False, evaluator=False, visualizer=False, **size)
    engine = Engine(default_root_dir=folder, accelerator=accelerator, logger=False, limit_val_batches=0)
    start = time.perf_counter()
    engine.fit(model, datamodule=data)
    seconds = time.perf_counter() - start
    _, prototypes = next(model.model.by_layer())
    where = f"{threads} threads" if accelerator == "cpu" else torch.cuda.get_device_name()
    print(
        f"{images} images, {int(prototypes.steps)} steps of four solves, {where}, seed {seed}: {seconds:.0f} s, "
        f"peak {peak_memory(accelerator):.1f} GB, {model.model.count} prototypes after compression"
    )


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
