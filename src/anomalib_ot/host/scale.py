"""The scale on which a post-processor shows the raw scores of a model, and its threshold."""

from dataclasses import dataclass
from math import isfinite
from typing import Any, Literal, Protocol, runtime_checkable

from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor


class Scale(Protocol):
    """How ``predict`` shows raw scores.

    Attributes:
        threshold: Shown score above which something is anomalous; None if the model has none.
        raw_threshold: The threshold before normalisation; None if the model has none.
        is_raw: Whether raw scores are shown as they are.
    """

    @property
    def threshold(self) -> float | None: ...  # noqa: D102 - documented above

    @property
    def raw_threshold(self) -> float | None: ...  # noqa: D102

    @property
    def is_raw(self) -> bool: ...  # noqa: D102

    def shown(self, raw: Any) -> Any:
        """Raw scores, a number or a tensor, as they are shown, without clipping."""


@runtime_checkable
class HasScale(Protocol):
    """A post-processor that knows its scale."""

    def scale(self, level: Literal["image", "pixel"]) -> Scale:
        """How scores of a level are shown."""


@dataclass(frozen=True)
class LinearScale:
    """How anomalib's post-processor shows a raw score: (raw − zero) / unit, clipped to [0, 1]; by default as it is.

    Args:
        zero: Raw score that is shown as 0.
        unit: Difference of raw scores that is shown as 1; 0 if the post-processor shows only the side of the threshold,
            ``zero``.
        threshold: Shown score above which something is anomalous; None if the model has none.
    """

    zero: float = 0.0
    unit: float = 1.0
    threshold: float | None = None

    @property
    def is_raw(self) -> bool:
        """Whether raw scores are shown as they are."""
        return (self.zero, self.unit) == (0, 1)

    @property
    def raw_threshold(self) -> float | None:
        """The threshold before normalisation."""
        return None if self.threshold is None else self.zero + self.threshold * self.unit

    def shown(self, raw: Any) -> Any:
        """Raw scores, a number or a tensor, as they are shown, without the clipping to [0, 1]."""
        if self.unit:
            return (raw - self.zero) / self.unit
        return 0.5 + 0.5 * ((raw > self.zero) * 1.0 - (raw < self.zero) * 1.0)


def scale_of(model: AnomalibModule, level: Literal["image", "pixel"]) -> Scale:
    """The scale on which a model's post-processor shows scores.

    Args:
        model: A model. Without a post-processor of anomalib, it shows raw scores.
        level: Whether the scores are those of images or of pixels.

    Returns:
        The scale. It has no threshold if thresholding is off or the model was not validated.
    """
    processor: Any = model.post_processor
    if isinstance(processor, HasScale):
        return processor.scale(level)
    if not isinstance(processor, PostProcessor):
        return LinearScale()
    low, high, middle = (float(getattr(processor, f"{level}_{name}")) for name in ("min", "max", "threshold"))
    is_thresholding = processor.enable_thresholding and isfinite(middle)
    unit = high - low
    if not (processor.enable_normalization and isfinite(unit)):
        # The host compares raw scores with the threshold of normalised ones.
        return LinearScale(threshold=middle if is_thresholding else None)
    if not isfinite(middle):
        return LinearScale(low, unit)
    # anomalib normalises the threshold to 0.5, and sensitivity moves the threshold away from it.
    threshold = float(getattr(processor, f"normalized_{level}_threshold"))
    return LinearScale(middle - 0.5 * unit, unit, threshold if is_thresholding else None)
