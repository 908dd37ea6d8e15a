"""What a post-processor and a model agree on to calibrate verdicts with scores of good images."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from torch import Tensor

Source = Literal["held_out", "folds", "support", "trained"]
"""Where calibration scores are from. A checkpoint records it."""

HELD_OUT: Source = "held_out"
FOLDS: Source = "folds"
SUPPORT: Source = "support"
TRAINED: Source = "trained"

_CLAUSES: dict[str, str] = {
    HELD_OUT: "were held out",
    FOLDS: "were each left out of the training in one of several folds",
    SUPPORT: "are the support images, each compared with the others",
    TRAINED: "the model was trained on",
}


def clause(source: str) -> str:
    """The source of calibration scores in words, as the end of the clause "good images that …"."""
    return _CLAUSES.get(source, "are not known to be held out")


ScoreRow = tuple[float, float | None]
"""Image score and maximum of the map, None without a map."""


def score_rows(scores: Tensor, maps: Tensor | None) -> list[ScoreRow]:
    """Pairs of an image score and the maximum of its map, None without a map.

    Args:
        scores: Image scores (B,) or (B, 1).
        maps: Anomaly maps (B, …, h, w), or None.
    """
    peaks = [None] * len(scores) if maps is None else maps.flatten(1).amax(1).tolist()
    return [*zip(scores.flatten().tolist(), peaks, strict=True)]


@dataclass(frozen=True)
class CalibrationScores:
    """Raw scores of good images, which the scoring model was not trained on unless the source is ``TRAINED``.

    Args:
        images: Image scores (n,).
        maps: Maximum of each map (n,); empty if the model has no maps.
        source: Where they are from.
    """

    images: tuple[float, ...]
    maps: tuple[float, ...]
    source: Source

    @classmethod
    def of(cls, rows: Iterable[ScoreRow], source: Source) -> "CalibrationScores":
        """The scores from rows of :func:`score_rows`."""
        scores = list(rows)
        peaks = tuple(peak for _, peak in scores if peak is not None)
        return cls(tuple(score for score, _ in scores), peaks, source)

    @property
    def clause(self) -> str:
        """Where they are from, as the end of the clause "good images that …"."""
        return clause(self.source)


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
