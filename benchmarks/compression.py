"""Effect of Pradot's compression on prototypes, image AUROC and OpenVINO latency, at several tolerances.

Run as ``python -m benchmarks.compression --root DATA`` on an otherwise idle machine, with DATA as for
``configs/compare/real.yaml``. The model is fitted once per category. Copies are compressed, calibrated, tested and
timed.
"""

import warnings
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import mkdtemp

import torch
from anomalib.models.components import AnomalibModule
from jsonargparse import auto_cli
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc

from anomalib_ot import Pradot
from anomalib_ot.features.backbones import create_extractor
from anomalib_ot.features.extraction import FLOAT32
from anomalib_ot.offline import offline_backbone

from .categories import CATEGORIES, open_category
from .latency import QUIETLY, backbone_file, compiled, fit, of_one, times_in_turns
from .side_by_side import IMAGE_SIZE, LAYERS, models
from .versions import versions

# The batch size of training.
BATCH = 32


def main(
    root: Path | None = None,
    categories: tuple[str, ...] = CATEGORIES,
    tolerances: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.5),
    per_cell: tuple[int, int] = (4, 16),
    threads: int = 2,
    seed: int = 0,
) -> None:
    """Print a line for each category and tolerance.

    Args:
        root: Folder of the real categories.
        categories: Categories to run.
        tolerances: Values of ``compress_tolerance``.
        per_cell: Prototypes per cell on the finer and on the coarser layer, before compression.
        threads: Number of threads for torch and OpenVINO.
        seed: Random seed.
    """
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    packages = versions("anomalib-ot", "anomalib", "torch", "openvino")
    print(f"{packages}, {threads} threads, {per_cell} prototypes per cell, seed {seed}")
    folder, backbone = Path(mkdtemp()), offline_backbone()
    alone = compiled(
        of_one(backbone_file(create_extractor(backbone, LAYERS), folder / "alone.onnx")), threads, **FLOAT32
    )
    print("\n| category | tolerance | prototypes | image AUROC | median, ms | backbone, ms | ratio |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for category in categories:
        data = open_category(category, root)
        pradot = fit(partial(uncompressed, models(backbone, per_cell)["Pradot"]), data, seed, folder)
        normal, _ = features_of(pradot, data.train_data)
        test, labels = features_of(pradot, data.test_data)
        for tolerance in tolerances:
            small = deepcopy(pradot)
            small.model.compress(normal, tolerance)
            small.model.calibrate(small.model.highest_scores(normal))
            path = small.to_openvino(folder / f"{category} {tolerance}", input_size=IMAGE_SIZE, onnx_kwargs=QUIETLY)
            median, _, floor = times_in_turns(alone, compiled(of_one(path), threads, **FLOAT32))
            print(
                f"| {category} | {tolerance} | {small.model.count} of {pradot.model.count} | "
                f"{detection(small, test, labels):.2f} | {median:.1f} | {floor:.1f} | {median / floor:.2f} |",
                flush=True,
            )


def uncompressed(build: Callable[[], AnomalibModule]) -> AnomalibModule:
    """Build a Pradot that is not compressed or calibrated during the fit."""
    pradot = build()
    pradot.settings = replace(pradot.settings, compress=False, calibrate=False)
    return pradot


@torch.inference_mode()
def features_of(pradot: Pradot, items: Iterable) -> tuple[list[dict[str, Tensor]], Tensor]:
    """Feature maps of images, in batches as in training, and labels (N,)."""
    images, labels = zip(
        *((pradot.pre_processor.transform(each.image), int(each.gt_label)) for each in items), strict=True
    )
    return [pradot.model.extract(batch) for batch in torch.stack(images).split(BATCH)], torch.tensor(labels)


@torch.inference_mode()
def detection(pradot: Pradot, features: list[dict[str, Tensor]], labels: Tensor) -> float:
    """Image AUROC in percent, from features instead of images."""
    scores = []
    for batch in features:
        pradot.model.extract = lambda _, batch=batch: batch
        scores.append(pradot.model(torch.empty(1, 3, *IMAGE_SIZE)).pred_score)
    return 100 * float(binary_auroc(torch.cat(scores), labels))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
