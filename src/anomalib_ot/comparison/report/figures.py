"""Curves and histograms, which the page draws as SVG."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from anomalib_ot.drawing.charts import Chart, Curve

from .groups import Group

_PRO_LIMIT = 0.3
_POINTS = 151
_BINS = 24
_TAIL = 0.5


@dataclass(frozen=True)
class Histogram:
    """Shares of a model's normal and anomalous images by score.

    Args:
        model: Label of the model.
        normal: Share of the normal images in each bin. Both histograms are scaled so that the highest bin is 1.
        anomalous: Share of the anomalous images in each bin, likewise.
        low: Left end of the axis.
        high: Right end.
        threshold: Position of the threshold on the axis, from 0 to 1; None if it is outside.
        outside: Number of images beyond the ends, which are counted in the outer bins.
    """

    model: str
    normal: list[float]
    anomalous: list[float]
    low: float
    high: float
    threshold: float | None
    outside: int


def charts(group: Group) -> list[Chart]:
    """ROC and PRO curves. Each is the mean over the seeds of a model at each false-positive rate."""
    drawn = (
        _chart("ROC, images", "true-positive rate", 1.0, _curves(group, "ROC", 1.0, "image_AUROC")),
        _chart("PRO, pixels", "overlap per region", _PRO_LIMIT, _curves(group, "PRO", _PRO_LIMIT, "pixel_AUPRO")),
    )
    return [chart for chart in drawn if chart.curves]


def _chart(title: str, ylabel: str, limit: float, curves: Sequence[Curve]) -> Chart:
    ticks = np.linspace(0, 1, 6).tolist()
    return Chart(
        title,
        f"{title}: {ylabel} over false-positive rate from 0 to {limit}, {len(curves)} models",
        (260, 215),
        ("false-positive rate", ylabel),
        ([f"{limit * tick:.3g}" for tick in ticks], [f"{tick:.1f}" for tick in ticks]),
        curves,
    )


def _curves(group: Group, name: str, limit: float, area: str) -> list[Curve]:
    found = []
    for index, (model, runs) in enumerate(group.runs.items()):
        curves = [run.curves[name] for run in runs if name in run.curves]
        if curves:
            values = group.values(model, area)
            value = f"{np.mean(values):.1f}" if values else ""
            found.append(Curve(model, _mean_curve(curves, limit), index, value))
    return found


def _mean_curve(curves: Sequence[Sequence[Sequence[float]]], limit: float) -> list[tuple[float, float]]:
    """Mean of several curves. The false-positive rate is divided by the limit."""
    rates = np.linspace(0, limit, _POINTS)
    # Interpolation takes the upper end of a vertical segment, so the lower end at 0 is added.
    mean = np.mean([np.interp(rates, curve[0], curve[1]) for curve in curves], axis=0)
    return [(0.0, min(curve[1][0] for curve in curves)), *zip((rates / limit).tolist(), mean.tolist(), strict=True)]


def histograms(group: Group) -> list[Histogram]:
    """Histograms of the image scores of the first seed of each model."""
    made = []
    for model, runs in group.runs.items():
        if runs:
            predictions = group.scores[runs[0].key]
            finite = np.isfinite(predictions.scores)
            if finite.any():
                made.append(_histogram(model, predictions.scores[finite], predictions.labels[finite]))
    return made


def _histogram(model: str, scores: NDArray[np.float32], labels: NDArray[np.int64]) -> Histogram:
    # A few outliers would squeeze all other scores into one bin.
    low, high = np.percentile(scores, [_TAIL, 100 - _TAIL]).tolist()
    outside = int(((scores < low) | (scores > high)).sum())
    high = high if high > low else low + 1
    clipped = scores.clip(low, high)
    counts = [np.histogram(clipped[labels == label], _BINS, (low, high))[0] for label in (0, 1)]
    shares = [count / max(count.sum(), 1) for count in counts]
    top = max(share.max() for share in shares)
    normal, anomalous = ((share / top).tolist() for share in shares)
    threshold = (0.5 - low) / (high - low)
    return Histogram(model, normal, anomalous, low, high, threshold if 0 <= threshold <= 1 else None, outside)
