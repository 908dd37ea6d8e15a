"""What a post-processor and a model agree on to calibrate verdicts with scores of good images."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

HELD_OUT = "were held out"
"""Source of scores of images that no model was trained on."""


@dataclass(frozen=True)
class CalibrationScores:
    """Raw scores of good images that the scoring model was not trained on.

    Args:
        images: Image scores (n,).
        maps: Maximum of each map (n,); empty if the model has no maps.
        source: Where they are from, as the end of the clause "good images that …".
    """

    images: tuple[float, ...]
    maps: tuple[float, ...]
    source: str

    @classmethod
    def of(cls, rows: Iterable[tuple[float, float | None]], source: str) -> "CalibrationScores":
        """The scores from pairs of an image score and the maximum of its map, None without a map."""
        scores = list(rows)
        peaks = tuple(peak for _, peak in scores if peak is not None)
        return cls(tuple(score for score, _ in scores), peaks, source)


@runtime_checkable
class CalibratesItself(Protocol):
    """A Lightning model that may provide calibration scores itself, without held-out images.

    Attributes:
        calibration_scores: The scores of the last fit; None if the validation images calibrate.
    """

    calibration_scores: CalibrationScores | None


@runtime_checkable
class HasPValues(Protocol):
    """A post-processor that knows the p-value of a score."""

    def p_values(self, raw_scores: Tensor) -> list[float] | None:
        """P-values of raw image scores (B,); None without calibration scores."""
