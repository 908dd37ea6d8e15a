"""Fit, test and time one model."""

import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from anomalib.data import AnomalibDataModule
from anomalib.engine import Engine
from anomalib.models.components import AnomalibModule
from lightning.pytorch import seed_everything

# Standard output is reserved for the results.
QUIET: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False}


def measure(
    build: Callable[[], AnomalibModule],
    data: AnomalibDataModule,
    seed: int = 0,
    accelerator: str = "cpu",
) -> tuple[AnomalibModule, dict[str, float]]:
    """Fit and test one model.

    Args:
        build: Creates the model, with the test metrics in its evaluator.
        data: Images to fit and test on.
        seed: Seed of all random numbers.
        accelerator: Accelerator of the trainer.

    Returns:
        The fitted model, and the test metrics in percent with ``fit_s``, which includes the validation that sets the
        thresholds, and ``ms_per_image``, the median time of the network alone on single images.
    """
    seed_everything(seed, workers=True, verbose=False)
    model = build()
    with TemporaryDirectory() as folder:
        engine = Engine(default_root_dir=Path(folder), accelerator=accelerator, logger=False, **QUIET)
        start = time.perf_counter()
        engine.fit(model, datamodule=data)
        fit_s = time.perf_counter() - start
        metrics = engine.test(model, datamodule=data, verbose=False)[0]
        device = engine.trainer.strategy.root_device
    result = {name: 100 * value for name, value in metrics.items()}
    return model, {**result, "fit_s": fit_s, "ms_per_image": 1000 * seconds_per_image(model, device)}


@torch.inference_mode()
def seconds_per_image(model: AnomalibModule, device: torch.device) -> float:
    """Median time of the fitted network on one image, at the size of the pre-processor's output.

    Args:
        model: The model. It is moved to the CPU afterwards, as trainers do.
        device: Device to run on.

    Returns:
        Seconds until the device has finished.
    """
    image = torch.rand(1, 3, 256, 256, device=device)
    transform = getattr(model.pre_processor, "transform", None)
    image = transform(image) if transform else image
    model.to(device).eval()

    def score() -> None:
        model.model(image)
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    seconds = median_seconds(score)
    model.cpu()
    return seconds


def median_seconds(function: Callable[[], object], repeats: int = 20) -> float:
    """Median wall time of a function, after two calls to warm up."""
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return sorted(times[2:])[repeats // 2]
