"""How sure a difference between two models is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .record import Key, Predictions


@dataclass(frozen=True)
class Difference:
    """A difference in image AUROC, in percentage points.

    Args:
        mean: Average over the seeds.
        low: Lower end of the interval.
        high: Upper end of the interval.
        seeds: Seeds that both models have.
    """

    mean: float
    low: float
    high: float
    seeds: tuple[int, ...]


def paired_bootstrap(
    model: Mapping[Key, Predictions],
    baseline: Mapping[Key, Predictions],
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Difference:
    r"""Image AUROC of a model less that of a baseline on the same test images, with a percentile interval.

    With :math:`h(s, t)` 1 if :math:`s > t`, 1/2 if they tie and 0 otherwise, the AUROC of scores :math:`s` is the mean
    of :math:`h(s_i, s_j)` over all anomalous :math:`i` and normal :math:`j` (Mann and Whitney, 1947). A resample that
    draws the images :math:`w` times has the mean weighted by :math:`w_i w_j`. It is counted along the sorted scores of
    the normal images, in memory that grows with the number of images, not of pairs. Each resample keeps the numbers of
    normal and anomalous images, and is the same for both models and all seeds (Efron and Tibshirani, 1993, ch. 13). The
    interval is that of other test images, given these fits; what other seeds would change is not in it.

    Args:
        model: Predictions of the model by run, one run for each seed.
        baseline: Predictions of the baseline, likewise. Images are matched by kind and file name.
        resamples: Number of resamples.
        confidence: What share of them the interval holds.
        seed: Seed of the resamples.

    Returns:
        The difference, averaged over the seeds that both have, in percentage points.

    Raises:
        ValueError: If the runs were tested on different images, have no seed in common, or have scores that are not a
            number, or if there are no normal or no anomalous images.

    Example:
        >>> from anomalib_ot.comparison import Key, Predictions
        >>> def run(name, *scores):
        ...     images, kinds, labels = ["0.png", "1.png", "0.png"], ["good", "good", "scratch"], np.array([0, 0, 1])
        ...     return {Key("screw", name): Predictions(images, kinds, labels, np.array(scores))}
        >>> paired_bootstrap(run("Pradot", 0.1, 0.2, 0.9), run("PaDiM", 0.1, 0.8, 0.4)).mean
        50.0
    """
    pairs = _pairs(model, baseline)
    first = model[pairs[0][0]]
    labels = first.labels[name_order(first)]
    n_normal, n_anomalous = (labels == 0).sum(), (labels == 1).sum()
    if not n_normal or not n_anomalous:
        msg = f"{pairs[0][0]} was tested on {n_normal} normal and {n_anomalous} anomalous images; AUROC needs both"
        raise ValueError(msg)
    generator = np.random.default_rng(seed)
    # scipy.stats.bootstrap draws indices, not counts; the AUROC of counts needs no sort for each resample. First the
    # images as they are.
    weights = [
        [np.ones(n, dtype=np.int64), *generator.multinomial(n, np.full(n, 1 / n), size=resamples)]
        for n in (n_anomalous, n_normal)
    ]
    gains = sum(_wins(model[ours], *weights) - _wins(baseline[theirs], *weights) for ours, theirs in pairs)
    mean, *differences = 100 * gains / (2 * len(pairs) * n_normal * n_anomalous)
    low, high = np.quantile(differences, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Difference(float(mean), float(low), float(high), tuple(ours.seed for ours, _ in pairs))


def name_order(predictions: Predictions) -> list[int]:
    """Order of the test images by kind and file name, which is alike for all models; images that share both stay."""
    names = _names(predictions)
    return sorted(range(len(names)), key=lambda index: names[index])


def _names(predictions: Predictions) -> list[tuple[str, str]]:
    return [(kind, Path(image).name) for kind, image in zip(predictions.kinds, predictions.images, strict=True)]


def _pairs(model: Mapping[Key, Predictions], baseline: Mapping[Key, Predictions]) -> list[tuple[Key, Key]]:
    """Runs of the two that share a seed, after a check that all can be compared."""
    by_seed = {key.seed: key for key in baseline}
    pairs = [(key, by_seed[key.seed]) for key in sorted(model) if key.seed in by_seed]
    if not pairs:
        ours, theirs = ("; ".join(map(str, runs)) or "no run" for runs in (model, baseline))
        msg = f"there is no seed in common between {ours} and {theirs}; run both with the same seeds"
        raise ValueError(msg)
    first = pairs[0][0]
    runs = {key: runs[key] for pair in pairs for key, runs in zip(pair, (model, baseline), strict=True)}
    for key, predictions in runs.items():
        if _truth(predictions) != _truth(runs[first]):
            msg = f"{first} and {key} were tested on different images or labels; run both again on the same data"
            raise ValueError(msg)
        if np.isnan(predictions.scores).any():
            msg = f"{key} has scores that are not a number; run it again or leave it out"
            raise ValueError(msg)
    return pairs


def _truth(predictions: Predictions) -> list[tuple[tuple[str, str], int]]:
    return sorted(zip(_names(predictions), predictions.labels.tolist(), strict=True))


def _wins(
    predictions: Predictions,
    anomalous_weights: Sequence[NDArray[np.int64]],
    normal_weights: Sequence[NDArray[np.int64]],
) -> NDArray[np.int64]:
    """Twice the weighted number of pairs in which the anomalous image scores above the normal one, a tie a half.

    Args:
        predictions: Of n normal and m anomalous images.
        anomalous_weights: For each of R resamples whole numbers (m,), in the order of :func:`name_order`.
        normal_weights: For each whole numbers (n,), likewise.

    Returns:
        Whole numbers (R,).
    """
    order = name_order(predictions)
    scores, labels = predictions.scores[order], predictions.labels[order]
    anomalous, normal = scores[labels == 1], scores[labels == 0]
    ascending = normal.argsort()
    # How many of the normal images, in ascending order, are below each anomalous one, and below it or the same.
    below, up_to = (np.searchsorted(normal[ascending], anomalous, side) for side in ("left", "right"))
    wins = np.empty(len(normal_weights), dtype=np.int64)
    for row, (its_anomalous, its_normal) in enumerate(zip(anomalous_weights, normal_weights, strict=True)):
        counted = np.concatenate([[0], its_normal[ascending].cumsum()])
        wins[row] = its_anomalous @ (counted[below] + counted[up_to])
    return wins
