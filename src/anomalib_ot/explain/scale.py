"""From the scores that a model computes to those that anomalib shows, and back."""

from dataclasses import dataclass
from math import isfinite
from typing import Any, Literal

from anomalib.models.components import AnomalibModule


@dataclass(frozen=True)
class Scale:
    """How ``predict`` shows a raw score: (raw − zero) / unit, which it cuts off at 0 and 1; raw as it is by default.

    Args:
        zero: Raw score that is shown as 0.
        unit: Difference of raw scores that is shown as 1; 0 where only the side of the threshold, ``zero``, is shown.
        threshold: Score above which something is anomalous, as it is shown; None if the model has none.
    """

    zero: float = 0.0
    unit: float = 1.0
    threshold: float | None = None

    @property
    def raw_threshold(self) -> float | None:
        """The same before it is normalised."""
        return None if self.threshold is None else self.zero + self.threshold * self.unit

    def shown(self, raw: Any) -> Any:
        """Raw scores, a number or a tensor, as they are shown, without the cut at 0 and 1."""
        if self.unit:
            return (raw - self.zero) / self.unit
        return 0.5 + 0.5 * ((raw > self.zero) * 1.0 - (raw < self.zero) * 1.0)


def scale_of(model: AnomalibModule, level: Literal["image", "pixel"]) -> Scale:
    """The scale on which a model's post-processor shows scores.

    Args:
        model: A model; one without a post-processor shows raw scores.
        level: Whether scores of pictures or of pixels.

    Returns:
        The scale; it has no threshold where the model was not validated.
    """
    processor: Any = model.post_processor
    is_thresholding = getattr(processor, "enable_thresholding", False)
    threshold = float(getattr(processor, f"normalized_{level}_threshold")) if is_thresholding else None
    if not getattr(processor, "enable_normalization", False):
        # The host would compare raw scores with the threshold of normalised ones.
        raw = float(getattr(processor, f"{level}_threshold")) if is_thresholding else float("nan")
        return Scale(threshold=raw if isfinite(raw) else None)
    low, high, middle = (float(getattr(processor, f"{level}_{name}")) for name in ("min", "max", "threshold"))
    unit = high - low
    if not isfinite(unit):
        return Scale()
    if not isfinite(middle):
        return Scale(low, unit)
    # What anomalib normalises to 0.5 is the threshold, and sensitivity moves away from it.
    return Scale(middle - 0.5 * unit, unit, threshold)
