"""Accuracy against the number of good training images, as a table and a plot.

Run as ``python -m benchmarks.few_images --root DATA``; :func:`~benchmarks.categories.categories_in` describes DATA. The
embedded category needs no DATA. The models, the backbone and its layers are those of ``configs/compare/real.yaml``, and
so is the image size by default. With a few images, at Foct's own image size::

    python -m benchmarks.few_images --root DATA --counts '[1, 2, 4, 8]' --image_size '[336, 336]' --every 2 \
        --models '[Foct, PaDiM, PatchCore, AnomalyDINO rule (8 views), SubspaceAD rule (8 views)]'

The steps of Foct, compared with PatchCore::

    python -m benchmarks.few_images --root DATA --counts '[1, 2, 4]' --image_size '[336, 336]' --seeds 5 \
        --models '[PatchCore, Foct (nearest), Foct (+ views), Foct (+ transport), Foct, Foct (+ foreground),
        Foct (+ online), Foct (+ p-values)]'

The features of the test images are extracted once for all models and draws.
``anomalib-ot compare`` tests with anomalib's engine instead.

All runs may take many hours. The options select a part of them. Runs that are already in the output are not repeated,
and the table and the plot show all runs in the output.
"""

import logging
import shlex
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import matplotlib as mpl
import pandas as pd
import torch
from anomalib.data import AnomalibDataModule
from anomalib.engine import Engine
from anomalib.models.image.patchcore.anomaly_map import AnomalyMapGenerator
from jsonargparse import auto_cli
from lightning.pytorch import seed_everything
from matplotlib import pyplot as plt
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from anomalib_ot.comparison import Job, Key, Plan, Predictions, evaluate, read_plan
from anomalib_ot.comparison.measurement import QUIET
from anomalib_ot.features.backbones import create_extractor
from anomalib_ot.features.extraction import FeatureMaps, extract_by_parts
from anomalib_ot.features.given import Scorer, on_features
from anomalib_ot.features.preprocessing import resize_and_normalize
from anomalib_ot.models.foct.rotations import turned_views
from anomalib_ot.offline import offline_backbone
from anomalib_ot.settings import require

from .categories import EMBEDDED, categories_in
from .references import NearestCell, Subspace, joined, top_mean
from .rows import appended, finished
from .side_by_side import LAYERS
from .versions import versions

# Size of the maps and masks of pixel metrics.
REDUCED = (112, 112)
FOCT_SIZE = (336, 336)
# With more images, selecting a coreset of 10 % takes minutes on two cores. PatchCore then has the 1 % of the plan.
LARGE_CORESET = 50
MODELS = ("Pradot", "WtFlow", "Duo", "PaDiM", "PatchCore")
ONLINE = {"online": True, "query_steps": 5}
# Each step of Foct adds to the one before: views and positions, the paper's transport, the detail, which makes the
# default, and then the other parts of the paper. Last, the p-values of images say which ones teach.
STEPS: dict[str, dict[str, Any]] = {
    "Foct (nearest)": {"measure": "nearest", "rotations": 1, "position_weight": 0.0, "detail_weight": 0.0},
    "Foct (+ views)": {"measure": "nearest", "detail_weight": 0.0},
    "Foct (+ transport)": {"detail_weight": 0.0},
    "Foct": {},
    "Foct (+ foreground)": {"foreground": "pca"},
    "Foct (+ online)": {"foreground": "pca", **ONLINE},
    "Foct (+ p-values)": {"foreground": "pca", **ONLINE, "online_rate": 0.1},
}
# Each with the number of turned views of a training image; AnomalyDINO has eight where there are few images.
RULES = {
    "AnomalyDINO rule": (NearestCell, 1),
    "AnomalyDINO rule (8 views)": (NearestCell, 8),
    "SubspaceAD rule": (Subspace, 1),
    "SubspaceAD rule (8 views)": (Subspace, 8),
}
METRICS = ("image_AUROC", "pixel_AUROC", "pixel_AUPRO")
KEY = ("category", "model", "images", "seed", "every", "size")
ALL = "all"


def main(
    root: Path | None = None,
    output: Path = Path("results/few_images.csv"),
    categories: list[str] | None = None,
    counts: list[int | None] = [5, 10, 20, 50, None],  # noqa: B006 - jsonargparse shows the default, and nothing changes it
    seeds: int = 3,
    models: list[str] = ["Pradot", "WtFlow", "PaDiM", "PatchCore", "AnomalyDINO rule"],  # noqa: B006
    image_size: tuple[int, int] | None = None,
    every: int = 1,
) -> None:
    """Measure the models on the same draws, print the tables and draw the plot.

    Args:
        root: Folder of the categories.
        output: CSV file of the runs, continued if it exists; give each image size and each step between the test images
            its own, as the table is of all runs in it. The plot has the same name with the suffix ``.png``.
        categories: Categories to run; all by default.
        counts: Numbers of training images; null for all images. A category with too few images is left out.
        seeds: Number of draws per number of training images.
        models: Models to run: Pradot, WtFlow, Duo, PaDiM, PatchCore, AnomalyDINO rule, AnomalyDINO rule (8 views),
            SubspaceAD rule, SubspaceAD rule (8 views), and the steps of Foct: Foct (nearest), Foct (+ views),
            Foct (+ transport), Foct, which adds the detail, Foct (+ foreground), Foct (+ online) and
            Foct (+ p-values).
        image_size: Height and width in pixels; those of the plan by default.
        every: Use every n-th test image only, if all would take too long.

    Raises:
        ValueError: If a model is unknown.
    """
    known = (*MODELS, *STEPS, *RULES)
    require({*models} <= {*known}, "models", f"among {', '.join(known)}", models)
    command = shlex.join(["python", "-m", "benchmarks.few_images", *sys.argv[1:]])
    print(f"{command}\n{versions('anomalib-ot', 'anomalib', 'torch', 'timm')}, seeds 0 to {seeds - 1}", flush=True)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    found = categories_in(root)
    plan = read_plan("real", MODELS, [EMBEDDED], backbone=offline_backbone(), shots=counts, seeds=[*range(seeds)])
    data = {name: found[name] for name in categories or found}
    with_steps = {**plan.models, **models_of_foct(STEPS)}
    plan = replace(plan, models=with_steps, data=data, image_size=image_size or plan.image_size)
    done = finished(output, KEY)
    with appended(output, (*KEY, *METRICS)) as add:
        for category in plan.data:
            keys = [Key(category, *rest) for rest in product(models, plan.shots, plan.seeds)]
            rows = {key: as_row(key, every, plan.image_size) for key in keys}
            for key, values in measured(plan, [key for key in keys if rows[key] not in done], every):
                row = dict(zip(KEY, rows[key], strict=True))
                add(row | {name: f"{values[name]:.2f}" for name in METRICS if name in values})
    runs = pd.read_csv(output, dtype=dict.fromkeys(KEY, str) | dict.fromkeys(METRICS, float))
    for metric in METRICS:
        print(f"\n{metric}\n{table(runs, metric)}")
    draw(runs, output.with_suffix(".png"))


def models_of_foct(variants: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Models of a plan: Foct with its settings by label."""
    return {name: {"class_path": "anomalib_ot.Foct", "init_args": settings} for name, settings in variants.items()}


def foct_plan(
    variants: dict[str, dict[str, Any]],
    shots: int,
    seeds: Iterable[int],
    image_size: tuple[int, int] = FOCT_SIZE,
    **category: Any,
) -> Plan:
    """A plan of Foct on the embedded category.

    Args:
        variants: Settings of Foct by label.
        shots: Number of support images.
        seeds: Seeds of the draws.
        image_size: Height and width in pixels.
        **category: Settings of the category.
    """
    data = {EMBEDDED: {"class_path": "anomalib_ot.Assembly", "init_args": category}}
    models, backbone = models_of_foct(variants), offline_backbone()
    return Plan(models, data, backbone, LAYERS, image_size, seeds=tuple(seeds), shots=(shots,))


def as_row(key: Key, every: int, size: tuple[int, int]) -> tuple[str, ...]:
    """The values of ``KEY`` in the output."""
    height, width = size
    return key.category, key.model, str(key.shots or ALL), str(key.seed), str(every), f"{height}x{width}"


def measured(plan: Plan, keys: Sequence[Key], every: int) -> Iterator[tuple[Key, dict[str, float]]]:
    """Metrics of runs on one category, in percent; none with more training images than there are, or too few."""
    if not keys:
        return
    jobs = {job.key: job for job in plan.jobs()}
    layers = {layer for job in jobs.values() for layer in job.model["init_args"]["layers"]}
    features = Features(plan, layers)
    whole = draw_images(plan, replace(keys[0], shots=None))
    test = TestImages(whole, features, every)
    for key in keys:
        # PaDiM has no covariance of one image.
        if key.shots and (key.shots >= len(whole.train_data) or (key.model == "PaDiM" and key.shots == 1)):
            continue
        data = draw_images(plan, key)
        if key.model in RULES:
            scorer = fitted_rule(*RULES[key.model], [item.image for item in data.train_data], features)
        else:
            scorer = on_features(fitted_model(jobs[key], data), plan.image_size)
        yield key, test.metrics(scorer)


def draw_images(plan: Plan, key: Key) -> AnomalibDataModule:
    """The data module of a run, with its draw of training images, set up."""
    data = Job(key, {}, plan.data[key.category]).create_data()
    data.prepare_data()
    data.setup()
    return data


class Features:
    """Features of images with the backbone and the image size of a plan.

    Args:
        plan: The plan.
        layers: Layers of the models that differ from those of the plan.
    """

    def __init__(self, plan: Plan, layers: Iterable[str] = ()) -> None:
        backbone = str(plan.backbone)
        self.image_size, self.joined_layers = plan.image_size, plan.layers or ()
        self._extractor = create_extractor(backbone, sorted({*layers, *self.joined_layers}))
        self._transform = resize_and_normalize(plan.image_size, backbone).transform

    @torch.inference_mode()
    def of(self, image: Tensor, views: int = 1) -> FeatureMaps:
        """Feature map (views, D, H, W) of each layer for an image (3, h, w) and its turned views."""
        return extract_by_parts(self._extractor, turned_views(self._transform(image)[None], views)[0])

    def joined(self, features: FeatureMaps) -> Tensor:
        """Feature maps (B, D, H, W) of the layers of the plan together."""
        return joined([features[layer] for layer in self.joined_layers])


class TestImages:
    """Features, labels and masks of every n-th test image.

    Args:
        data: Data module that is set up.
        features: The backbone.
        every: Step between the images.
    """

    def __init__(self, data: AnomalibDataModule, features: Features, every: int) -> None:
        self.features, labels, masks = [], [], []
        for index in track(range(0, len(data.test_data), every), "Extracting features"):
            item = data.test_data[index]
            self.features.append(features.of(item.image))
            labels.append(bool(item.gt_label))
            mask = torch.zeros(1, 1, *REDUCED) if item.gt_mask is None else item.gt_mask[None, None].float()
            masks.append(F.adaptive_max_pool2d(mask, REDUCED)[0, 0].bool())
        self.labels, self.masks = torch.tensor(labels), torch.stack(masks)

    def metrics(self, scorer: Scorer) -> dict[str, float]:
        """Metrics of a model, in percent; image metrics only if there are no masks.

        The images are scored once, one after another in the order of the loader, because an online model learns.
        """
        scores, maps = zip(*map(scorer, self.features), strict=True)
        return metrics(torch.stack(scores), torch.cat(maps), self.labels, self.masks)


def metrics(scores: Tensor, maps: Tensor, labels: Tensor, masks: Tensor) -> dict[str, float]:
    """Metrics in percent of image scores (N,) and maps (N, 1, h, w), for labels (N,) and reduced masks (N, h', w')."""
    predictions = Predictions(
        images=[str(index) for index in range(len(labels))],
        kinds=["anomalous" if label else "good" for label in labels],
        labels=labels.long().numpy(),
        scores=scores.numpy(),
        maps=F.adaptive_avg_pool2d(maps, masks.shape[-2:])[:, 0].numpy(),
        truth=masks.numpy(),
    )
    return evaluate(predictions)[0]


def fitted_model(job: Job, data: AnomalibDataModule) -> nn.Module:
    """The network of a model of the plan, fitted to training images with the seed of the run."""
    seed_everything(job.key.seed, workers=True, verbose=False)
    if job.key.model == "PatchCore" and len(data.train_data) <= LARGE_CORESET:
        own = {**job.model["init_args"], "coreset_sampling_ratio": 0.1}
        job = replace(job, model={**job.model, "init_args": own})
    model = job.create_model()
    with TemporaryDirectory() as folder:
        engine = Engine(default_root_dir=folder, accelerator="cpu", logger=False, limit_val_batches=0, **QUIET)
        engine.fit(model, datamodule=data)
    return model.model.eval()


def fitted_rule(
    rule: Callable[[Tensor], Callable[[Tensor], Tensor]], views: int, images: Iterable[Tensor], features: Features
) -> Scorer:
    """A reference, fitted to turned views of training images, with AnomalyDINO's image score and map."""
    fitted = rule(torch.cat([features.joined(features.of(image, views)) for image in images]))
    enlarge = AnomalyMapGenerator()

    def score(maps: FeatureMaps) -> tuple[Tensor, Tensor]:
        distances = fitted(features.joined(maps))
        return top_mean(distances)[0], enlarge(distances[:, None], features.image_size)

    return score


def table(runs: pd.DataFrame, metric: str) -> str:
    """Mean ± standard deviation over the draws by number of images, and the mean over the complete categories."""
    index = ["category", "model"]
    mean, spread = (runs.pivot_table(metric, index, "images", each, sort=False) for each in ("mean", "std"))
    cells = mean.map("{:.1f}".format) + spread.reindex_like(mean).map(" ± {:.1f}".format)
    overall = complete(runs).pivot_table(metric, index, "images", sort=False).groupby("model", sort=False).mean()
    overall.index = pd.MultiIndex.from_product([["mean"], overall.index], names=index)
    rows = pd.concat([cells.replace(" ± nan", "", regex=True), overall.map("{:.1f}".format)])
    return rows.replace("nan", "")[_ordered(rows.columns)].to_string()


def complete(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs on categories that have all models and numbers of images of the table."""
    wanted = len(runs[["model", "images"]].drop_duplicates())
    return runs.groupby("category", sort=False).filter(
        lambda own: len(own[["model", "images"]].drop_duplicates()) == wanted
    )


def _ordered(images: Iterable[str]) -> list[str]:
    return sorted(images, key=lambda count: float("inf") if count == ALL else int(count))


def draw(runs: pd.DataFrame, path: Path) -> None:
    """Save the mean image AUROC over the complete categories against the number of images, with a line for each model.

    The bars are the standard deviation over the draws.
    """
    chosen = complete(runs)
    draws = chosen.pivot_table("image_AUROC", ["model", "images"], "seed", sort=False)
    counts = _ordered(chosen["images"].unique())
    mpl.use("Agg")
    figure, axis = plt.subplots(figsize=(7, 4.5))
    models = chosen["model"].unique()
    for index, model in enumerate(models):
        own = draws.loc[model].reindex(counts)
        # Side by side, so that the bars do not hide one another.
        places = [place + 0.04 * (index - (len(models) - 1) / 2) for place in range(len(counts))]
        axis.errorbar(places, own.mean(axis=1), own.std(axis=1).fillna(0), marker="o", capsize=2, label=model)
    categories = chosen["category"].nunique()
    title = f"mean of {categories} categories" if categories > 1 else "".join(chosen["category"].unique())
    axis.set(xlabel="good training images", ylabel="image AUROC in %", title=title)
    axis.set_xticks(range(len(counts)), counts)
    axis.grid(axis="y", alpha=0.3)
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)
    print(f"\nPlot: {path}")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
