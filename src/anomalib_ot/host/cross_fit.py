"""Scores of training images by models that were fitted without them, to calibrate verdicts without held-out images."""

import math
from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from anomalib.data import InferenceBatch
from torch import Tensor
from torch.utils.data import Dataset, Sampler, Subset

from anomalib_ot.features.extraction import FeatureMaps

from .calibration import FOLDS, CalibrationScores, ScoreRow, score_rows
from .feature_cache import feature_loader
from .seeding import epoch_order

_Scored = TypeVar("_Scored")


@dataclass(frozen=True)
class FoldFeatures:
    """Cached features that a fold's model is fitted on.

    Args:
        dataset: The features, a :class:`~anomalib_ot.features.store.FeatureDataset` or a subset of one.
        batch_size: Images in a training batch, at most their number.
        device: Device to move features to.
        seed: Seed of the order of the images.
    """

    dataset: Dataset
    batch_size: int
    device: torch.device
    seed: int = 0

    def __len__(self) -> int:
        return len(cast("Sized", self.dataset))

    def in_order(self) -> Iterator[FeatureMaps]:
        """Batches of feature maps (B, D, H, W) of each layer, in the order of the images."""
        return self._batches(None)

    def epoch(self, number: int) -> Iterator[FeatureMaps]:
        """The same in the random order of an epoch."""
        return self._batches(epoch_order(self.dataset, number, self.seed))

    def _batches(self, sampler: Sampler | None) -> Iterator[FeatureMaps]:
        for batch in feature_loader(self.dataset, self.batch_size, sampler):
            yield {layer: maps.to(self.device) for layer, maps in batch.features.items()}


def cross_fit(
    features: FoldFeatures,
    folds: int,
    fit: Callable[[FoldFeatures], Callable[[FeatureMaps], InferenceBatch]],
) -> CalibrationScores:
    """Score each training image by a model that was fitted on the other folds.

    If verdicts were those of the fold models, a good image that is exchangeable with the n training images would be
    flagged with a probability of at most 2 · rate + min{2 (1 − 1/k) / (n/k + 1), (1 − k/n) / (k + 1)} (cross-conformal
    prediction: Vovk, Cross-conformal predictors, 2015; CV+: Barber, Candès, Ramdas and Tibshirani, Predictive inference
    with the jackknife+, 2021, https://arxiv.org/abs/1905.02928). Here the final model, fitted on all images, gives the
    verdicts, so that the rate is approximate. The final model has seen more images and scores good ones lower.

    Args:
        features: Features of all training images.
        folds: Number of folds k, at least 2. Each has at least two images.
        fit: Fits a model on features, and returns what scores feature maps (B, D, H, W) of each layer.

    Returns:
        The scores of all images, in the order of the features.

    Raises:
        ValueError: If a score is not finite.
    """

    def fit_rows(rest: FoldFeatures) -> Callable[[FeatureMaps], list[ScoreRow]]:
        score = fit(rest)
        return lambda batch: rows_of(score(batch))

    return fold_scores(features, folds, left_out(features, folds, fit_rows))


def left_out(
    features: FoldFeatures, folds: int, fit: Callable[[FoldFeatures], Callable[[FeatureMaps], _Scored]]
) -> list[_Scored]:
    """Score each training image by a model that was fitted on the other folds, as :func:`cross_fit`.

    Args:
        features: Features of all training images.
        folds: Number of folds, from 2 to the number of images.
        fit: Fits a model on features, and returns what scores feature maps (B, D, H, W) of each layer, in any way.

    Returns:
        What the models return for each batch of images that are left out.
    """
    scored: list[_Scored] = []
    for images in _folds(features, folds):
        rest = Subset(features.dataset, sorted({*range(len(features))} - {*images}))
        score = fit(FoldFeatures(rest, min(features.batch_size, len(rest)), features.device, features.seed))
        others = FoldFeatures(Subset(features.dataset, images), features.batch_size, features.device)
        with torch.no_grad():
            scored += [score(batch) for batch in others.in_order()]
    return scored


def rows_of(scored: InferenceBatch) -> list[ScoreRow]:
    """Rows of :func:`~anomalib_ot.host.calibration.score_rows` for a batch."""
    return score_rows(cast("Tensor", scored.pred_score), scored.anomaly_map)


def fold_scores(features: FoldFeatures, folds: int, batches: Iterable[Iterable[ScoreRow]]) -> CalibrationScores:
    """The calibration scores of images in the order of their features, from the rows of :func:`left_out`.

    Raises:
        ValueError: If a score is not finite.
    """
    rows = [row for batch in batches for row in batch]
    if not all(math.isfinite(score) for score, _ in rows):
        msg = "a model of a fold gives scores that are NaN or infinite"
        raise ValueError(msg)
    images = [image for fold in _folds(features, folds) for image in fold]
    by_image = dict(zip(images, rows, strict=True))
    return CalibrationScores.of((by_image[image] for image in sorted(images)), FOLDS)


def _folds(features: FoldFeatures, folds: int) -> list[list[int]]:
    """Indices of the images of each fold."""
    generator = torch.Generator().manual_seed(features.seed)
    order = torch.randperm(len(features), generator=generator).tolist()
    return [sorted(order[number::folds]) for number in range(folds)]
