"""The metrics of a comparison, from the predictions for the test images.

The metrics use scores and maps before clipping, so that defects do not tie. ``anomalib test`` clips to the range of the
validation images first. Its metrics can differ if the validation images are all normal.
"""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from anomalib.data import ImageBatch
from anomalib.metrics import AUPRO, AUROC, AnomalibMetric, F1Max
from numpy.typing import NDArray
from torchmetrics.functional.classification import binary_roc

from anomalib_ot.data.defects import defects_config
from anomalib_ot.metrics import AUSPRO, PROCurve

from .record import Curve, Predictions

_BATCH = 32
_POINTS = 200


def evaluate(predictions: Predictions) -> tuple[dict[str, float], dict[str, Curve]]:
    """Compute metrics and curves.

    Args:
        predictions: Predictions for the test images.

    Returns:
        The metrics of :class:`~anomalib_ot.comparison.record.Record` by name, in percent, and the curves ``ROC`` and
        ``PRO``. Metrics and curves that need masks or maps are absent if there are none.

    Raises:
        ValueError: If the images are all normal or all anomalous, or a score is not finite.
    """
    labels = predictions.labels
    if labels.all() or not labels.any():
        kind = "anomalous" if labels.any() else "normal"
        msg = f"the metrics need normal and anomalous test images; all {len(labels)} are {kind}"
        raise ValueError(msg)
    for name, values in (("score", predictions.scores), ("map", predictions.maps)):
        if values is not None and not np.isfinite(values).all():
            msg = f"the model gave a {name} that is not finite"
            raise ValueError(msg)
    metrics, curves = _image_metrics(predictions)
    if predictions.maps is not None and predictions.truth is not None and predictions.truth.any():
        more, pro = _pixel_metrics(predictions)
        metrics |= more
        curves |= pro
    return {name: 100 * value for name, value in metrics.items() if not math.isnan(value)}, curves


def _image_metrics(predictions: Predictions) -> tuple[dict[str, float], dict[str, Curve]]:
    scores = torch.from_numpy(_to_unit(predictions.scores))
    labels = torch.from_numpy(predictions.labels)
    kinds = np.array(predictions.kinds)
    anomalous = sorted({*kinds[predictions.labels == 1]})
    result = {f"image_{metric.__name__}": _image_metric(metric, scores, labels) for metric in (AUROC, F1Max)}
    for kind in anomalous if len(anomalous) > 1 else ():
        which = torch.from_numpy((kinds == kind) | (predictions.labels == 0))
        result[f"image_AUROC_{kind}"] = _image_metric(AUROC, scores[which], labels[which])
    false, true, _ = binary_roc(scores, labels)
    return result, {"ROC": _thinned(false.numpy(), true.numpy())}


def _image_metric(metric: type[AnomalibMetric], scores: torch.Tensor, labels: torch.Tensor) -> float:
    batch = ImageBatch(image=torch.empty(len(scores), 3, 1, 1), pred_score=scores, gt_label=labels)
    return _value(metric(fields=["pred_score", "gt_label"]), [batch])


def _pixel_metrics(predictions: Predictions) -> tuple[dict[str, float], dict[str, Curve]]:
    maps = torch.from_numpy(_to_unit(np.asarray(predictions.maps, dtype=np.float32)))
    truth = torch.from_numpy(np.asarray(predictions.truth))
    batches = [
        ImageBatch(
            image=torch.empty(len(maps[start : start + _BATCH]), 3, 1, 1),
            anomaly_map=maps[start : start + _BATCH],
            gt_mask=truth[start : start + _BATCH],
            image_path=predictions.images[start : start + _BATCH],
        )
        for start in range(0, len(maps), _BATCH)
    ]
    result = {
        f"pixel_{metric.__name__}": _value(metric(fields=["anomaly_map", "gt_mask"]), batches)
        for metric in (AUROC, F1Max, AUPRO)
    }
    if defects_config(predictions.images[0]).is_file():
        spro = AUSPRO(kinds=sorted({*predictions.kinds} - {"good"}))
        result["pixel_AUSPRO"] = _value(spro, batches)
        result |= {f"pixel_AUSPRO_{kind}": float(value) for kind, value in spro.per_kind().items()}
    curve = PROCurve()
    curve.update(maps, truth)
    fpr, overlap = curve.compute()
    return result, {} if overlap.isnan().any() else {"PRO": _thinned(fpr.numpy(), overlap.numpy())}


def _value(metric: AnomalibMetric, batches: Iterable[ImageBatch]) -> float:
    for batch in batches:
        metric.update(batch)
    return float(metric.compute())


def _to_unit(values: NDArray[Any]) -> NDArray[Any]:
    """Scale to [0, 1], because torchmetrics applies a sigmoid to values outside this range."""
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if high > low else np.zeros_like(values)


def _thinned(false: NDArray[Any], true: NDArray[Any]) -> Curve:
    """At most ``_POINTS`` evenly spaced points of a curve, with both ends."""
    chosen = np.unique(np.linspace(0, len(false) - 1, min(len(false), _POINTS)).round().astype(int))
    return [[round(float(value), 5) for value in axis[chosen]] for axis in (false, true)]
