"""The main workflow on the embedded category: train, compare, draw, export, run the exported model.

Run as ``make demo`` or ``python -m benchmarks.demo``. It needs no network and no data.
"""

import logging
import time
import warnings
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from anomalib.data import ImageItem
from anomalib.deploy import ExportType, OpenVINOInferencer
from anomalib.engine import Engine
from anomalib.models.components import AnomalibModule
from jsonargparse import auto_cli
from matplotlib import pyplot as plt

from anomalib_ot import Assembly
from anomalib_ot.comparison import measure
from anomalib_ot.features.extraction import FLOAT32
from anomalib_ot.offline import offline_backbone

from .side_by_side import IMAGE_SIZE, models

NAMES = ("Pradot", "WtFlow", "PaDiM")


def main(output: Path = Path("results/demo"), seed: int = 0) -> None:
    """Train the models on the embedded category, and draw their maps.

    Args:
        output: Folder of the figure and the exported model.
        seed: Random seed.
    """
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    start = time.perf_counter()
    data = Assembly(output / "data")

    print("Training Pradot, WtFlow and PaDiM on a tray of nine parts.", flush=True)
    # A quarter of the benchmark's prototypes, so that the demonstration is short.
    build = models(offline_backbone(), prototypes_per_cell=(1, 4))
    fitted: dict[str, AnomalibModule] = {}
    print(f"\n{'':8}{'image AUROC':>12}{'pixel AUROC':>12}{'AUPRO':>8}{'fit':>8}{'per image':>10}")
    for name in NAMES:
        fitted[name], result = measure(build[name], data, seed)
        print(
            f"{name:8}{result['image_AUROC']:12.1f}{result['pixel_AUROC']:12.1f}{result['pixel_AUPRO']:8.1f}"
            f"{result['fit_s']:6.0f} s{result['ms_per_image']:7.0f} ms",
            flush=True,
        )

    items = [item for item in data.test_data if int(item.image_path[-7:-4]) < 2]  # noqa: PLR2004 - two of each kind
    picture = draw(items, fitted, output / "maps.png")
    print(f"\nMaps of the models: {picture}")

    exported = Engine(logger=False, default_root_dir=output).export(
        fitted["Pradot"], ExportType.OPENVINO, export_root=output, input_size=IMAGE_SIZE
    )
    print(f"Exported to OpenVINO: {exported}")
    print(f"Maps of the exported model differ by {drift(fitted['Pradot'], exported, items):.1e} of their range.")
    print(f"Done in {time.perf_counter() - start:.0f} s.")


def draw(items: list[ImageItem], fitted: dict[str, AnomalibModule], path: Path) -> Path:
    """Save a figure with a row for each image: the image, its true mask and each model's map.

    Args:
        items: Test images.
        fitted: Models by name.
        path: File of the figure.

    Returns:
        The path.
    """
    mpl.use("Agg")
    figure, axes = plt.subplots(len(items), 2 + len(fitted), figsize=(2 * (2 + len(fitted)), 2 * len(items)))
    for axis, title in zip(axes[0], ["image", "true mask", *fitted], strict=True):
        axis.set_title(title)
    maps = {name: torch.cat([score(model, item) for item in items]) for name, model in fitted.items()}
    for index, (item, row) in enumerate(zip(items, axes, strict=True)):
        row[0].imshow(item.image.permute(1, 2, 0))
        row[0].set_ylabel(Path(item.image_path).parent.name.split("_")[0])
        row[1].imshow(item.gt_mask, cmap="gray", vmin=0, vmax=1)
        # One colour scale for all maps of a model, so that those of normal images look normal.
        for axis, each in zip(row[2:], maps.values(), strict=True):
            axis.imshow(each[index, 0], cmap="inferno", vmin=each.min(), vmax=each.max())
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)
    return path


@torch.inference_mode()
def score(model: AnomalibModule, item: ImageItem) -> torch.Tensor:
    """Anomaly map (1, 1, H, W) of one image."""
    return model.eval()(item.image[None]).anomaly_map


def drift(model: AnomalibModule, exported: Path, items: list[ImageItem]) -> float:
    """Largest difference between the maps of a model and of its exported file, as a fraction of the maps' range."""
    inferencer = OpenVINOInferencer(exported, device="CPU", config=FLOAT32)
    # The inferencer treats values above one as bytes, and resizing can exceed one by a rounding error.
    images = [item.image.clamp(0, 1) for item in items]
    with torch.inference_mode():
        ours = np.stack([model.eval()(image[None]).anomaly_map[0, 0].numpy() for image in images])
    theirs = np.stack([np.squeeze(inferencer.predict(image.permute(1, 2, 0).numpy()).anomaly_map) for image in images])
    return float(np.abs(ours - theirs).max() / np.ptp(ours))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
