"""Paired bootstrap of the difference between two models, which the report shows with its interval."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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
        seeds: Seeds that both models have in common.
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
    r"""Difference in image AUROC between a model and a baseline on the same test images, with a percentile interval.

    Let :math:`h(s, t)` be 1 if :math:`s > t`, 1/2 if :math:`s = t` and 0 otherwise. The AUROC of scores :math:`s` is
    the mean of :math:`h(s_i, s_j)` over all anomalous images :math:`i` and normal images :math:`j` (Mann and Whitney,
    1947). If a resample draws image :math:`i` :math:`w_i` times, its AUROC is the mean weighted by :math:`w_i w_j`. The
    sum is computed along the sorted scores of the normal images, so memory grows with the number of images, not of
    pairs.

    Each resample keeps the numbers of normal and anomalous images. Both models and all seeds use the same resamples
    (Efron and Tibshirani, 1993, ch. 13). The interval describes the variation over test images for the given fits. It
    does not include the variation over seeds.

    Args:
        model: Predictions of the model by run, with one run for each seed.
        baseline: Predictions of the baseline, likewise. Images are matched by kind and file name.
        resamples: Number of resamples.
        confidence: Share of the resamples within the interval.
        seed: Seed of the resamples.

    Returns:
        The difference in percentage points, averaged over the common seeds.

    Raises:
        ValueError: If the runs were tested on different images, have no seed in common, or have scores that are NaN, or
            if there are no normal or no anomalous images.

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
    labels = first.labels[first.name_order()]
    n_normal, n_anomalous = (labels == 0).sum(), (labels == 1).sum()
    if not n_normal or not n_anomalous:
        msg = f"{pairs[0][0]} was tested on {n_normal} normal and {n_anomalous} anomalous images; AUROC needs both"
        raise ValueError(msg)
    generator = np.random.default_rng(seed)
    # scipy.stats.bootstrap draws indices instead of counts. With counts, no resample needs a sort. The first resample
    # is the test set itself.
    weights = [
        [np.ones(n, dtype=np.int64), *generator.multinomial(n, np.full(n, 1 / n), size=resamples)]
        for n in (n_anomalous, n_normal)
    ]
    gains = sum(_wins(model[ours], *weights) - _wins(baseline[theirs], *weights) for ours, theirs in pairs)
    mean, *differences = 100 * gains / (2 * len(pairs) * n_normal * n_anomalous)
    low, high = np.quantile(differences, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Difference(float(mean), float(low), float(high), tuple(ours.seed for ours, _ in pairs))


def _pairs(model: Mapping[Key, Predictions], baseline: Mapping[Key, Predictions]) -> list[tuple[Key, Key]]:
    """Pairs of runs that share a seed, after a check that all runs can be compared."""
    by_seed = {key.seed: key for key in baseline}
    pairs = [(key, by_seed[key.seed]) for key in sorted(model) if key.seed in by_seed]
    if not pairs:
        ours, theirs = ("; ".join(map(str, runs)) or "no run" for runs in (model, baseline))
        msg = f"{ours} and {theirs} have no seed in common; run both with the same seeds"
        raise ValueError(msg)
    first = pairs[0][0]
    runs = {key: runs[key] for pair in pairs for key, runs in zip(pair, (model, baseline), strict=True)}
    for key, predictions in runs.items():
        if _truth(predictions) != _truth(runs[first]):
            msg = f"{first} and {key} were tested on different images or labels; run both again on the same data"
            raise ValueError(msg)
        if np.isnan(predictions.scores).any():
            msg = f"{key} has scores that are NaN; run it again or leave it out"
            raise ValueError(msg)
    return pairs


def _truth(predictions: Predictions) -> list[tuple[tuple[str, str], int]]:
    return sorted(zip(predictions.names, predictions.labels.tolist(), strict=True))


def _wins(
    predictions: Predictions,
    anomalous_weights: Sequence[NDArray[np.int64]],
    normal_weights: Sequence[NDArray[np.int64]],
) -> NDArray[np.int64]:
    """Twice the weighted number of pairs in which the anomalous image has the higher score. Ties count as a half.

    Args:
        predictions: Predictions for n normal and m anomalous images.
        anomalous_weights: Integers (m,) for each of R resamples, in the order of :meth:`Predictions.name_order`.
        normal_weights: Integers (n,) for each resample, likewise.

    Returns:
        Integers (R,).
    """
    order = predictions.name_order()
    scores, labels = predictions.scores[order], predictions.labels[order]
    anomalous, normal = scores[labels == 1], scores[labels == 0]
    ascending = normal.argsort()
    # Number of normal images that score below each anomalous one, and of those that score at most as high.
    below, up_to = (np.searchsorted(normal[ascending], anomalous, side) for side in ("left", "right"))
    wins = np.empty(len(normal_weights), dtype=np.int64)
    for row, (its_anomalous, its_normal) in enumerate(zip(anomalous_weights, normal_weights, strict=True)):
        counted = np.concatenate([[0], its_normal[ascending].cumsum()])
        wins[row] = its_anomalous @ (counted[below] + counted[up_to])
    return wins
