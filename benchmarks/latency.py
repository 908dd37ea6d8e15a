"""What scoring a picture takes, in each runtime, of our models beside the host's and the backbone alone.

Run as ``python -m benchmarks.latency``, with nothing else on the machine. All models are fitted on the embedded
category, with one backbone and one size, and timed whole, with their pre- and post-processing. The backbone alone is
the same network up to the same layers, in the same runtime.
"""

import platform
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
import openvino
import torch
from anomalib.data import AnomalibDataModule
from anomalib.deploy import CompressionType
from anomalib.engine import Engine
from anomalib.models.components import AnomalibModule
from jsonargparse import auto_cli
from lightning.pytorch import seed_everything
from openvino import AsyncInferQueue, CompiledModel, Model
from torch import nn
from torchvision.transforms.v2 import Resize

from anomalib_ot import Assembly, FewShot
from anomalib_ot.comparison.measure import QUIET
from anomalib_ot.components.backbones import create_extractor
from anomalib_ot.components.extraction import extract_by_parts
from anomalib_ot.offline import offline_backbone

from .side_by_side import FLOAT, IMAGE_SIZE, models

# Of OpenVINO: the exported file, which takes batches of any size, and the same for one picture at a time.
OPEN, ONE = "OpenVINO, any batch", "OpenVINO, batch of 1"
STREAMS = (1, 2)
PICTURES, WARM_UP = 200, 20
# Training pictures of Foct.
SHOTS = 4


class Times(NamedTuple):
    """Milliseconds of a picture, the median and the 99th percentile, and pictures a second."""

    median: float
    worst: float
    rate: float


Runs = dict[str, Times]


def main(
    per_cell: tuple[int, int] = (4, 16),
    images: int = 60,
    threads: int = 2,
    seed: int = 0,
    names: list[str] = ["Pradot", "WtFlow", "Foct", "PatchCore", "PaDiM"],  # noqa: B006 - jsonargparse shows the default
) -> None:
    """Print a table of latencies.

    Args:
        per_cell: Pradot's prototypes a cell on the finer and on the coarser layer, before compression.
        images: Pictures to fit on.
        threads: Threads of each runtime.
        seed: Seed of everything random.
        names: Models to time.
    """
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    packages = ", ".join(f"{name} {version(name)}" for name in ("anomalib", "torch", "onnxruntime", "openvino", "nncf"))
    print(f"{packages}, Python {platform.python_version()}, {threads} threads, {images} pictures, seed {seed}")
    folder, backbone = Path(mkdtemp()), offline_backbone()
    # Calibrating an export of one size takes pictures of this size.
    whole = Assembly(folder / "data", n_train=images, augmentations=Resize(IMAGE_SIZE))
    builds = models(backbone, per_cell)
    floors: dict[tuple[str, ...], Runs] = {}
    print("\n| model | form | median, ms | 99 %, ms | pictures a second | backbone, ms | ratio |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in names:
        data = FewShot(whole, SHOTS, seed) if name == "Foct" else whole
        model = fit(builds[name], data, seed, folder)
        layers = tuple(model.model.feature_extractor.layers)
        if layers not in floors:
            floors[layers] = time_backbone(create_extractor(backbone, layers), threads)
        print_rows(name, time_model(model, data, folder / name, threads), floors[layers])


def print_rows(name: str, runs: Runs, floor: Runs) -> None:
    """Print a row for each form."""
    for form, times in runs.items():
        # What runs in eight bits is to be compared with the backbone in single precision.
        alone = floor.get(form, floor[ONE]).median
        print(
            f"| {name} | {form} | {times.median:.2f} | {times.worst:.2f} | {times.rate:.0f} | {alone:.2f} | "
            f"{times.median / alone:.2f} |",
            flush=True,
        )


def fit(build: Callable[[], AnomalibModule], data: AnomalibDataModule, seed: int, folder: Path) -> AnomalibModule:
    """Fit a model on the CPU."""
    seed_everything(seed, workers=True, verbose=False)
    model = build()
    Engine(default_root_dir=folder, accelerator="cpu", logger=False, **QUIET).fit(model, datamodule=data)
    return model.eval()


@torch.inference_mode()
def time_backbone(extractor: nn.Module, threads: int) -> Runs:
    """The extractor alone, in each runtime."""
    image = picture()
    example = torch.from_numpy(image)
    runs = in_torch(lambda images: extract_by_parts(extractor, images), extractor, example)
    path = Path(mkdtemp()) / "backbone.onnx"
    with torch.inference_mode(mode=False):
        # An example of one would fix the batch at one.
        batch = {0: torch.export.Dim("batch")}
        torch.onnx.export(
            extractor, (example.repeat(2, 1, 1, 1),), path, dynamo=True, dynamic_shapes=(batch,), verbose=False
        )
    runs["ONNX Runtime"] = quantiles(in_onnx(path, threads), image)
    return runs | in_openvino(openvino.convert_model(path), threads)


def time_model(model: AnomalibModule, data: AnomalibDataModule, folder: Path, threads: int) -> Runs:
    """A fitted model, whole, in each runtime."""
    image = picture()
    with torch.inference_mode():
        runs = in_torch(model, model, torch.from_numpy(image))
    runs["ONNX Runtime"] = quantiles(in_onnx(model.to_onnx(folder, input_size=IMAGE_SIZE), threads), image)
    exported = openvino.Core().read_model(model.to_openvino(folder, input_size=IMAGE_SIZE))
    runs |= in_openvino(exported, threads)
    small = openvino.Core().read_model(
        model.to_openvino(folder, "int8", IMAGE_SIZE, CompressionType.INT8_PTQ, datamodule=data)
    )
    runs["OpenVINO, INT8, batch of 1"] = quantiles(compiled(of_one(small), threads), image)
    return runs


def in_torch(eager: Callable[[torch.Tensor], Any], module: nn.Module, image: torch.Tensor) -> Runs:
    """Eager and compiled."""
    return {
        "torch": quantiles(eager, image),
        "torch.compile": quantiles(torch.compile(module.forward, dynamic=False), image),
    }


def in_onnx(path: Path, threads: int) -> Callable[[np.ndarray], Any]:
    """An ONNX file as a function of a picture."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda image: session.run(None, {name: image})


def in_openvino(model: Model, threads: int) -> Runs:
    """As exported and for one picture at a time, in single precision and in what OpenVINO takes by itself."""
    image = picture()
    one = of_one(model)
    return {
        OPEN: quantiles(compiled(model, threads, **FLOAT), image),
        ONE: quantiles(compiled(one, threads, **FLOAT), image),
        f"{ONE}, default precision": quantiles(compiled(one, threads), image),
        **{f"{ONE}, {streams} streams": in_streams(one, threads, streams) for streams in STREAMS},
    }


def compiled(model: Model, threads: int, hint: str = "LATENCY", **settings: str) -> CompiledModel:
    """A model on the CPU."""
    settings |= {"PERFORMANCE_HINT": hint, "INFERENCE_NUM_THREADS": str(threads)}
    return openvino.Core().compile_model(model, "CPU", settings)


def of_one(model: Model) -> Model:
    """The same model for one picture at a time."""
    one = model.clone()
    one.reshape([1, 3, *IMAGE_SIZE])
    return one


def in_streams(model: Model, threads: int, streams: int) -> Times:
    """So many pictures at a time, in single precision."""
    queue = AsyncInferQueue(compiled(model, threads, "THROUGHPUT", NUM_STREAMS=str(streams), **FLOAT), streams)
    starts: list[float] = []
    times: list[float] = []
    queue.set_callback(lambda _, start: times.append(1000 * (time.perf_counter() - start)))
    image = picture()
    for _ in range(PICTURES + WARM_UP):
        queue.get_idle_request_id()
        starts.append(time.perf_counter())
        queue.start_async([image], starts[-1])
    queue.wait_all()
    rate = PICTURES / (time.perf_counter() - starts[WARM_UP])
    return summary(times)._replace(rate=rate)


def picture() -> np.ndarray:
    """A random picture (1, 3, h, w) in [0, 1]."""
    return np.random.default_rng(0).random((1, 3, *IMAGE_SIZE), dtype=np.float32)


def quantiles(function: Callable[[Any], object], image: Any) -> Times:
    """Times of a function of a picture, one call after another."""
    times = []
    for _ in range(PICTURES + WARM_UP):
        start = time.perf_counter()
        function(image)
        times.append(1000 * (time.perf_counter() - start))
    return summary(times)


def summary(times: list[float]) -> Times:
    """Of milliseconds, without those of the warm-up."""
    median, worst = np.quantile(times[WARM_UP:], (0.5, 0.99))
    return Times(float(median), float(worst), 1000 / float(np.mean(times[WARM_UP:])))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
