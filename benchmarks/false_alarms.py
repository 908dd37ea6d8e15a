"""Promised and realised rates of false alarms, for thresholds from good images alone and for those of anomalib.

Run as ``python -m benchmarks.false_alarms --root DATA``; :func:`~benchmarks.categories.categories_in` describes DATA.
The embedded category needs no DATA. In each split, the good training and test images are divided again at random: a
part trains the model, and the others count its false alarms. The features of all images are extracted once, and
:mod:`benchmarks.calibrated` fits the models to them.

Each row is a model, a source of its threshold, a number of training images and a promised rate:

``folds``
    Threshold at the rate, from the training images that each fold left out.
``support``
    The only source of Foct: threshold at the rate, from its support images, each compared with the others.
``held out``
    The same from a fifth of the training images, which the model is then not trained on. Duo has none, as it would need
    folds besides.
``maximum``
    Highest score of these held-out images. It promises nothing.
``adaptive``
    anomalib's threshold of the highest F1 score on the held-out images and half of the anomalous images.
``adaptive, no anomalies``
    The same on the held-out images alone.

The promise is about images that are drawn alike. Two options show what happens if they are not: with ``--by_group``,
no group of images, such as those of one part, is both in the training and in the test; with ``--contaminated 0.05``,
5 % of the training images, held-out ones included, are anomalous.

All runs may take many hours. The options select a part of them, and a run continues what an earlier one has begun::

    python -m benchmarks.false_alarms --root DATA --models '[Duo, Foct]' --counts '[10, 20, 50, 100]' --seeds 3

:mod:`benchmarks.promises` prints the tables of what there is.
"""

import logging
import re
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from anomalib.data import AnomalibDataModule
from anomalib.metrics.threshold.f1_adaptive_threshold import _F1AdaptiveThreshold
from jsonargparse import auto_cli
from lightning.pytorch.trainer.states import TrainerFn
from PIL import Image
from rich.progress import track
from torch import Tensor

from anomalib_ot.comparison import Key, Plan, read_plan
from anomalib_ot.decide.conformal import UnsupportedRateWarning, promised_rate, threshold
from anomalib_ot.features.extraction import FeatureMaps
from anomalib_ot.offline import offline_backbone
from anomalib_ot.settings import require

from .calibrated import Calibrated, Numbers, fitted_on_features, fitted_on_images
from .categories import EMBEDDED, categories_in
from .few_images import ALL, Features, draw_images
from .promises import report
from .rows import appended, finished
from .versions import versions

RATES = (0.01, 0.02, 0.05, 0.1, 0.2)
FOCT = "Foct"
# One fit of Duo measures its parts too.
MODELS = ("Duo", FOCT)
KEY = ("category", "model", "images", "seed", "split")
_COUNTS = ("calibration", "rank", "false_alarms", "good", "detected", "anomalous")
FIELDS = (*KEY, "threshold", "rate", "supported", *_COUNTS)
# Share of the good images that count the false alarms, and of the training images that are held out.
_TESTED = 0.4
_HELD_OUT = 0.2
_FEWEST = 2


def main(
    root: Path | None = None,
    output: Path = Path("results/false_alarms.csv"),
    categories: list[str] | None = None,
    counts: list[int | None] = [10, 20, 50, None],  # noqa: B006 - jsonargparse shows the default, and nothing changes it
    shots: list[int | None] = [4, 8],  # noqa: B006
    seeds: int = 10,
    models: list[str] = [*MODELS],  # noqa: B006
    held_out: bool = True,
    by_group: str | None = None,
    contaminated: float = 0.0,
) -> None:
    """Measure the rates on the same splits, print the tables and draw the plot.

    Args:
        root: Folder of the categories.
        output: CSV file of the runs, continued if it exists; its tables pool a Pradot that was fitted alone, in batches
            of 32, with that of Duo, in batches of 16. The plot has the same name with the suffix ``.png``.
        categories: Categories to run; all by default.
        counts: Numbers of training images; null for all images. A category with too few images is left out.
        shots: Numbers of support images of Foct.
        seeds: Number of splits.
        models: Models of ``configs/compare/real.yaml`` that calibrate themselves: Duo, which measures Pradot and WtFlow
            too, Pradot, WtFlow and Foct.
        held_out: Whether to measure the thresholds of held-out images, which need another fit. A split that was
            measured without them is finished: give each choice its own output.
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
                        rows = [*rows_of(plan, images, split, model, has_held_out=held_out)]
                        for row in [{name: str(each[name]) for name in FIELDS} for each in rows]:
                            # A part of Duo may have been measured alone.
                            if tuple(row[name] for name in KEY) not in done:
                                add(row)
    report(output, output.with_suffix(".png"))


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

    Attributes:
        good: Samples of the good images.
        extractor: Extracts their features.
        groups: Group of each image; the anomalous ones follow the good ones.
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
        # As if nobody had seen the defects of anomalous training images.
        unseen = test[~is_good].assign(label="good", label_index=0, mask_path="")
        self._samples = pd.concat([self.good, unseen], ignore_index=True)
        paths = self._samples.image_path.tolist()
        self.groups = paths if by_group is None else groups_of(paths, by_group)
        layers = {layer for job in plan.jobs() for layer in job.model["init_args"]["layers"]}
        self.extractor = Features(plan, layers)

    @cached_property
    def _known(self) -> FeatureMaps:
        return self.features(self._samples)

    def images(self, samples: pd.DataFrame, change: Callable[[Tensor], Tensor] | None = None) -> Iterator[Tensor]:
        """Images (3, h, w), each after a change."""
        # anomalib sorts them by path.
        self.data.test_data.samples = samples
        places = {path: place for place, path in enumerate(self.data.test_data.samples.image_path)}
        for path in track(samples.image_path.tolist(), self.category):
            image = self.data.test_data[places[path]].image
            yield image if change is None else change(image)

    def features(self, samples: pd.DataFrame, change: Callable[[Tensor], Tensor] | None = None) -> FeatureMaps:
        """Feature map (N, D, H, W) of each layer for images, after a change of each image."""
        maps = [self.extractor.of(image) for image in self.images(samples, change)]
        return {layer: torch.cat([each[layer] for each in maps]) for layer in maps[0]}

    def samples_of(self, indices: Sequence[int]) -> pd.DataFrame:
        """Samples of images."""
        return self._samples.loc[[*indices]].reset_index(drop=True)

    def features_of(self, indices: Sequence[int]) -> FeatureMaps:
        """Known features of images."""
        return {layer: maps[list(indices)] for layer, maps in self._known.items()}

    def splits(self, seed: int, counts: Sequence[int | None]) -> Iterator[Split]:
        """Divisions with each number of training images that there are enough for; all test the same good images."""
        random = np.random.default_rng(seed)
        order = random.permutation(len(self.good)).tolist()
        anomalous = random.permutation(range(len(self.good), len(self._samples))).tolist()
        own = self._tested_groups(order)
        tested = [index for index in order if self.groups[index] in own]
        pool = [index for index in order if self.groups[index] not in own]
        for count in counts:
            if count is not None and count >= len(pool):
                continue
            training = pool[:count]
            if self._contaminated:
                training = random.permutation(self._with_anomalous(training, anomalous, own)).tolist()
            known = {self.groups[index] for index in (*pool, *training)}
            left = {*anomalous} - {*training}
            others = sorted(index for index in left if self.groups[index] not in known)
            yield Split(str(count or ALL), seed, training, tested, others)

    def _with_anomalous(self, training: list[int], anomalous: list[int], tested: set[str]) -> list[int]:
        """Training images of which a share is replaced by anomalous ones of groups that are not tested.

        Raises:
            ValueError: If there are too few of them.
        """
        count = max(1, round(self._contaminated * len(training)))
        mixed_in = [index for index in anomalous if self.groups[index] not in tested][:count]
        if len(mixed_in) < count:
            msg = f"{self.category} has {len(mixed_in)} anomalous images outside the tested groups, expected {count}"
            raise ValueError(msg)
        return training[count:] + mixed_in

    def _tested_groups(self, order: list[int]) -> set[str]:
        """Groups of good images in an order, until their share is reached; at least one group is left."""
        groups = [self.groups[index] for index in order]
        chosen: set[str] = set()
        for group in groups:
            enough = sum(each in chosen for each in groups) >= round(_TESTED * len(groups))
            if enough or len(chosen | {group}) == len({*groups}):
                break
            chosen.add(group)
        return chosen

    def training_data(self, indices: list[int]) -> AnomalibDataModule:
        """The data module with these images to train and to validate on, all of them labelled good."""
        self.data.train_data.samples = self.samples_of(indices)
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


def rows_of(
    plan: Plan, images: GoodAndBad, split: Split, model: str, *, has_held_out: bool = True
) -> Iterator[dict[str, object]]:
    """The rows of the models that one fit on a split measures, and another fit without the held-out images."""
    held_out = split.training[: max(_FEWEST, round(_HELD_OUT * len(split.training)))]
    kept = split.training[len(held_out) :]
    # Half of the anomalous images may set anomalib's threshold, and the others are detected.
    known, others = (images.features_of(split.anomalous[start::2]) for start in (0, 1))
    tested = images.features_of(split.tested)
    own_source = "support" if model == FOCT else "folds"
    # The few support images of Foct leave none to hold out.
    for source, indices in [(own_source, split.training), ("held out", kept)][
        : 2 if has_held_out and model != FOCT else 1
    ]:
        fit = fitted(plan, images, indices, split.seed, model, has_folds=source == own_source)
        good, bad = fit.scores_of(tested), fit.scores_of(others)
        calibration = fit.calibration or fit.scores_of(images.features_of(held_out))
        seen = fit.scores_of(known) if source == "held out" else {}
        for name, scores in calibration.items():
            limits = {(source, rate): conformal(scores, rate) for rate in RATES}
            if source == "held out":
                limits["maximum", None] = scores.max(), None
                limits["adaptive", None] = adaptive(scores, seen.get(name, np.empty(0))), None
                limits["adaptive, no anomalies", None] = adaptive(scores, np.empty(0)), None
            detected = bad.get(name, np.empty(0))
            key = dict(zip(KEY, (images.category, name, split.name, split.seed, images.how), strict=True))
            for (which, rate), (limit, supported) in limits.items():
                yield key | {
                    "threshold": which,
                    "rate": "" if rate is None else rate,
                    "supported": "" if supported is None else supported,
                    # The threshold is the rank-th highest calibration score.
                    "calibration": len(scores),
                    "rank": int((scores >= limit).sum()),
                    "false_alarms": int((good[name] > limit).sum()),
                    "good": len(good[name]),
                    "detected": int((detected > limit).sum()),
                    "anomalous": len(detected),
                }


def fitted(
    plan: Plan, images: GoodAndBad, indices: list[int], seed: int, model: str, *, has_folds: bool = True
) -> Calibrated:
    """A model of the plan, fitted to images by their indices."""
    job = next(job for job in plan.jobs() if job.key.model == model)
    if model == FOCT:
        return fitted_on_images(job, images.training_data(indices), plan.image_size, seed)
    return fitted_on_features(job, images.features_of(indices), plan.image_size, seed, has_folds=has_folds)


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


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
