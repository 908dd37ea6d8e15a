"""Conversion between raw scores and the scores that anomalib shows."""

from dataclasses import dataclass
from math import isfinite
from typing import Any, Literal

from anomalib.models.components import AnomalibModule


@dataclass(frozen=True)
class Scale:
    """The scale of ``predict``: (raw − zero) / unit, which it clips to [0, 1]. The default does not change raw scores.

    Args:
        zero: Raw score that is shown as 0.
        unit: Difference of raw scores that is shown as 1. With 0, only the side of the threshold ``zero`` is shown.
        threshold: Threshold on the shown scale; None if the model has no threshold.
    """

    zero: float = 0.0
    unit: float = 1.0
    threshold: float | None = None

    @property
    def raw_threshold(self) -> float | None:
        """The threshold on the raw scale."""
        return None if self.threshold is None else self.zero + self.threshold * self.unit

    def shown(self, raw: Any) -> Any:
        """Convert raw scores, a number or a tensor, to shown scores without clipping."""
        if self.unit:
            return (raw - self.zero) / self.unit
        return 0.5 + 0.5 * ((raw > self.zero) * 1.0 - (raw < self.zero) * 1.0)


def scale_of(model: AnomalibModule, level: Literal["image", "pixel"]) -> Scale:
    """The scale on which a model's post-processor shows scores.

    Args:
        model: A model. Without a post-processor, it shows raw scores.
        level: Scores of images or of pixels.

    Returns:
        The scale. It has no threshold if the model was not validated.
    """
    processor: Any = model.post_processor
    is_thresholding = getattr(processor, "enable_thresholding", False)
    threshold = float(getattr(processor, f"normalized_{level}_threshold")) if is_thresholding else None
    if not getattr(processor, "enable_normalization", False):
        # anomalib would compare raw scores with the normalised threshold.
        raw = float(getattr(processor, f"{level}_threshold")) if is_thresholding else float("nan")
        return Scale(threshold=raw if isfinite(raw) else None)
    low, high, middle = (float(getattr(processor, f"{level}_{name}")) for name in ("min", "max", "threshold"))
    unit = high - low
    if not isfinite(unit):
        return Scale()
    if not isfinite(middle):
        return Scale(low, unit)
    # anomalib normalises the threshold to 0.5. Sensitivity moves the shown threshold away from it.
    return Scale(middle - 0.5 * unit, unit, threshold)
