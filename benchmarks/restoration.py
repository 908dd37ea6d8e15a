"""Detection by restored images: the score of Pradot, the score of the restoration, and the mean of both.

Run as ``python -m benchmarks.restoration`` for the embedded category, or with ``--category tray --root DATA`` for a
real one, with DATA as for ``configs/compare/real.yaml``. Each cell of a test image is replaced by the training patch of
its prototype, and the mean absolute difference replaces the cost of the cell.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from anomalib.data import AnomalibDataModule
from anomalib.engine import Engine
from jsonargparse import auto_cli
from lightning.pytorch import seed_everything
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from anomalib_ot import Pradot
from anomalib_ot.comparison.measurement import QUIET
from anomalib_ot.drawing.pictures import pictures_of
from anomalib_ot.models.pradot.views import nearest_patches
from anomalib_ot.models.pradot.views.restoration import restoration_map
from anomalib_ot.offline import offline_backbone

from .categories import EMBEDDED, open_category
from .few_images import metrics
from .side_by_side import models
from .versions import versions

# Size of the maps and masks of pixel metrics.
REDUCED = (84, 84)
METRICS = ("image_AUROC", "image_F1Max", "pixel_AUROC", "pixel_F1Max")


def main(category: str = EMBEDDED, root: Path | None = None, seed: int = 0, threads: int = 2) -> None:
    """Print a table.

    Args:
        category: One of ``benchmarks.categories.CATEGORIES``.
        root: Folder of the real categories.
        seed: Random seed.
        threads: Number of threads for torch.
    """
    torch.set_num_threads(threads)
    packages = versions("anomalib-ot", "anomalib", "torch")
    print(f"{packages}, {category}, seed {seed}", flush=True)
    data = open_category(category, root)
    maps, labels, masks = maps_of(fitted(data, seed), data)
    print(f"| score | {' | '.join(METRICS)} |\n| {' | '.join(['---'] * (1 + len(METRICS)))} |")
    for name, each in maps.items():
        found = metrics(each.amax((1, 2, 3)), each, labels, masks)
        print(f"| {name} | {' | '.join(f'{found[metric]:.1f}' if metric in found else '' for metric in METRICS)} |")


def fitted(data: AnomalibDataModule, seed: int) -> Pradot:
    """Fit Pradot to a category."""
    seed_everything(seed, workers=True, verbose=False)
    model = models(offline_backbone())["Pradot"]()
    with TemporaryDirectory() as folder:
        engine = Engine(default_root_dir=folder, accelerator="cpu", logger=False, limit_val_batches=0, **QUIET)
        engine.fit(model, datamodule=data)
    return model.eval()


@torch.inference_mode()
def maps_of(model: Pradot, data: AnomalibDataModule) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Maps (N, 1, h, w) of the test images for each score, their labels (N,) and masks (N, h, w)."""
    nearest = nearest_patches(model.model, pictures_of(model, track(data.train_data, "Finding patches")))
    maps: dict[str, list[Tensor]] = {"Pradot": [], "restoration": []}
    labels, masks = [], []
    for picture in pictures_of(model, track(data.test_data, "Restoring")):
        maps["Pradot"].append(model.model(picture.prepared[None]).anomaly_map[0])
        maps["restoration"].append(restoration_map(model.model, picture, nearest)[None])
        labels.append(bool(picture.label))
        mask = torch.zeros(1, *REDUCED) if picture.mask is None else picture.mask[None].float()
        masks.append(F.adaptive_max_pool2d(mask, REDUCED)[0].bool())
    stacked = {name: torch.stack(each) for name, each in maps.items()}
    # The mean image score over all test images scales both maps to equal weight.
    stacked["mean of both"] = sum(each / each.amax((1, 2, 3)).mean() / 2 for each in stacked.values())
    return stacked, torch.tensor(labels), torch.stack(masks)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
