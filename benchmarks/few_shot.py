"""Ablation of Foct compared with PatchCore, with few training images, on categories of real images.

Run as ``python -m benchmarks.few_shot --root DATA``, with DATA as for ``configs/compare/real.yaml``. The embedded
category needs no DATA. The features of the test images are extracted once for all models, shots and draws, so that
hundreds of runs are possible. ``anomalib-ot compare`` uses anomalib's engine instead.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from anomalib.data import AnomalibDataModule
from anomalib.models.image.patchcore.torch_model import PatchcoreModel
from jsonargparse import auto_cli
from lightning.pytorch import seed_everything
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from anomalib_ot import FewShot, Foct
from anomalib_ot.comparison import Predictions, evaluate
from anomalib_ot.features.preprocessing import resize_and_normalize
from anomalib_ot.offline import offline_backbone

from .categories import CATEGORIES, open_category
from .rows import appended
from .side_by_side import LAYERS
from .versions import versions

IMAGE_SIZE = (336, 336)
# Pixel metrics use maps and masks at a quarter of the size.
REDUCED = (84, 84)

# Each variant adds to the one before. Our parts come first, then those of the paper.
VARIANTS: dict[str, dict[str, Any]] = {
    "nearest": {"measure": "nearest", "rotations": 1, "position_weight": 0.0, "detail_weight": 0.0},
    "+ views, positions": {"measure": "nearest", "detail_weight": 0.0},
    "+ transport": {"detail_weight": 0.0},
    "+ detail": {},
    "+ foreground": {"foreground": "pca"},
    "+ online": {"foreground": "pca", "online": True, "query_steps": 5},
}
METRICS = ("image_AUROC", "image_F1Max", "pixel_AUROC", "pixel_F1Max")
COLUMNS = ("category", "model", "shots", "seed", *METRICS)

Scorer = Callable[[Tensor], Tensor]


def main(
    root: Path | None = None,
    output: Path = Path("results/few_shot_ablation.csv"),
    categories: list[str] = list(CATEGORIES),  # noqa: B006 - jsonargparse shows the default, and nothing changes it
    models: list[str] = ["PatchCore 10 %", *VARIANTS],  # noqa: B006
    shots: list[int] = [1, 2, 4],  # noqa: B006
    seeds: int = 5,
    every: int = 1,
    settings: dict[str, Any] = {},  # noqa: B006
) -> None:
    """Measure the models on the same draws and print the table.

    Args:
        root: Folder of the categories.
        output: CSV file to add the results to.
        categories: Categories to run.
        models: Models to run.
        shots: Numbers of training images.
        seeds: Number of draws per number of training images.
        every: Use every n-th test image only, if all would take too long.
        settings: Further settings for all variants of Foct.
    """
    packages = versions("anomalib-ot", "anomalib", "torch")
    print(f"{packages}, every {every} test images, {settings}", flush=True)
    backbone = offline_backbone()
    rows = []
    with appended(output, COLUMNS) as add:
        for category in categories:
            data = open_category(category, root)
            features, labels, masks = test_set(data, backbone, every, IMAGE_SIZE)
            for k, seed, name, scorer in scorers(data, models, shots, seeds, backbone, settings):
                maps = torch.stack([scorer(each[None].float()) for each in features])
                row = {"category": category, "model": name, "shots": str(k), "seed": str(seed)}
                row |= {key: f"{value:.2f}" for key, value in metrics(maps, labels, masks).items()}
                rows.append(row)
                add(row)
    print(table(rows))


@torch.inference_mode()
def test_set(
    data: AnomalibDataModule, backbone: str, every: int, image_size: tuple[int, int]
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Features (D, H, W) in half precision, labels (N,) and masks (N, h, w) of the test images."""
    extract = Foct(backbone, LAYERS).model.extract
    transform = resize_and_normalize(image_size, backbone).transform
    features, labels, masks = [], [], []
    for index in track(range(0, len(data.test_data), every), "Extracting features"):
        item = data.test_data[index]
        features.append(extract(transform(item.image)[None])[0].half())
        labels.append(bool(item.gt_label))
        mask = torch.zeros(1, 1, *REDUCED) if item.gt_mask is None else item.gt_mask[None, None].float()
        masks.append(F.adaptive_max_pool2d(mask, REDUCED)[0, 0].bool())
    return features, torch.tensor(labels), torch.stack(masks)


def scorers(
    data: AnomalibDataModule, models: list[str], shots: list[int], seeds: int, backbone: str, settings: dict[str, Any]
) -> Iterator[tuple[int, int, str, Scorer]]:
    """Fit each model to each draw, as a function from features (1, D, H, W) to a map (1, h, w)."""
    for k in shots:
        for seed in range(seeds):
            images = support_images(data, k, seed, backbone, IMAGE_SIZE)
            for name in models:
                seed_everything(seed, verbose=False)
                if name in VARIANTS:
                    yield k, seed, name, foct(Foct(backbone, LAYERS, **{**VARIANTS[name], **settings}), images)
                else:
                    yield k, seed, name, patchcore(backbone, images)


def support_images(
    data: AnomalibDataModule, shots: int, seed: int, backbone: str, image_size: tuple[int, int]
) -> Tensor:
    """The pre-processed training images of a draw, (K, 3, h, w)."""
    few = FewShot(data, shots, seed)
    few.setup()
    transform = resize_and_normalize(image_size, backbone).transform
    return torch.stack([transform(item.image) for item in few.train_data])


def foct(model: Foct, images: Tensor) -> Scorer:
    """Foct fitted to support images, called with features instead of images."""
    network = model.model.eval()
    network.fit(images, foreground=model.foreground)
    blank = torch.empty_like(images[:1])

    @torch.inference_mode()
    def score(features: Tensor) -> Tensor:
        network.extract = lambda images: features  # noqa: ARG005 - the features are given
        return network(blank).anomaly_map[0]

    return score


def patchcore(backbone: str, images: Tensor) -> Scorer:
    """PatchCore with a coreset of 10 %, called with features instead of images."""
    network = PatchcoreModel(LAYERS, backbone).train()
    network.feature_extractor.eval()
    network(images)
    network.subsample_embedding(0.1)
    network.eval()

    @torch.inference_mode()
    def score(features: Tensor) -> Tensor:
        distances, _ = network.nearest_neighbors(network.reshape_embedding(features), 1)
        return network.anomaly_map_generator(distances.view(1, 1, *features.shape[-2:]), IMAGE_SIZE)[0]

    return score


def metrics(maps: Tensor, labels: Tensor, masks: Tensor) -> dict[str, float]:
    """Metrics of maps (N, 1, h, w), in percent; the maximum of a map is the image score."""
    names = [str(index) for index in range(len(maps))]
    predictions = Predictions(
        images=names,
        kinds=["anomalous" if label else "good" for label in labels],
        labels=labels.long().numpy(),
        scores=maps.flatten(1).amax(1).numpy(),
        maps=F.adaptive_avg_pool2d(maps, REDUCED)[:, 0].numpy(),
        truth=masks.numpy(),
    )
    return {name: value for name, value in evaluate(predictions)[0].items() if name in METRICS}


def table(rows: list[dict[str, str]]) -> str:
    """Mean ± standard deviation over the draws, in one line per category, number of shots and model."""
    draws = pd.DataFrame(rows).astype(dict.fromkeys(METRICS, float))
    groups = draws.groupby(["category", "shots", "model"], sort=False)[list(METRICS)]
    mean, spread = (values.map("{:.1f}".format) for values in (groups.mean(), groups.std()))
    return (mean + " ± " + spread).replace(" ± nan", "", regex=True).to_string()


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
