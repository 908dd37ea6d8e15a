"""Saturated per-region overlap, in memory that does not grow with the number of images.

The saturated per-region overlap (Bergmann et al., 2022, https://doi.org/10.1007/s11263-022-01578-9) of a prediction P
with a defect A that saturates at an area s is sPRO = ``min(|A ∩ P| / s, 1)``. With s the area of A it is the per-region
overlap, PRO (Bergmann et al., 2021, https://doi.org/10.1007/s11263-020-01400-4). P holds the pixels that score at least
a threshold. As the threshold falls, the mean over all defects rises, and so does the false-positive rate, the share of
defect-free pixels in P.

Every pixel thus adds to one of the two at its own score: a defect-free pixel to the rate; of a defect, each of the s
pixels that score highest 1 / s to the overlap, and the others nothing. Histograms of both over the scores are all that
the curve needs.
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

# A bin is what the sign, the exponent and the first mantissa bits of a float32 have in common.
_BITS = 20
_DROPPED_BITS = 32 - _BITS
_MAGNITUDE = 2**31 - 1
# The full overlap with one defect. Whole numbers add up to the same in any order, on any device, in any process.
_UNIT = 2**36


class _OverlapHistograms(Metric):
    """Histograms of defect-free pixels and of overlaps over the scores, for one or several kinds of anomalies.

    Scores are rounded towards zero to 12 significant bits, at most 1 part in 2048: the bins are those of the first 20
    bits of a float32. A kind takes 16 MiB and the normal images 8 MiB, and the same again for the zeros to reset to.

    Args:
        kinds: Number of kinds.
        fpr_limit: Largest false-positive rate of interest, above 0 and at most 1.
        **kwargs: Of torchmetrics' ``Metric``.

    Raises:
        ValueError: If the limit is out of range.
    """

    is_differentiable = False
    full_state_update = False
    defect_free: Tensor
    overlap: Tensor

    def __init__(self, kinds: int, fpr_limit: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 0 < fpr_limit <= 1:
            msg = f"fpr_limit must be above 0 and at most 1, not {fpr_limit}"
            raise ValueError(msg)
        self.fpr_limit = fpr_limit
        # Pixels (kinds + 1, bins) of the images of each kind and, in the last row, of the normal ones.
        self.add_state("defect_free", torch.zeros(kinds + 1, 2**_BITS, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("overlap", torch.zeros(kinds, 2**_BITS, dtype=torch.int64), dist_reduce_fx="sum")

    # Else states that the test loop reset, in inference mode, could not be updated outside it.
    @torch.inference_mode()
    def _count(self, scores: Tensor, defects: Sequence[Tensor], saturation: Sequence[float], kind: int) -> None:
        """Count in an image.

        Args:
            scores: Floating-point tensor (H, W), or of any other shape.
            defects: Indices of each defect's pixels into the flattened scores; none in a normal image.
            saturation: Area in pixels at which each defect saturates, at most its own.
            kind: The kind of the image, or -1 if it is normal.

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
        """Scalar in float32: the area under the curve of a kind up to the limit, divided by it; NaN without a curve."""
        curve = self._curve(kind)
        area = torch.nan if curve is None else _mean_overlap(*curve, self.fpr_limit)
        return torch.as_tensor(area, dtype=torch.float32, device=self.overlap.device)

    def _all_processes(self) -> AbstractContextManager[None]:
        """Sums of the states over all processes, as within ``compute``."""
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
        """Count in a batch.

        Args:
            anomaly_map: Floating-point tensor (B, H, W), higher where more anomalous.
            image_path: The B files of the images.

        Raises:
            FileNotFoundError: If a mask or the category's ``defects_config.json`` is missing.
            ValueError: If a score is not finite, an image is in the folder of no kind, or a mask is invalid.
        """
        for scores, path in zip(anomaly_map, image_path, strict=True):
            kind = -1 if Path(path).parent.name == "good" else self._index(Path(path).parent.name)
            defects = image_defects(path)
            pixels = [mask.flatten().nonzero()[:, 0].to(scores.device) for mask in defects.masks]
            self._count(_resize(scores, defects.masks.shape[-2:]), pixels, defects.saturation.tolist(), kind)

    def compute(self) -> Tensor:
        """Mean over the kinds that have defects, a scalar; NaN with a warning if none has."""
        mean = torch.stack([self._area(kind) for kind in range(len(self.kinds))]).nanmean()
        if mean.isnan():
            warnings.warn("there is no defect, or no pixel without one: AU-sPRO is not defined", stacklevel=2)
        return mean

    def per_kind(self) -> dict[str, Tensor]:
        """Scalar by kind; NaN for a kind without defects."""
        with self._all_processes():
            return {name: self._area(kind) for kind, name in enumerate(self.kinds)}

    def curve(self, kind: str) -> tuple[Tensor, Tensor]:
        """Curve of a kind.

        Args:
            kind: One of ``kinds``.

        Returns:
            False-positive rates and the mean sPRO at each, (points,) in float64, both from 0 to 1 and not falling.

        Raises:
            ValueError: If there is no such kind, or it has no defect.
        """
        index = self._index(kind)
        with self._all_processes():
            curve = self._curve(index)
        if curve is None:
            msg = f"there is no curve of {kind}: update with its defects, and images with defect-free pixels"
            raise ValueError(msg)
        return curve

    def _index(self, kind: str) -> int:
        if kind not in self.kinds:
            msg = f"{kind!r} is neither 'good' nor among the kinds {list(self.kinds)}"
            raise ValueError(msg)
        return self.kinds.index(kind)


class AUSPRO(AnomalibMetric, _AUSPRO):  # type: ignore[misc]
    """Area under the saturated per-region overlap over the false-positive rate, the measure of MVTec LOCO AD.

    The area up to ``fpr_limit``, divided by it, for each kind of anomalies and their mean. As in MVTec's evaluation,
    each mask file is one defect, however many parts it has; the false-positive rate of a kind is that over the normal
    images and those of the kind; and anomaly maps are resized (bilinear) to the size of the image files.

    Masks are found by the images' paths, as anomalib drops ``mask_path`` from a batch that starts with a normal image,
    and ``gt_mask`` holds the union of the defects, in the size that the pre-processor makes.

    Whatever the number of images, two kinds take 80 MiB. Scores are rounded to 12 significant bits for it. So those
    within 1 part in 2048 of one another may count as equal, and no large constant should be added to all of them.

    Args:
        fields: Fields of the batch to read, ``("anomaly_map", "image_path")`` by default.
        prefix: Put before the metric's name.
        strict: Whether a batch without these fields is an error.
        fpr_limit: Largest false-positive rate, above 0 and at most 1.
        kinds: Folders of anomalous images in the category, as in :mod:`anomalib_ot.data.loco`.
        **kwargs: Of torchmetrics' ``Metric``.

    Raises:
        ValueError: If the limit is out of range, or kinds are missing or repeated.

    Example:
        >>> from anomalib.metrics import Evaluator
        >>> evaluator = Evaluator(test_metrics=[AUSPRO(), AUSPRO(fpr_limit=0.3, prefix="wide_")])
    """

    default_fields = ("anomaly_map", "image_path")


class PROCurve(_OverlapHistograms):
    """Per-region overlap over the false-positive rate.

    The regions are the connected components of the masks, as for anomalib's ``AUPRO``, which keeps all maps and leaves
    out a defect that covers its whole image. Here the scores are rounded to 12 significant bits and 48 MiB hold any
    number of images.

    Args:
        fpr_limit: Largest false-positive rate, above 0 and at most 1.
        points: Number of rates from 0 to the limit, at least 2.
        **kwargs: Of torchmetrics' ``Metric``.

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
        if points < 2:  # noqa: PLR2004 - both ends
            msg = f"points must be at least 2, not {points}"
            raise ValueError(msg)
        self.points = points

    def update(self, anomaly_map: Tensor, gt_mask: Tensor) -> None:
        """Count in a batch.

        Args:
            anomaly_map: Floating-point tensor (B, H, W), higher where more anomalous.
            gt_mask: (B, H, W), not zero on defects.

        Raises:
            ValueError: If the shapes differ or a score is not finite.
        """
        if anomaly_map.shape != gt_mask.shape:
            msg = f"maps {tuple(anomaly_map.shape)} and masks {tuple(gt_mask.shape)} must be of one shape"
            raise ValueError(msg)
        for scores, mask in zip(anomaly_map, gt_mask, strict=True):
            # Not anomalib's components, which lack one that covers the whole image.
            labels = torch.from_numpy(label((mask != 0).cpu().numpy(), connectivity=2))
            regions = [pixels.to(scores.device) for pixels in _regions(labels)]
            self._count(scores, regions, [len(pixels) for pixels in regions], 0)

    def compute(self) -> tuple[Tensor, Tensor]:
        """False-positive rates and the mean overlap at each, (points,) in float32; NaN if there is no defect."""
        curve = self._curve(0)
        rates = torch.linspace(0, self.fpr_limit, self.points, dtype=torch.float64, device=self.overlap.device)
        overlap = torch.full_like(rates, torch.nan) if curve is None else _at(*curve, rates)
        return rates.float(), overlap.float()

    def area(self) -> Tensor:
        """Area under the whole curve, not only its points, up to the limit and divided by it; NaN without a defect."""
        with self._all_processes():
            return self._area(0)


def _bins(scores: Tensor) -> Tensor:
    """Bin int64 of each score, higher for a higher score.

    Bits of non-negative floats, read as integers, are in the floats' order, those of negative ones in the reverse.
    """
    if not scores.isfinite().all():
        msg = "the scores must be finite: an anomaly map holds NaN or infinity"
        raise ValueError(msg)
    # Adding 0 makes -0 a 0.
    bits = (scores.float() + 0.0).view(torch.int32)
    ordered = torch.where(bits < 0, bits ^ _MAGNITUDE, bits)
    return (ordered >> _DROPPED_BITS).long() + (1 << (_BITS - 1))


def _shares(area: float, count: int) -> Tensor:
    """What each of the first ``count`` pixels of a defect adds to its overlap, as a whole number of units."""
    overlap = torch.arange(count + 1, dtype=torch.float64).clamp(max=area) / area
    return (_UNIT * overlap).round().long().diff()


def _regions(labels: Tensor) -> Sequence[Tensor]:
    """Indices of the pixels of each region into the flattened labels, in which 0 is none."""
    pixels = labels.flatten().nonzero()[:, 0]
    names, order = labels.flatten()[pixels].sort(stable=True)
    regions: Sequence[Tensor] = pixels[order].split(names.unique_consecutive(return_counts=True)[1].tolist())
    return regions


def _resize(scores: Tensor, size: torch.Size) -> Tensor:
    """Map (H, W) at a size in pixels."""
    if scores.shape == size:
        return scores
    return interpolate(scores[None, None].float(), tuple(size), mode="bilinear", align_corners=False)[0, 0]


def _at(rate: Tensor, overlap: Tensor, points: Tensor) -> Tensor:
    """Overlap at some rates from 0 to 1, by linear interpolation; where it jumps, its upper value."""
    right = torch.searchsorted(rate, points, right=True).clamp(max=len(rate) - 1)
    left = right - 1
    # At the end of the curve nothing may be left to interpolate over.
    weight = ((points - rate[left]) / (rate[right] - rate[left])).nan_to_num(1.0)
    return overlap[left].lerp(overlap[right], weight)


def _mean_overlap(rate: Tensor, overlap: Tensor, limit: float) -> Tensor:
    """Mean overlap over the rates from 0 to a limit, by the trapezoidal rule."""
    end = rate.new_tensor([limit])
    inside = int(torch.searchsorted(rate, end, right=True))
    overlap = torch.cat([overlap[:inside], _at(rate, overlap, end)])
    return torch.trapezoid(overlap, torch.cat([rate[:inside], end])) / limit
