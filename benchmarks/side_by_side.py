"""Fit and test models on the same images, backbone and size, and measure them alike."""

import time
from collections.abc import Callable
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from anomalib.data import AnomalibDataModule
from anomalib.engine import Engine
from anomalib.metrics import AUPRO, AUROC, Evaluator
from anomalib.models import Padim, Patchcore
from anomalib.models.components import AnomalibModule
from anomalib.pre_processing import PreProcessor
from lightning.pytorch import seed_everything

from anomalib_ot import Pradot

IMAGE_SIZE = (224, 224)


def parts(backbone: str) -> dict[str, Any]:
    """Arguments that each model shares: one backbone, its own statistics, one size, the same metrics."""
    return {
        "backbone": backbone,
        "pre_processor": pre_processor(backbone),
        "evaluator": Evaluator(
            test_metrics=[
                AUROC(fields=["pred_score", "gt_label"], prefix="image_"),
                AUROC(fields=["anomaly_map", "gt_mask"], prefix="pixel_", strict=False),
                AUPRO(fields=["anomaly_map", "gt_mask"], prefix="pixel_", strict=False),
            ],
        ),
        "visualizer": False,
    }


def pre_processor(backbone: str) -> PreProcessor:
    """Resize to ``IMAGE_SIZE`` and normalise as the backbone asks."""
    return Pradot.configure_pre_processor(IMAGE_SIZE, backbone)


def models(backbone: str, prototypes_per_cell: tuple[int, int] = (4, 16)) -> dict[str, Callable[[], AnomalibModule]]:
    """The models compared, by name, on EfficientNet-Lite0's layers.

    Args:
        backbone: The backbone of all of them.
        prototypes_per_cell: Pradot's prototypes on the finer and on the coarser layer. The paper's 16 on both, with its
            batch of 64, take four times as long.
    """
    two = ("blocks.2", "blocks.4")
    return {
        "Pradot": lambda: Pradot(layers=two, prototypes_per_cell=prototypes_per_cell, batch_size=32, **parts(backbone)),
        "PaDiM": lambda: Padim(layers=["blocks.1", *two], n_features=100, **parts(backbone)),
        "PatchCore 1 %": lambda: Patchcore(layers=two, coreset_sampling_ratio=0.01, **parts(backbone)),
    }


def measure(
    build: Callable[[], AnomalibModule], data: AnomalibDataModule, seed: int = 0
) -> tuple[AnomalibModule, dict[str, float]]:
    """Fit and test one model.

    Args:
        build: Makes the model.
        data: Images to fit and test on.
        seed: Seed of everything random.

    Returns:
        The fitted model, and the test metrics in percent, ``fit_s`` with the validation that sets the thresholds, and
        ``ms_per_image``, the median of the network alone on one image at a time.
    """
    seed_everything(seed, workers=True, verbose=False)
    model = build()
    engine = Engine(default_root_dir=Path(mkdtemp()), accelerator="cpu", logger=False, enable_progress_bar=False)
    start = time.perf_counter()
    engine.fit(model, datamodule=data)
    fit_s = time.perf_counter() - start
    metrics = engine.test(model, datamodule=data, verbose=False)[0]
    result = {name: 100 * value for name, value in metrics.items()}
    return model, {**result, "fit_s": fit_s, "ms_per_image": 1000 * seconds_per_image(model)}


@torch.inference_mode()
def seconds_per_image(model: AnomalibModule) -> float:
    """Median time of the fitted network on one pre-processed image."""
    image = torch.rand(1, 3, *IMAGE_SIZE)
    model.eval()
    return median_seconds(lambda: model.model(image))


def median_seconds(function: Callable[[], object], repeats: int = 20) -> float:
    """Median wall time of a function, after two calls to warm up."""
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return sorted(times[2:])[repeats // 2]
