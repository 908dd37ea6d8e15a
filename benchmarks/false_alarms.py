"""Promised and realised rates of false alarms, for thresholds from good images alone and for those of anomalib.

Run as ``python -m benchmarks.false_alarms --root DATA``; :func:`~benchmarks.categories.categories_in` describes DATA.
The embedded category needs no DATA. In each split, the good training and test images are divided again at random: a
part trains the model, and the others count its false alarms. The features of all images are extracted once.

Each row is a model, a source of its threshold, a number of training images and a promised rate:

``folds``
    Threshold at the rate, from the training images that each fold left out.
``support``
    The only source of Foct: threshold at the rate, from its support images, each compared with the others.
``held out``
    The same from a fifth of the training images, which the model is then not trained on.
``maximum``
    Highest score of these held-out images. It promises nothing.
``adaptive``
    anomalib's threshold of the highest F1 score on the held-out images and half of the anomalous images.
``adaptive, no anomalies``
    The same on the held-out images alone.

The promise is about images that are drawn alike. Two options show what happens if they are not: with ``--by_group``,
no group of images, such as those of one part, is both in the training and in the test; with ``--contaminated 0.05``,
5 % of the training images, held-out ones included, are anomalous.

All runs may take many hours. The options select a part of them.
"""

import logging
import re
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import torch
from anomalib.data import AnomalibDataModule
from anomalib.engine import Engine
from anomalib.metrics.threshold.f1_adaptive_threshold import _F1AdaptiveThreshold
from jsonargparse import auto_cli
from lightning.pytorch import seed_everything
from lightning.pytorch.trainer.states import TrainerFn
from matplotlib import pyplot as plt
from numpy.typing import NDArray
from PIL import Image
from rich.progress import track
from scipy.stats import betabinom, binomtest
from torch import Tensor

from anomalib_ot.comparison import Job, Key, Plan, read_plan
from anomalib_ot.comparison.measurement import QUIET
from anomalib_ot.decide.conformal import UnsupportedRateWarning, promised_rate, threshold
from anomalib_ot.features.extraction import FeatureMaps
from anomalib_ot.features.given import Scorer, on_features
from anomalib_ot.offline import offline_backbone
from anomalib_ot.settings import require

from .categories import EMBEDDED, categories_in
from .few_images import ALL, Features, draw_images
from .rows import appended, finished
from .versions import versions

RATES = (0.01, 0.02, 0.05, 0.1, 0.2)
FOCT = "Foct"
MODELS = ("Pradot", "WtFlow", FOCT)
KEY = ("category", "model", "images", "seed", "split")
_COUNTS = ("calibration", "rank", "false_alarms", "good", "detected", "anomalous")
FIELDS = (*KEY, "threshold", "rate", "supported", *_COUNTS)
# Share of the good images that count the false alarms, and of the training images that are held out.
_TESTED = 0.4
_HELD_OUT = 0.2
_FEWEST = 2

Numbers = NDArray[np.float64]


def main(
    root: Path | None = None,
    output: Path = Path("results/false_alarms.csv"),
    categories: list[str] | None = None,
    counts: list[int | None] = [10, 20, 50, None],  # noqa: B006 - jsonargparse shows the default, and nothing changes it
    shots: list[int | None] = [4, 8],  # noqa: B006
    seeds: int = 10,
    models: list[str] = [*MODELS],  # noqa: B006
    by_group: str | None = None,
    contaminated: float = 0.0,
) -> None:
    """Measure the rates on the same splits, print the table and draw the plot.

    Args:
        root: Folder of the categories.
        output: CSV file of the runs, continued if it exists. The plot has the same name with the suffix ``.png``.
        categories: Categories to run; all by default.
        counts: Numbers of training images; null for all images. A category with too few images is left out.
        shots: Numbers of support images of Foct.
        seeds: Number of splits.
        models: Models of ``configs/compare/real.yaml`` that calibrate themselves: Pradot, WtFlow, Duo and Foct.
        by_group: Regular expression that finds the group of an image in its file name, followed by a space and its
            width and height: ``part[0-9]+`` for names such as ``part12_003.png``, or ``[0-9]+x[0-9]+`` for the size.
        contaminated: Share of the training images that are anomalous, in [0, 1); at least one image unless it is 0.
    """
    require(0 <= contaminated < 1, "contaminated", "in [0, 1)", contaminated)
    command = shlex.join(["python", "-m", "benchmarks.false_alarms", *sys.argv[1:]])
    print(f"{command}\n{versions('anomalib-ot', 'anomalib', 'torch', 'timm')}, seeds 0 to {seeds - 1}", flush=True)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    found = categories_in(root)
    plan = read_plan("real", models, [EMBEDDED], backbone=offline_backbone())
    plan = replace(plan, data={name: found[name] for name in categories or found})
    done = finished(output, KEY)
    with appended(output, FIELDS) as add:
        for category in plan.data:
            images = GoodAndBad(plan, category, by_group, contaminated)
            for seed, model in product(range(seeds), models):
                for split in images.splits(seed, shots if model == FOCT else counts):
                    if (category, model, split.name, str(seed), images.how) not in done:
                        # All fits of a split come first, so that an interrupted one does not count as finished.
                        for row in [*rows_of(plan, images, split, model)]:
                            add({name: str(row[name]) for name in FIELDS})
    runs = pd.read_csv(output)
    print(table(runs))
    draw(runs, output.with_suffix(".png"))


@dataclass(frozen=True)
class Split:
    """A division of the images, by their indices. The anomalous images follow the good ones.

    Args:
        name: Number of training images, or ``all``.
        seed: Seed of the division.
        training: Indices of the training images.
        tested: Indices of the good images that count the false alarms.
        anomalous: Indices of the anomalous images that may be detected.
    """

    name: str
    seed: int
    training: list[int]
    tested: list[int]
    anomalous: list[int]


class GoodAndBad:
    """All good and all anomalous images of a category, with their features.

    Args:
        plan: The plan.
        category: Name of the category in it.
        by_group: Regular expression that finds the group of an image, see :func:`main`; None divides single images.
        contaminated: Share of the training images that are anomalous.
    """

    def __init__(self, plan: Plan, category: str, by_group: str | None = None, contaminated: float = 0.0) -> None:
        self.category, self._contaminated = category, contaminated
        self.how = "random" if by_group is None else f"by {by_group}"
        self.how += f", {100 * contaminated:g} % anomalous" if contaminated else ""
        self.data = draw_images(plan, Key(category, "", None, 0))
        # Only after this set-up does anomalib keep the images of training_data when a fit begins.
        self.data.setup(TrainerFn.FITTING)
        test = self.data.test_data.samples
        is_good = test.label_index == 0
        self.good = pd.concat([self.data.train_data.samples, test[is_good]], ignore_index=True)
        anomalous = test[~is_good].reset_index(drop=True)
        # As if nobody had seen the defects of anomalous training images.
        unseen = anomalous.assign(label="good", label_index=0, mask_path="")
        self._samples = pd.concat([self.good, unseen], ignore_index=True)
        paths = self._samples.image_path.tolist()
        self._groups = paths if by_group is None else groups_of(paths, by_group)
        layers = {layer for job in plan.jobs() for layer in job.model["init_args"]["layers"]}
        self._extractor = Features(plan, layers)
        self.good_features = self.features(self.good)
        self.anomalous_features = self.features(anomalous)

    def features(self, samples: pd.DataFrame, change: Callable[[Tensor], Tensor] | None = None) -> list[FeatureMaps]:
        """Features of images, after a change of each image (3, h, w)."""
        self.data.test_data.samples = samples
        items = (self.data.test_data[index].image for index in track(range(len(samples)), self.category))
        return [self._extractor.of(image if change is None else change(image)) for image in items]

    def splits(self, seed: int, counts: Sequence[int | None]) -> Iterator[Split]:
        """Divisions with each number of training images that there are enough for; all test the same good images."""
        random = np.random.default_rng(seed)
        order = random.permutation(len(self.good)).tolist()
        anomalous = random.permutation(range(len(self.good), len(self._samples))).tolist()
        own = self._tested_groups(order)
        tested = [index for index in order if self._groups[index] in own]
        pool = [index for index in order if self._groups[index] not in own]
        for count in counts:
            if count is not None and count >= len(pool):
                continue
            training = pool[:count]
            if self._contaminated:
                training = random.permutation(self._with_anomalous(training, anomalous, own)).tolist()
            known = {self._groups[index] for index in (*pool, *training)}
            left = {*anomalous} - {*training}
            others = sorted(index for index in left if self._groups[index] not in known)
            yield Split(str(count or ALL), seed, training, tested, others)

    def _with_anomalous(self, training: list[int], anomalous: list[int], tested: set[str]) -> list[int]:
        """Training images of which a share is replaced by anomalous ones of groups that are not tested.

        Raises:
            ValueError: If there are too few of them.
        """
        count = max(1, round(self._contaminated * len(training)))
        mixed_in = [index for index in anomalous if self._groups[index] not in tested][:count]
        if len(mixed_in) < count:
            msg = f"{self.category} has {len(mixed_in)} anomalous images outside the tested groups, expected {count}"
            raise ValueError(msg)
        return training[count:] + mixed_in

    def _tested_groups(self, order: list[int]) -> set[str]:
        """Groups of good images in an order, until their share is reached; at least one group is left."""
        groups = [self._groups[index] for index in order]
        chosen: set[str] = set()
        for group in groups:
            enough = sum(each in chosen for each in groups) >= round(_TESTED * len(groups))
            if enough or len(chosen | {group}) == len({*groups}):
                break
            chosen.add(group)
        return chosen

    def features_of(self, indices: Sequence[int]) -> list[FeatureMaps]:
        """Known features of images."""
        known = self.good_features + self.anomalous_features
        return [known[index] for index in indices]

    def training_data(self, indices: list[int]) -> AnomalibDataModule:
        """The data module with these images to train and to validate on, all of them labelled good."""
        self.data.train_data.samples = self._samples.loc[indices].reset_index(drop=True)
        self.data.val_data.samples = self.data.train_data.samples
        return self.data


def groups_of(paths: Sequence[str], pattern: str) -> list[str]:
    """Group of each image: what a regular expression finds in its file name, a space and its width and height.

    Raises:
        ValueError: If an image has no group, or all have the same one.
    """
    groups = []
    for path in map(Path, paths):
        with Image.open(path) as image:
            text = f"{path.name} {image.width}x{image.height}"
        found = re.search(pattern, text)
        if found is None:
            msg = f"by_group must find the group of each image, but {pattern!r} is not in {text!r}"
            raise ValueError(msg)
        groups.append(found[0])
    if len({*groups}) == 1:
        msg = f"by_group must find at least two groups, but all images are {groups[0]!r}"
        raise ValueError(msg)
    return groups


def rows_of(plan: Plan, images: GoodAndBad, split: Split, model: str) -> Iterator[dict[str, object]]:
    """The rows of a model on a split."""
    job = next(job for job in plan.jobs() if job.key.model == model)
    key = dict(zip(KEY, (images.category, model, split.name, split.seed, images.how), strict=True))
    held_out = split.training[: max(_FEWEST, round(_HELD_OUT * len(split.training)))]
    kept = split.training[len(held_out) :]
    # Half of the anomalous images may set anomalib's threshold, and the others are detected.
    known, others = (images.features_of(split.anomalous[start::2]) for start in (0, 1))
    own_source = "support" if model == FOCT else "folds"
    # The few support images of Foct leave none to hold out.
    for name, indices in [(own_source, split.training), ("held out", kept)][: 1 if model == FOCT else 2]:
        own, score = fitted(job, plan, images.training_data(indices), split.seed, calibrates=name == own_source)
        good = scores_of(score, images.features_of(split.tested))
        bad = scores_of(score, others)
        calibration = own if name == own_source else scores_of(score, images.features_of(held_out))
        limits = {(name, rate): conformal(calibration, rate) for rate in RATES}
        if name == "held out":
            limits["maximum", None] = calibration.max(), None
            limits["adaptive", None] = adaptive(calibration, scores_of(score, known)), None
            limits["adaptive, no anomalies", None] = adaptive(calibration, np.empty(0)), None
        for (source, rate), (limit, supported) in limits.items():
            yield key | {
                "threshold": source,
                "rate": "" if rate is None else rate,
                "supported": "" if supported is None else supported,
                # The threshold is the rank-th highest calibration score.
                "calibration": len(calibration),
                "rank": int((calibration >= limit).sum()),
                "false_alarms": int((good > limit).sum()),
                "good": len(good),
                "detected": int((bad > limit).sum()),
                "anomalous": len(bad),
            }


def fitted(job: Job, plan: Plan, data: AnomalibDataModule, seed: int, *, calibrates: bool) -> tuple[Numbers, Scorer]:
    """A model fitted to the training images: the scores that it calibrates itself with, and what scores features."""
    seed_everything(seed, workers=True, verbose=False)
    model = job.create_model()
    if not calibrates:
        model.replace_settings({"calibration_folds": 0})
    with TemporaryDirectory() as folder:
        engine = Engine(default_root_dir=folder, accelerator="cpu", logger=False, limit_val_batches=1, **QUIET)
        engine.fit(model, datamodule=data)
    own = model.calibration_scores
    return np.array(own.images if own else ()), on_features(model.model.eval(), plan.image_size)


def scores_of(score: Scorer, features: Sequence[FeatureMaps]) -> Numbers:
    """Image scores of features."""
    return np.array([float(score(each)[0]) for each in features])


def conformal(calibration: Numbers, rate: float) -> tuple[float, float]:
    """Threshold at a rate, and the rate that the images support."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnsupportedRateWarning)
        return threshold(calibration, rate), promised_rate(rate, len(calibration))


def adaptive(good: Numbers, anomalous: Numbers) -> float:
    """Anomalib's threshold of the highest F1 score."""
    metric = _F1AdaptiveThreshold()
    scores = torch.from_numpy(np.concatenate([good, anomalous])).float()
    metric.update(scores, torch.arange(len(scores)) >= len(good))
    return float(metric.compute())


def table(runs: pd.DataFrame) -> str:
    """Realised rates with 95 % intervals, detection rates, and the share of splits that keep the promise."""
    lines = []
    columns = ["model", "images", "split", "threshold", "rate"]
    for (model, images, how, source, rate), own in runs.groupby(columns, dropna=False, sort=False):
        alarms, good = int(own.false_alarms.sum()), int(own.good.sum())
        # Splits share images, so that this interval is too narrow.
        low, high = binomtest(alarms, good).proportion_ci()
        within = [kept(row) for row in own.itertuples()]
        lines.append(
            {
                "model": model,
                "images": images,
                "split": how,
                "threshold": source,
                "promised %": 100 * rate,
                "supported %": 100 * own.supported.mean(),
                "realised %": 100 * alarms / good,
                "interval": f"{100 * low:.1f} to {100 * high:.1f}",
                "detected %": 100 * own.detected.sum() / own.anomalous.sum(),
                "within": f"{sum(within)} of {len(within)}" if rate == rate else "",  # noqa: PLR0124 - NaN
            }
        )
    return pd.DataFrame(lines).to_string(index=False, float_format="{:.1f}".format, na_rep="")


def kept(row: Any) -> bool:
    """Whether a split has no more false alarms than the promise explains, at 5 %.

    The threshold is random too: the rate of false alarms above the k-th highest of n calibration scores has a beta
    distribution with the parameters k and n + 1 - k.
    """
    if row.supported != row.supported:
        return False
    explained = betabinom(row.good, row.rank, row.calibration + 1 - row.rank)
    return bool(explained.sf(row.false_alarms - 1) > 0.05)  # noqa: PLR2004


def draw(runs: pd.DataFrame, path: Path) -> None:
    """Save the realised rate against the rate that the images support, for each kind of split.

    Each line is a model and a source of its threshold, over all categories, splits and numbers of images. Below the
    diagonal, the promise is kept.
    """
    promised = runs[runs.rate.notna() & runs.supported.notna()]
    kinds = promised["split"].unique()
    mpl.use("Agg")
    figure, panels = plt.subplots(1, len(kinds), figsize=(5.5 * len(kinds), 4.5), squeeze=False, sharey=True)
    for panel, kind in zip(panels[0], kinds, strict=True):
        shown = promised[promised["split"] == kind]
        for (model, source), own in shown.groupby(["model", "threshold"], sort=False):
            sums = own.groupby("rate").agg({"supported": "mean", "false_alarms": "sum", "good": "sum"})
            realised = 100 * sums.false_alarms / sums.good
            panel.plot(100 * sums.supported, realised, marker="o", label=f"{model}, {source}")
        limit = 100 * shown.supported.max()
        panel.plot([0, limit], [0, limit], color="grey", linestyle="--", label="promise")
        panel.set(xlabel="promised false alarms in %", ylabel="realised false alarms in %", title=kind)
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)
    print(f"\nPlot: {path}")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
