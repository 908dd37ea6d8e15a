"""Images that do not belong into a folder of good images: bad parts, and a second product."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from sklearn.metrics import silhouette_score
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from anomalib_ot.features.whitening import LocalWhitening
from anomalib_ot.settings import require, require_finite

from .look import FEWEST_IMAGES

_FOLDS = 5
_ROUNDS = 4
# Images whose features are in use at a time; the others may be on disk.
_BATCH = 64
# Share of the cells, the highest ones, whose mean deviation is the score of an image.
_TOP = 0.03
# Smallest spread of the logarithms of scores, for images that are all alike.
_SPREAD = 0.01
# From the median absolute deviation to the standard deviation of a Gaussian.
_GAUSSIAN = 1.4826
# Two groups have this mean silhouette at least. That of single categories, of eleven papers as one among them, is at
# most 0.37, and that of two categories at least 0.57 in 35 of 36 pairs.
_SILHOUETTE = 0.5
_FEWEST_IN_GROUP = 3
_STARTS = 10
_SAMPLE = 512


@dataclass(frozen=True)
class Suspect:
    """An image that is unlike the others.

    Args:
        path: The image.
        score: How far the logarithm of its anomaly score is above the median, in robust standard deviations.
        ratio: Its anomaly score as a multiple of the median image's.
        anomaly_map: Deviation (H, W) of each cell of its feature map from the other images, about 1 where it is normal.
    """

    path: Path
    score: float
    ratio: float
    anomaly_map: NDArray[np.float32]


def find_suspects(
    paths: Sequence[Path], maps: Tensor, *, limit: float = 3.5, most: float = 0.2, seed: int = 0
) -> list[Suspect]:
    """Find bad parts among images that are nearly all good, without labels.

    The images are divided into folds. Each fold is scored by a detector that was fitted on the others, as in
    "Universal transformation of one-class classifiers for unsupervised anomaly detection" (arXiv, February 2026). What
    is far above the median is left out of the fits, and all images are scored again, until the same images are above.

    The detector is that of PaDiM with the whitening of this package, see
    :class:`~anomalib_ot.features.whitening.LocalWhitening`: the deviation of each cell from its mean, in closed form.
    Bad parts that repeat in the same place of many images become part of the normal and are not found.

    Nothing is promised about a single image: the least usual good images may be named, too.

    Args:
        paths: The N images.
        maps: Their feature maps (N, D, H, W) of one layer.
        limit: Smallest score of a suspect, in robust standard deviations of the logarithm above the median.
        most: Largest share of suspects, in [0, 0.5).
        seed: Seed of the folds.

    Returns:
        The suspects, the highest score first.

    Raises:
        ValueError: If there are fewer than ``FEWEST_IMAGES`` images, not as many maps as images, or an argument is out
            of range.

    Example:
        >>> maps = torch.randn(40, 8, 6, 6, generator=torch.Generator().manual_seed(0))
        >>> maps[3, :, 2:4, 4:] += 8
        >>> suspects = find_suspects([Path(f"{index}.png") for index in range(40)], maps)
        >>> suspects[0].path.name, suspects[0].anomaly_map.shape
        ('3.png', (6, 6))
    """
    _require_maps(paths, maps)
    require_finite(limit > 0, "limit", "positive", limit)
    require(0 <= most < 0.5, "most", "in [0, 0.5)", most)  # noqa: PLR2004 - the median would be that of bad parts
    count = len(paths)
    folds = np.random.default_rng(seed).permutation(count) % _FOLDS
    named = np.zeros(count, bool)
    for _ in range(_ROUNDS):
        deviations = _deviations(maps, folds, ~named)
        logs = _log_scores(deviations)
        median = float(np.median(logs))
        spread = max(_GAUSSIAN * float(np.median(np.abs(logs - median))), _SPREAD)
        scores = (logs - median) / spread
        order = np.argsort(-scores, kind="stable")[: int(most * count)]
        order = order[scores[order] > limit]
        before, named = named, np.isin(np.arange(count), order)
        if (named == before).all():
            break
    return [
        Suspect(
            path=paths[index],
            score=float(scores[index]),
            ratio=float(np.exp(logs[index] - median)),
            anomaly_map=deviations[index].numpy(),
        )
        for index in order
    ]


def find_groups(paths: Sequence[Path], maps: Tensor) -> list[list[Path]]:
    """Find out whether a folder has images of two products.

    The mean features of the images are divided into two clusters by k-means. These are two groups if they are far
    apart in comparison with their extent: with a mean silhouette (Rousseeuw, 1987) of 0.5 at least. Variants of one
    product, and different materials, usually count as one group.

    Args:
        paths: The N images.
        maps: Their feature maps (N, D, H, W) of one layer.

    Returns:
        The two groups, the larger one first, or all images as the only one. A group has at least three images.

    Raises:
        ValueError: If there are fewer than ``FEWEST_IMAGES`` images, or not as many maps as images.

    Example:
        >>> maps = torch.randn(20, 8, 6, 6, generator=torch.Generator().manual_seed(0))
        >>> maps[12:] += 3
        >>> [len(group) for group in find_groups([Path(f"{index}.png") for index in range(20)], maps)]
        [12, 8]
    """
    _require_maps(paths, maps)
    means = torch.cat([part.float().mean((2, 3)) for part in maps.split(_BATCH)]).numpy()
    clusters = KMeans(2, n_init=_STARTS, random_state=0).fit_predict(means)
    groups = [[path for path, own in zip(paths, clusters, strict=True) if own == each] for each in (0, 1)]
    if min(map(len, groups)) < _FEWEST_IN_GROUP or _silhouette(means, clusters) < _SILHOUETTE:
        return [list(paths)]
    return sorted(groups, key=len, reverse=True)


def _require_maps(paths: Sequence[Path], maps: Tensor) -> None:
    require(len(paths) >= FEWEST_IMAGES, "the number of images", f"at least {FEWEST_IMAGES}", len(paths))
    require(len(maps) == len(paths), "the number of feature maps", f"that of the images, {len(paths)}", len(maps))


def _deviations(maps: Tensor, folds: NDArray[np.int64], kept: NDArray[np.bool_]) -> Tensor:
    """Deviation (N, H, W) of each cell from the kept images of the other folds."""
    deviations = torch.empty(len(maps), *maps.shape[-2:])
    for fold in range(_FOLDS):
        whitening = LocalWhitening(centred=True)
        for part in _parts((folds != fold) & kept):
            whitening.update(maps[part].float())
        whitening.compute()
        for part in _parts(folds == fold):
            deviations[part] = whitening(maps[part]).square().mean(1).sqrt()
    # As single cells are noisy, each is the mean with its neighbours.
    return F.avg_pool2d(deviations[:, None], 3, 1, 1, count_include_pad=False)[:, 0]


def _parts(chosen: NDArray[np.bool_]) -> Sequence[Tensor]:
    return torch.from_numpy(np.flatnonzero(chosen)).split(_BATCH)


def _log_scores(deviations: Tensor) -> NDArray[np.float64]:
    cells = deviations.flatten(1).double()
    highest = cells.topk(max(1, round(_TOP * cells.shape[1])), dim=1).values.mean(1)
    logs: NDArray[np.float64] = highest.clamp(min=1e-12).log().numpy()
    return logs


def _silhouette(points: NDArray[np.float32], clusters: NDArray[np.int64]) -> float:
    """Mean silhouette of points (N, D), estimated from some of many points."""
    step = -(-len(points) // _SAMPLE)
    chosen = np.concatenate([np.flatnonzero(clusters == each)[::step] for each in np.unique(clusters)])
    return float(silhouette_score(points[chosen], clusters[chosen]))
