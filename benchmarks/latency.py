"""Latency per image in each runtime, of our models, models of anomalib and the backbone only.

Run as ``python -m benchmarks.latency``, on an otherwise idle machine. All models are fitted to the embedded category
with the same backbone and image size. Their times include pre- and post-processing. The time of the backbone is that of
the same network up to the same layers, in the same runtime.
"""

import time
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

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
from openvino import AsyncInferQueue, Model
from torch import nn

from anomalib_ot import Assembly, FewShot
from anomalib_ot.comparison.measurement import QUIET
from anomalib_ot.export.checked import CheckedExport
from anomalib_ot.export.tolerance import ExportError
from anomalib_ot.features.backbones import create_extractor
from anomalib_ot.features.extraction import FLOAT32, extract_by_parts
from anomalib_ot.offline import offline_backbone

from .side_by_side import IMAGE_SIZE, models
from .versions import versions

# OpenVINO: the exported file, which accepts batches of any size, and the same model for one image at a time.
OPEN, ONE, DEFAULT, INT8 = (
    f"OpenVINO, {kind}" for kind in ("any batch", "batch of 1", "batch of 1, default precision", "batch of 1, INT8")
)
FORMS = ("torch", "torch.compile", "ONNX Runtime", OPEN, ONE, DEFAULT, INT8)
QUIETLY = {"verbose": False}
STREAMS = (1, 2)
PICTURES, WARM_UP = 200, 20
# Training images of Foct.
SHOTS = 4

Scoring = dict[str, Callable[[], object]]


def main(
    per_cell: tuple[int, int] = (4, 16),
    images: int = 60,
    threads: int = 2,
    seed: int = 0,
    names: tuple[str, ...] = ("Pradot", "WtFlow", "Duo", "Foct", "PatchCore", "PaDiM"),
    forms: tuple[str, ...] = FORMS,
) -> None:
    """Print tables of latencies and of throughputs.

    Args:
        per_cell: Pradot's prototypes per cell on the finer and on the coarser layer, before compression.
        images: Number of training images.
        threads: Number of threads for each runtime.
        seed: Random seed.
        names: Models to time.
        forms: Runtimes and forms to time; ``torch.compile`` takes minutes.
    """
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    packages = versions("anomalib", "torch", "onnxruntime", "openvino", "nncf")
    print(f"{packages}, {threads} threads, {images} images, seed {seed}")
    folder, backbone = Path(mkdtemp()), offline_backbone()
    whole = Assembly(folder / "data", n_train=images)
    builds = models(backbone, per_cell)
    rates, refused = [], []
    print("\n| model | form | median, ms | 99 %, ms | backbone, ms | ratio |\n| --- | --- | --- | --- | --- | --- |")
    for name in names:
        data = FewShot(whole, SHOTS, seed) if name == "Foct" else whole
        model = fit(builds[name], data, seed, folder)
        extractor = create_extractor(backbone, tuple(model.model.feature_extractor.layers))
        alone = backbone_file(extractor, folder / f"{name}.onnx")
        floor = scoring(lambda images, extractor=extractor: extract_by_parts(extractor, images), alone, threads, forms)
        is_ours = isinstance(model, CheckedExport)
        # Of anomalib's models, PatchCore exported for batches of any size cannot be read for one image.
        onnx_kwargs = QUIETLY if is_ours else QUIETLY | {"dynamic_axes": {}}
        exported = model.to_openvino(folder / name, input_size=IMAGE_SIZE, onnx_kwargs=onnx_kwargs)
        ours = scoring(model, exported, threads, forms)
        if not is_ours:
            del ours[OPEN]
        if "ONNX Runtime" in forms:
            onnx = model.to_onnx(folder / name, input_size=IMAGE_SIZE, **onnx_kwargs)
            ours["ONNX Runtime"] = in_onnx(onnx, threads)
            floor["ONNX Runtime"] = in_onnx(alone, threads)
        # Of anomalib's models, PaDiM in INT8 crashes OpenVINO.
        if INT8 in forms and is_ours:
            try:
                ours[INT8], floor[INT8] = in_int8(model, exported, data, threads)
            except ExportError as error:
                refused.append(f"{name}, {INT8}: {error}")
        for form in (form for form in ours if form in forms):
            print(latency_row(name, form, floor[form], ours[form]), flush=True)
        rates.append(rate_row(name, of_one(alone), of_one(exported), threads))
    print_rates(rates)
    print("\n".join(refused))


def print_rates(rows: list[str]) -> None:
    """Print the table of throughputs."""
    print(f"\n| model | {' | '.join(f'{count} streams' for count in STREAMS)} | backbone |")
    print("| --- | --- | --- | --- |\n" + "\n".join(rows))
    print(f"\nImages per second, single precision. {INT8}: the ratio is to the same model in single precision.")


def fit(build: Callable[[], AnomalibModule], data: AnomalibDataModule, seed: int, folder: Path) -> AnomalibModule:
    """Fit a model on the CPU."""
    seed_everything(seed, workers=True, verbose=False)
    model = build()
    Engine(default_root_dir=folder, accelerator="cpu", logger=False, **QUIET).fit(model, datamodule=data)
    return model.eval()


def backbone_file(extractor: nn.Module, path: Path, image_size: tuple[int, int] = IMAGE_SIZE) -> Path:
    """The extractor alone as an ONNX file for batches of any size."""
    # An example with one image would fix the batch size at one.
    example = torch.from_numpy(picture(image_size)).repeat(2, 1, 1, 1)
    batch = {0: torch.export.Dim("batch")}
    torch.onnx.export(extractor, (example,), path, dynamo=True, dynamic_shapes=(batch,), verbose=False)
    return path


def scoring(eager: Callable[[torch.Tensor], Any], exported: Path, threads: int, forms: tuple[str, ...]) -> Scoring:
    """Functions that score one image in torch and OpenVINO."""
    image = picture()

    def in_torch(function: Callable[[torch.Tensor], Any]) -> Callable[[], object]:
        return torch.inference_mode()(lambda: function(torch.from_numpy(image)))

    calls: Scoring = {"torch": in_torch(eager)}
    if "torch.compile" in forms:
        calls["torch.compile"] = in_torch(torch.compile(eager, dynamic=False))
    calls[OPEN] = compiled(openvino.Core().read_model(exported), threads, **FLOAT32)
    calls[ONE] = compiled(of_one(exported), threads, **FLOAT32)
    calls[DEFAULT] = compiled(of_one(exported), threads)
    return calls


def in_onnx(path: Path, threads: int) -> Callable[[], object]:
    """A function that scores one image with ONNX Runtime."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    image = {session.get_inputs()[0].name: picture()}
    return lambda: session.run(None, image)


def in_int8(
    model: CheckedExport,
    exported: Path,
    data: AnomalibDataModule,
    threads: int,
    image_size: tuple[int, int] = IMAGE_SIZE,
) -> tuple[Callable[[], object], Callable[[], object]]:
    """Functions that score one image in INT8, and with the same model in single precision."""
    small = model.to_openvino(
        exported.parent / "int8", "int8", image_size, CompressionType.INT8_PTQ, data, onnx_kwargs=QUIETLY
    )
    in_eight_bits, in_single = (
        compiled(of_one(path, image_size), threads, image_size, **FLOAT32) for path in (small, exported)
    )
    return in_eight_bits, in_single


def compiled(
    model: Model, threads: int, image_size: tuple[int, int] = IMAGE_SIZE, **settings: str
) -> Callable[[], object]:
    """A function that scores one image with OpenVINO."""
    settings |= {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": str(threads)}
    network, image = openvino.Core().compile_model(model, "CPU", settings), picture(image_size)
    return lambda: network(image)


def of_one(path: Path, image_size: tuple[int, int] = IMAGE_SIZE) -> Model:
    """An exported model for one image at a time."""
    one = openvino.Core().read_model(path)
    one.reshape([1, 3, *image_size])
    return one


def latency_row(name: str, form: str, alone: Callable[[], object], whole: Callable[[], object]) -> str:
    """Row of a model's latency and that of its backbone."""
    median, worst, floor = times_in_turns(alone, whole)
    return f"| {name} | {form} | {median:.1f} | {worst:.1f} | {floor:.1f} | {median / floor:.2f} |"


def times_in_turns(
    alone: Callable[[], object], whole: Callable[[], object], pictures: int = PICTURES, warm_up: int = WARM_UP
) -> tuple[float, float, float]:
    """Median and 99th percentile of the whole model, and median of the backbone, in ms.

    Their calls alternate, because the speed of the machine drifts.
    """
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(pictures + warm_up):
        for function, taken in zip((alone, whole), times, strict=True):
            start = time.perf_counter()
            function()
            taken.append(1000 * (time.perf_counter() - start))
    median, worst = np.quantile(times[1][warm_up:], (0.5, 0.99))
    return median, worst, float(np.median(times[0][warm_up:]))


def rate_row(name: str, alone: Model, whole: Model, threads: int) -> str:
    """Row of a model's images per second for each number of streams, and the backbone's for the largest."""
    rates = [rate(whole, threads, streams) for streams in STREAMS]
    return f"| {name} | {' | '.join(f'{each:.0f}' for each in rates)} | {rate(alone, threads, STREAMS[-1]):.0f} |"


def rate(model: Model, threads: int, streams: int) -> float:
    """Images per second with a number of streams, in single precision."""
    settings = {"PERFORMANCE_HINT": "THROUGHPUT", "NUM_STREAMS": str(streams), "INFERENCE_NUM_THREADS": str(threads)}
    queue = AsyncInferQueue(openvino.Core().compile_model(model, "CPU", settings | FLOAT32), streams)
    for count in (WARM_UP, PICTURES):
        start = time.perf_counter()
        for _ in range(count):
            queue.start_async([picture()])
        queue.wait_all()
    return PICTURES / (time.perf_counter() - start)


@cache
def picture(image_size: tuple[int, int] = IMAGE_SIZE) -> np.ndarray:
    """A random image (1, 3, h, w) in [0, 1]."""
    return np.random.default_rng(0).random((1, 3, *image_size), dtype=np.float32)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
