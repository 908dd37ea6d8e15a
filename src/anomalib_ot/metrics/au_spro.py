"""Saturated per-region overlap, with constant memory for any number of images.

The saturated per-region overlap (Bergmann et al., 2022, https://doi.org/10.1007/s11263-022-01578-9) of a prediction P
with a defect A that saturates at an area s is sPRO = ``min(|A ∩ P| / s, 1)``. With s the area of A it is the per-region
overlap, PRO (Bergmann et al., 2021, https://doi.org/10.1007/s11263-020-01400-4). P contains the pixels that score at
least a threshold. As the threshold falls, the mean over all defects rises, and so does the false-positive rate, the
share of defect-free pixels in P.

Each pixel therefore contributes at its own score. A defect-free pixel adds to the rate. In a defect, each of the s
pixels with the highest scores adds 1 / s to the overlap, and the other pixels add nothing. The curve needs only the
histograms of both contributions over the scores.
"""

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from math import ceil
from pathlib import Path
from typing import Any

import torch
from anomalib.metrics import AnomalibMetric
from skimage.measure import label
from torch import Tensor
from torch.nn.functional import interpolate
from torchmetrics import Metric

from anomalib_ot.data.defects import image_defects
from anomalib_ot.settings import require

# A bin contains the float32 numbers with the same sign, exponent and first mantissa bits.
_BITS = 20
_DROPPED_BITS = 32 - _BITS
_MAGNITUDE = 2**31 - 1
# The full overlap with one defect. Sums of integers do not depend on the order, the device or the process.
_UNIT = 2**36


class _OverlapHistograms(Metric):
    """Histograms of defect-free pixels and of overlaps over the scores, for one or several kinds of anomalies.

    A bin is the first 20 bits of a float32: scores are rounded towards zero to 12 significant bits, by at most 1 part
    in 2048. Each kind takes 16 MiB and the normal images take 8 MiB. The zeros for ``reset`` take the same again.

    Args:
        kinds: Number of kinds.
        fpr_limit: Largest false-positive rate of interest, above 0 and at most 1.
        **kwargs: Arguments of torchmetrics' ``Metric``.

    Raises:
        ValueError: If the limit is out of range.
    """

    is_differentiable = False
    full_state_update = False
    defect_free: Tensor
    overlap: Tensor

    def __init__(self, kinds: int, fpr_limit: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        require(0 < fpr_limit <= 1, "fpr_limit", "above 0 and at most 1", fpr_limit)
        self.fpr_limit = fpr_limit
        # Pixels (kinds + 1, bins) of the images of each kind; the last row is for the normal images.
        self.add_state("defect_free", torch.zeros(kinds + 1, 2**_BITS, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("overlap", torch.zeros(kinds, 2**_BITS, dtype=torch.int64), dist_reduce_fx="sum")

    # The test loop resets states in inference mode, and these can be updated in inference mode only.
    @torch.inference_mode()
    def _count(self, scores: Tensor, defects: Sequence[Tensor], saturation: Sequence[float], kind: int) -> None:
        """Add an image.

        Args:
            scores: Floating-point tensor (H, W), or of any other shape.
            defects: Indices of each defect's pixels into the flattened scores; empty for a normal image.
            saturation: Area in pixels at which each defect saturates, at most its own area.
            kind: Index of the image's kind, or -1 for a normal image.

        Raises:
            ValueError: If a score is not finite.
        """
        bins = _bins(scores).flatten()
        is_free = torch.ones_like(bins, dtype=torch.bool)
        for pixels, area in zip(defects, saturation, strict=True):
            is_free[pixels] = False
            highest = bins[pixels].topk(min(ceil(area), len(pixels))).values
            self.overlap[kind].index_add_(0, highest, _shares(area, len(highest)).to(highest.device))
        free = bins[is_free]
        self.defect_free[kind].index_add_(0, free, free.new_ones(1).expand_as(free))

    def _curve(self, kind: int) -> tuple[Tensor, Tensor] | None:
        """False-positive rate over the normal images and those of a kind, and mean overlap with the kind's defects.

        Both (points,) in float64, from 0 to 1; None if there is no defect or no defect-free pixel.
        """
        free = self.defect_free[kind] + self.defect_free[-1]
        if not self.overlap[kind].any() or not free.any():
            return None
        counts = torch.stack([free, self.overlap[kind]])
        counts = counts[:, counts.any(0)].flip(1).cumsum(1).double()
        rate, overlap = torch.cat([counts.new_zeros(2, 1), counts], 1)
        return rate / rate[-1], overlap / overlap[-1]

    def _area(self, kind: int) -> Tensor:
        """Area under the curve of a kind up to the limit, divided by it: a float32 scalar; NaN without a curve."""
        curve = self._curve(kind)
        area = torch.nan if curve is None else _mean_overlap(*curve, self.fpr_limit)
        return torch.as_tensor(area, dtype=torch.float32, device=self.overlap.device)

    def _all_processes(self) -> AbstractContextManager[None]:
        """Context in which the states are summed over all processes, as in ``compute``."""
        return self.sync_context(self.dist_sync_fn, should_sync=self._to_sync, should_unsync=self._should_unsync)


class _AUSPRO(_OverlapHistograms):
    """Area under the saturated per-region overlap over the false-positive rate, see :class:`AUSPRO`."""

    higher_is_better = True

    def __init__(
        self,
        fpr_limit: float = 0.05,
        kinds: Sequence[str] = ("logical_anomalies", "structural_anomalies"),
        **kwargs: Any,
    ) -> None:
        if not kinds or len(set(kinds)) < len(kinds) or "good" in kinds:
            msg = f"kinds must name different folders of anomalous images, not {list(kinds)}"
            raise ValueError(msg)
        super().__init__(len(kinds), fpr_limit, **kwargs)
        self.kinds = tuple(kinds)

    def update(self, anomaly_map: Tensor, image_path: Sequence[str]) -> None:
        """Add a batch.

        Args:
            anomaly_map: Floating-point tensor (B, H, W); higher scores are more anomalous.
            image_path: Paths of the B image files.

        Raises:
            FileNotFoundError: If a mask or the category's ``defects_config.json`` is missing.
            ValueError: If a score is not finite, the folder of an image is neither ``good`` nor a kind, or a mask is
                invalid.
        """
        for scores, path in zip(anomaly_map, image_path, strict=True):
            kind = -1 if Path(path).parent.name == "good" else self._index(Path(path).parent.name)
            defects = image_defects(path)
            pixels = [mask.flatten().nonzero()[:, 0].to(scores.device) for mask in defects.masks]
            self._count(_resize(scores, defects.masks.shape[-2:]), pixels, defects.saturation.tolist(), kind)

    def compute(self) -> Tensor:
        """Mean over the kinds that have defects, a scalar; NaN and a warning if no kind has any."""
        mean = torch.stack([self._area(kind) for kind in range(len(self.kinds))]).nanmean()
        if mean.isnan():
            warnings.warn("there is no defect, or no defect-free pixel: AU-sPRO is undefined", stacklevel=2)
        return mean

    def per_kind(self) -> dict[str, Tensor]:
        """AU-sPRO of each kind, a scalar; NaN for a kind without defects."""
        with self._all_processes():
            return {name: self._area(kind) for kind, name in enumerate(self.kinds)}

    def curve(self, kind: str) -> tuple[Tensor, Tensor]:
        """Curve of a kind.

        Args:
            kind: One of ``kinds``.

        Returns:
            False-positive rates and the mean sPRO at each rate, (points,) in float64. Both are from 0 to 1 and do not
            decrease.

        Raises:
            ValueError: If the kind is unknown or has no defect.
        """
        index = self._index(kind)
        with self._all_processes():
            curve = self._curve(index)
        if curve is None:
            msg = f"there is no curve of {kind}: call update with its defects, and with defect-free pixels"
            raise ValueError(msg)
        return curve

    def _index(self, kind: str) -> int:
        if kind not in self.kinds:
            msg = f"{kind!r} is neither 'good' nor one of the kinds {list(self.kinds)}"
            raise ValueError(msg)
        return self.kinds.index(kind)


class AUSPRO(AnomalibMetric, _AUSPRO):  # type: ignore[misc]
    """Area under the saturated per-region overlap over the false-positive rate, the metric of MVTec LOCO AD.

    The metric is the area up to ``fpr_limit``, divided by ``fpr_limit``: the mean over the kinds of anomalies. As in
    MVTec's evaluation, each mask file is one defect, even if it has several connected components. The false-positive
    rate of a kind is computed over the normal images and the images of this kind. Anomaly maps are resized (bilinear)
    to the size of the image files.

    Masks are located by the paths of the images. anomalib drops ``mask_path`` from a batch that starts with a normal
    image, and ``gt_mask`` is the union of the defects, at the size after pre-processing.

    Two kinds take 80 MiB for any number of images, because scores are rounded to 12 significant bits. Scores within
    1 part in 2048 of each other may therefore count as equal. Do not add a large constant to all scores.

    Args:
        fields: Fields of the batch to read, ``("anomaly_map", "image_path")`` by default.
        prefix: Prefix of the metric's name.
        strict: Whether a batch without these fields raises an error.
        fpr_limit: Largest false-positive rate, above 0 and at most 1.
        kinds: Folders of anomalous images in the category, as in :mod:`anomalib_ot.data.loco`.
        **kwargs: Arguments of torchmetrics' ``Metric``.

    Raises:
        ValueError: If the limit is out of range, or kinds are missing or repeated.

    Example:
        >>> from anomalib.metrics import Evaluator
        >>> evaluator = Evaluator(test_metrics=[AUSPRO(), AUSPRO(fpr_limit=0.3, prefix="wide_")])
    """

    default_fields = ("anomaly_map", "image_path")


class PROCurve(_OverlapHistograms):
    """Per-region overlap over the false-positive rate.

    The regions are the connected components of the masks, as in anomalib's ``AUPRO``. ``AUPRO`` stores all maps and
    ignores a defect that covers its whole image. This class takes 48 MiB for any number of images, because it rounds
    scores to 12 significant bits.

    Args:
        fpr_limit: Largest false-positive rate, above 0 and at most 1.
        points: Number of rates from 0 to the limit, at least 2.
        **kwargs: Arguments of torchmetrics' ``Metric``.

    Raises:
        ValueError: If the limit or the number of points is out of range.

    Example:
        >>> masks = torch.zeros(2, 8, 8)
        >>> masks[0, :4, :4] = 1
        >>> curve = PROCurve(points=3)
        >>> curve.update(masks + torch.linspace(0, 0.5, 8), masks)
        >>> fpr, pro = curve.compute()
        >>> fpr.tolist(), pro.tolist()
        ([0.0, 0.15000000596046448, 0.30000001192092896], [1.0, 1.0, 1.0])
        >>> curve.area()
        tensor(1.)
    """

    def __init__(self, fpr_limit: float = 0.3, points: int = 301, **kwargs: Any) -> None:
        super().__init__(1, fpr_limit, **kwargs)
        require(points >= 2, "points", "at least 2", points)  # noqa: PLR2004 - both ends
        self.points = points

    def update(self, anomaly_map: Tensor, gt_mask: Tensor) -> None:
        """Add a batch.

        Args:
            anomaly_map: Floating-point tensor (B, H, W); higher scores are more anomalous.
            gt_mask: (B, H, W), nonzero on defects.

        Raises:
            ValueError: If the shapes differ or a score is not finite.
        """
        if anomaly_map.shape != gt_mask.shape:
            msg = f"maps {tuple(anomaly_map.shape)} and masks {tuple(gt_mask.shape)} must have the same shape"
            raise ValueError(msg)
        for scores, mask in zip(anomaly_map, gt_mask, strict=True):
            # anomalib's connected components omit a component that covers the whole image.
            labels = torch.from_numpy(label((mask != 0).cpu().numpy(), connectivity=2))
            regions = [pixels.to(scores.device) for pixels in _regions(labels)]
            self._count(scores, regions, [len(pixels) for pixels in regions], 0)

    def compute(self) -> tuple[Tensor, Tensor]:
        """False-positive rates and the mean overlap at each rate, (points,) in float32; NaN without a defect."""
        curve = self._curve(0)
        rates = torch.linspace(0, self.fpr_limit, self.points, dtype=torch.float64, device=self.overlap.device)
        overlap = torch.full_like(rates, torch.nan) if curve is None else _at(*curve, rates)
        return rates.float(), overlap.float()

    def area(self) -> Tensor:
        """Area under the exact curve up to the limit, divided by the limit; NaN without a defect."""
        with self._all_processes():
            return self._area(0)


def _bins(scores: Tensor) -> Tensor:
    """Bin of each score, int64, in the order of the scores.

    The bits of non-negative floats, read as integers, have the order of the floats; those of negative floats have the
    reverse order.
    """
    if not scores.isfinite().all():
        msg = "the scores must be finite: an anomaly map contains NaN or infinity"
        raise ValueError(msg)
    # Adding 0 turns -0 into 0.
    bits = (scores.float() + 0.0).view(torch.int32)
    ordered = torch.where(bits < 0, bits ^ _MAGNITUDE, bits)
    return (ordered >> _DROPPED_BITS).long() + (1 << (_BITS - 1))


def _shares(area: float, count: int) -> Tensor:
    """Contribution of each of the first ``count`` pixels of a defect to its overlap, in units of 1 / ``_UNIT``."""
    overlap = torch.arange(count + 1, dtype=torch.float64).clamp(max=area) / area
    return (_UNIT * overlap).round().long().diff()


def _regions(labels: Tensor) -> Sequence[Tensor]:
    """Indices of each region's pixels into the flattened labels; label 0 is the background."""
    pixels = labels.flatten().nonzero()[:, 0]
    names, order = labels.flatten()[pixels].sort(stable=True)
    regions: Sequence[Tensor] = pixels[order].split(names.unique_consecutive(return_counts=True)[1].tolist())
    return regions


def _resize(scores: Tensor, size: torch.Size) -> Tensor:
    """Resize a map (H, W) to a size in pixels."""
    if scores.shape == size:
        return scores
    return interpolate(scores[None, None].float(), tuple(size), mode="bilinear", align_corners=False)[0, 0]


def _at(rate: Tensor, overlap: Tensor, points: Tensor) -> Tensor:
    """Overlap at given rates from 0 to 1, by linear interpolation; the upper value where it jumps."""
    right = torch.searchsorted(rate, points, right=True).clamp(max=len(rate) - 1)
    left = right - 1
    # At the end of the curve, the interval may be empty.
    weight = ((points - rate[left]) / (rate[right] - rate[left])).nan_to_num(1.0)
    return overlap[left].lerp(overlap[right], weight)


def _mean_overlap(rate: Tensor, overlap: Tensor, limit: float) -> Tensor:
    """Mean overlap over the rates from 0 to ``limit``, by the trapezoidal rule."""
    end = rate.new_tensor([limit])
    inside = int(torch.searchsorted(rate, end, right=True))
    overlap = torch.cat([overlap[:inside], _at(rate, overlap, end)])
    return torch.trapezoid(overlap, torch.cat([rate[:inside], end])) / limit
