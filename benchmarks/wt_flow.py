"""WtFlow's couplings, scopes and scores compared with models of anomalib, on categories of real images.

Run as ``python -m benchmarks.wt_flow --root DATA``, with DATA as for ``configs/compare/real.yaml``. The embedded
category needs no DATA. The features of all images are extracted once, so that dozens of trainings are possible.
``anomalib-ot compare`` uses anomalib's engine instead.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, get_args

import torch
from anomalib.data import ImageBatch, ImageItem
from anomalib.metrics import AUPRO, AUROC
from anomalib.models.image.fastflow.loss import FastflowLoss
from anomalib.models.image.fastflow.torch_model import FastflowModel, create_fast_flow_block
from anomalib.models.image.padim.torch_model import PadimModel
from anomalib.models.image.patchcore.torch_model import PatchcoreModel
from anomalib.models.image.patchflow.loss import PatchflowLoss
from anomalib.models.image.patchflow.torch_model import PatchflowModel
from jsonargparse import auto_cli
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from anomalib_ot import WtFlow
from anomalib_ot.features.backbones import create_extractor
from anomalib_ot.features.extraction import FastExtractor, FeatureMaps
from anomalib_ot.features.preprocessing import resize_and_normalize
from anomalib_ot.features.store import FeatureDataset
from anomalib_ot.host.feature_cache import TrainingFeatures, feature_loader, shuffled
from anomalib_ot.models.wt_flow.settings import Score
from anomalib_ot.offline import offline_backbone

from .categories import CATEGORIES, open_category
from .rows import appended
from .versions import versions

IMAGE_SIZE = (256, 256)
LAYER = "blocks.4"
LAYERS = ("blocks.1", "blocks.2", LAYER)
# Pixel metrics use maps and masks at a quarter of the size.
REDUCED = (64, 64)
# The other flows train with WtFlow's defaults.
STEPS, BATCH_SIZE = 200, 16
SCORES: tuple[Score, ...] = get_args(Score)

VARIANTS: dict[str, dict[str, Any]] = {
    "independent": {"coupling": "independent"},
    "optimal, positions": {"coupling": "optimal"},
    "optimal, maps": {"coupling": "optimal", "scope": "maps"},
    "worst, positions": {},
    "worst, maps": {"scope": "maps"},
    "paper: independent": {"coupling": "independent", "normalization": "layer", "pooling": True},
    "paper: worst, positions": {"normalization": "layer", "pooling": True},
}
COLUMNS = ("category", "model", "score", "seed", "image_AUROC", "pixel_AUROC", "pixel_AUPRO", "fit_s")


def main(
    root: Path | None = None,
    output: Path = Path("results/wt_flow.csv"),
    categories: list[str] = list(CATEGORIES),  # noqa: B006 - jsonargparse shows the default, and nothing changes it
    models: list[str] = [*VARIANTS, "no flow", "FastFlow", "PatchFlow", "PaDiM", "PatchCore 1 %"],  # noqa: B006
    seeds: list[int] = [0, 1, 2],  # noqa: B006
    every: int = 1,
    threads: int = 2,
    settings: dict[str, Any] = {},  # noqa: B006
) -> None:
    """Train the models, score the same features and print the table.

    Args:
        root: Folder of the categories.
        output: CSV file to add the results to.
        categories: Categories to run.
        models: Models to run.
        seeds: Random seeds.
        every: Use every n-th test image only, if all would take too long.
        threads: Number of threads for torch.
        settings: Further settings for all variants of WtFlow.
    """
    torch.set_num_threads(threads)
    packages = versions("anomalib-ot", "anomalib", "torch", "lightning")
    print(f"{packages}, {threads} threads, every {every} test images, {settings}")
    backbone = offline_backbone()
    rows = []
    with appended(output, COLUMNS) as add:
        for category in categories:
            data = open_category(category, root)
            train, *_ = cached(map(data.train_data.__getitem__, range(len(data.train_data))), backbone)
            test, labels, masks = cached(
                map(data.test_data.__getitem__, range(0, len(data.test_data), every)), backbone
            )
            for name in models:
                for seed in seeds:
                    seed_everything(seed, workers=True, verbose=False)
                    start = time.perf_counter()
                    if name in VARIANTS:
                        results = wt_flow(train, test, backbone, {**VARIANTS[name], **settings})
                    else:
                        results = OTHERS[name](train, test, backbone)
                    for score, maps, image_scores, fit_s in results:
                        row = {"category": category, "model": name, "score": score, "seed": str(seed)}
                        values = metrics(maps, image_scores, labels, masks)
                        row |= {key: f"{value:.2f}" for key, value in {**values, "fit_s": fit_s - start}.items()}
                        rows.append(row)
                        add(row)
    print(summary(rows))


@torch.inference_mode()
def cached(items: Iterable[ImageItem], backbone: str) -> tuple[FeatureMaps, Tensor, Tensor]:
    """Feature maps (N, D, H, W) of each layer, labels (N,) and masks (N, h, w)."""
    extract = FastExtractor(create_extractor(backbone, LAYERS), "auto", 100)
    transform = resize_and_normalize(IMAGE_SIZE, backbone).transform
    features: dict[str, list[Tensor]] = {layer: [] for layer in LAYERS}
    labels, masks = [], []
    for item in items:
        for layer, maps in extract(transform(item.image)[None]).items():
            features[layer].append(maps)
        labels.append(bool(item.gt_label))
        mask = torch.zeros(1, 1, *REDUCED) if item.gt_mask is None else item.gt_mask[None, None].float()
        masks.append(F.adaptive_max_pool2d(mask, REDUCED)[0, 0].bool())
    return {layer: torch.cat(maps) for layer, maps in features.items()}, torch.tensor(labels), torch.stack(masks)


class OnFeatures(WtFlow):
    """WtFlow trained on given features."""

    features: FeatureMaps

    def extract_training_features(self, extractor: nn.Module) -> None:
        """Use the given features."""
        del extractor
        dataset = FeatureDataset({LAYER: self.features[LAYER]})
        self.training_features = TrainingFeatures(feature_loader(dataset, self.batch_size))
        self.trainer.fit_loop._data_source.instance = feature_loader(  # noqa: SLF001
            dataset, self.batch_size, shuffled(dataset, self.trainer)
        )


def wt_flow(
    train: FeatureMaps, test: FeatureMaps, backbone: str, settings: dict[str, Any]
) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    """For each score: its name, maps (N, 1, h, w), image scores (N,) and the time when the fit ended."""
    model = OnFeatures(backbone, [LAYER], **settings)
    model.features = train
    trainer(model).fit(model, feature_loader(FeatureDataset(train), 1))
    end = time.perf_counter()
    network = model.model.eval()
    for score in SCORES:
        network.settings = replace(network.settings, score=score)
        yield score, *in_parts(network, test[LAYER]), end


def trainer(model: WtFlow, **arguments: Any) -> Trainer:
    """A trainer on the CPU with the model's arguments, which writes no files."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return Trainer(**model.trainer_arguments, **quiet, accelerator="cpu", enable_model_summary=False, **arguments)


@torch.inference_mode()
def in_parts(network: nn.Module, features: Tensor) -> tuple[Tensor, Tensor]:
    """Reduced maps (N, 1, h, w) and image scores (N,) of WtFlow's network."""
    maps, scores = [], []
    for part in features.split(16):
        network.extract = lambda images, part=part: {LAYER: part}  # noqa: ARG005 - the features are given
        result = network(torch.empty(len(part), 3, *IMAGE_SIZE))
        maps.append(F.adaptive_avg_pool2d(result.anomaly_map, REDUCED))
        scores.append(result.pred_score)
    return torch.cat(maps), torch.cat(scores)


class Given(nn.Module):
    """Replaces the backbone of a model and returns given features."""

    features: Any

    def forward(self, images: Tensor) -> Any:
        """Return the features."""
        del images
        return self.features


def score_all(model: nn.Module, batches: Iterable[Any]) -> tuple[Tensor, Tensor]:
    """Reduced maps (N, 1, h, w) and image scores (N,) of a model of anomalib."""
    maps, scores = [], []
    model.eval()
    with torch.inference_mode():
        for batch in batches:
            result = on_features(model, batch)
            maps.append(F.adaptive_avg_pool2d(result.anomaly_map, REDUCED))
            scores.append(result.pred_score.flatten())
    return torch.cat(maps), torch.cat(scores)


def on_features(model: nn.Module, features: Any) -> Any:
    """Output of a model of anomalib for features instead of images."""
    model.feature_extractor.features = features
    first = next(iter(features.values())) if isinstance(features, dict) else features[0]
    return model(torch.empty(len(first), 3, *IMAGE_SIZE))


def batches_of(features: FeatureMaps, layers: Sequence[str] = LAYERS, size: int = 16) -> Iterator[FeatureMaps]:
    """Features of a few images at a time."""
    for start in range(0, len(features[LAYER]), size):
        yield {layer: features[layer][start : start + size] for layer in layers}


def no_flow(train: FeatureMaps, test: FeatureMaps, backbone: str) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    """The density of whitened features without a flow, a baseline for the flows; as :func:`wt_flow`."""
    # An untrained field is zero: its Euler step changes nothing.
    network = WtFlow(backbone, [LAYER]).model.eval()
    network.fit_normalization([train])
    end = time.perf_counter()
    yield "log_density", *in_parts(network, test[LAYER]), end


def padim(train: FeatureMaps, test: FeatureMaps, backbone: str) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    """PaDiM on three layers; as :func:`wt_flow`."""
    model = PadimModel(backbone, list(LAYERS), n_features=100).train()
    model.feature_extractor = Given()
    on_features(model, train)
    model.fit()
    end = time.perf_counter()
    yield "", *score_all(model, batches_of(test)), end


def patchcore(train: FeatureMaps, test: FeatureMaps, backbone: str) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    """PatchCore on two layers with a coreset of 1 %; as :func:`wt_flow`."""
    model = PatchcoreModel(LAYERS[1:], backbone).train()
    model.feature_extractor = Given()
    for batch in batches_of(train, LAYERS[1:]):
        on_features(model, batch)
    model.subsample_embedding(0.01)
    end = time.perf_counter()
    yield "", *score_all(model, batches_of(test, LAYERS[1:])), end


def fast_flow_model(channels: Sequence[int], sizes: Sequence[int]) -> FastflowModel:
    """FastFlow of anomalib with its defaults, adapted from the shapes of ResNet-18 to those of other features."""
    model = FastflowModel(IMAGE_SIZE, "resnet18", pre_trained=False)
    model.feature_extractor = Given()
    model.norms = nn.ModuleList(nn.LayerNorm([c, s, s]) for c, s in zip(channels, sizes, strict=True))
    model.fast_flow_blocks = nn.ModuleList(
        create_fast_flow_block([c, s, s], conv3x3_only=False, hidden_ratio=1.0, flow_steps=8)
        for c, s in zip(channels, sizes, strict=True)
    )
    return model


def train_flow(model: nn.Module, loss: nn.Module, batches: Callable[[Tensor], Any], count: int, decay: float) -> None:
    """Train a normalizing flow like its Lightning model, on batches drawn from ``count`` images."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=decay)
    model.train()
    for _ in range(STEPS):
        value = loss(*on_features(model, batches(torch.randint(count, (BATCH_SIZE,)))))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()


def fast_flow(train: FeatureMaps, test: FeatureMaps, backbone: str) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    """FastFlow on three layers; as :func:`wt_flow`."""
    del backbone
    model = fast_flow_model([maps.shape[1] for maps in train.values()], [maps.shape[-1] for maps in train.values()])
    train_flow(
        model, FastflowLoss(), lambda chosen: [maps[chosen] for maps in train.values()], len(train[LAYER]), decay=1e-5
    )
    end = time.perf_counter()
    yield "", *score_all(model, (list(batch.values()) for batch in batches_of(test))), end


def patch_flow(train: FeatureMaps, test: FeatureMaps, backbone: str) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    """PatchFlow on two layers at one resolution; as :func:`wt_flow`."""
    layers = LAYERS[1:]
    model = PatchflowModel(IMAGE_SIZE, backbone, num_scales=1)
    model.feature_extractor = Given()
    channels = sum(train[layer].shape[1] for layer in layers)
    model.feature_adaptor = nn.Conv2d(channels, model.feature_adaptor.out_channels, 1)
    train_flow(
        model,
        PatchflowLoss(),
        lambda chosen: {layer: train[layer][chosen] for layer in layers},
        len(train[LAYER]),
        decay=1e-4,
    )
    end = time.perf_counter()
    yield "", *score_all(model, batches_of(test, layers)), end


OTHERS = {
    "no flow": no_flow,
    "FastFlow": fast_flow,
    "PatchFlow": patch_flow,
    "PaDiM": padim,
    "PatchCore 1 %": patchcore,
}


def metrics(maps: Tensor, scores: Tensor, labels: Tensor, masks: Tensor) -> dict[str, float]:
    """Image AUROC, and pixel AUROC and AUPRO if there are masks, in percent."""
    low, high = maps.min(), maps.max()
    batch = ImageBatch(
        image=torch.empty(len(maps), 3, *REDUCED),
        pred_score=(scores - scores.min()) / (scores.max() - scores.min()),
        gt_label=labels,
        anomaly_map=((maps - low) / (high - low))[:, 0],
        gt_mask=masks,
    )
    wanted = [AUROC(fields=["pred_score", "gt_label"], prefix="image_")]
    if masks.any():
        wanted += [kind(fields=["anomaly_map", "gt_mask"], prefix="pixel_") for kind in (AUROC, AUPRO)]
    for metric in wanted:
        metric.update(batch)
    return {metric.name: 100 * float(metric.compute()) for metric in wanted}


def summary(rows: list[dict[str, str]]) -> str:
    """Image AUROC ± standard deviation over seeds / pixel AUROC / AUPRO by model and category, as a table."""
    categories = list(dict.fromkeys(row["category"] for row in rows))
    lines = [("model", *categories, "mean image AUROC")]
    for key in dict.fromkeys((row["model"], row["score"]) for row in rows):
        cells, means = [], []
        for category in categories:
            group = [row for row in rows if (row["model"], row["score"], row["category"]) == (*key, category)]
            values = {
                name: [float(row[name]) for row in group if row.get(name)]
                for name in ("image_AUROC", "pixel_AUROC", "pixel_AUPRO")
            }
            image = values["image_AUROC"]
            spread = f" ± {stdev(image):.1f}" if len(image) > 1 else ""
            pixels = [f"{fmean(values[name]):.1f}" for name in ("pixel_AUROC", "pixel_AUPRO") if values[name]]
            cells.append(" / ".join([f"{fmean(image):.1f}{spread}", *pixels]) if image else "")
            means += [fmean(image)] if image else []
        lines.append((", ".join(filter(None, key)), *cells, f"{fmean(means):.1f}"))
    rule = ("---",) * len(lines[0])
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:]))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
