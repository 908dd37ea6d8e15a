"""Maps and scores of a model, and the normalisation of its post-processor, which a comparison undoes."""

from dataclasses import dataclass
from math import isnan
from typing import Any, Literal

import torch
from anomalib.data import InferenceBatch
from torch import Tensor, nn

from anomalib_ot.decide.conformal import ConformalScale
from anomalib_ot.decide.post_processor import ConformalPostProcessor


@dataclass(frozen=True)
class Scores:
    """Anomaly maps (B, h, w) and image scores (B,) on the CPU, float64: undoing a normalisation loses digits."""

    maps: Tensor
    scores: Tensor

    @classmethod
    def of(cls, batch: InferenceBatch) -> "Scores":
        """Take them from a batch with maps (B, 1, h, w)."""
        maps, scores = (torch.as_tensor(each).cpu().double() for each in (batch.anomaly_map, batch.pred_score))
        return cls(maps.reshape(-1, *maps.shape[-2:]), scores.flatten())

    def first(self, count: int) -> "Scores":
        """Return those of the first images."""
        return Scores(self.maps[:count], self.scores[:count])


class Normalization:
    """A post-processor's normalisation before it clips or compresses, which rounds high scores, and its inverse.

    Args:
        post_processor: anomalib's post-processor, one with a scale of its own, or None.
    """

    def __init__(self, post_processor: nn.Module | None) -> None:
        self._post_processor: Any = post_processor if getattr(post_processor, "enable_normalization", False) else None

    def apply(self, scores: Scores) -> Scores:
        """Normalise maps and scores."""
        pixel, image = self._line("pixel"), self._line("image")
        return Scores(
            pixel.apply(scores.maps) if pixel else scores.maps, image.apply(scores.scores) if image else scores.scores
        )

    def undo(self, scores: Scores) -> Scores:
        """Undo the normalisation."""
        pixel, image = self._line("pixel"), self._line("image")
        return Scores(
            pixel.undo(scores.maps) if pixel else scores.maps, image.undo(scores.scores) if image else scores.scores
        )

    @property
    def clipped(self) -> list[str]:
        """Names of the outputs that the post-processor normalises, and clips or compresses."""
        fields: dict[str, Literal["image", "pixel"]] = {"anomaly_map": "pixel", "pred_score": "image"}
        return [output for output, field in fields.items() if self._line(field)]

    @property
    def operation(self) -> str:
        """Operation of OpenVINO whose input is the normalised output before it is clipped or compressed."""
        return "Abs" if isinstance(self._post_processor, ConformalPostProcessor) else "Clamp"

    @property
    def width(self) -> float:
        """Range of the maps in the model's validation, 0 if unknown."""
        if self._post_processor is None:
            return 0.0
        low, high = (float(getattr(self._post_processor, f"pixel_{name}")) for name in ("min", "max"))
        return 0.0 if isnan(high - low) else high - low

    def _line(self, field: Literal["image", "pixel"]) -> "_Line | None":
        """Normalisation of maps or scores, None without normalisation."""
        if self._post_processor is None:
            return None
        if isinstance(self._post_processor, ConformalPostProcessor):
            own = self._post_processor.scale(field)
            return _Line(own.unit, own.raw_threshold / own.unit) if isinstance(own, ConformalScale) else None
        low, high, threshold = (
            float(getattr(self._post_processor, f"{field}_{name}")) for name in ("min", "max", "threshold")
        )
        # As in anomalib: without a range nothing is normalised, the default threshold is the middle of the range, and a
        # range of zero, as of a single validation image, counts as 1.
        if isnan(low) or isnan(high):
            return None
        threshold = (low + high) / 2 if isnan(threshold) else threshold
        scale = (high - low) or 1.0
        return _Line(scale, threshold / scale - 0.5)


@dataclass(frozen=True)
class _Line:
    """Normalisation of one output: division by a scale, then subtraction of a shift."""

    scale: float
    shift: float

    def apply(self, values: Tensor) -> Tensor:
        return values / self.scale - self.shift

    def undo(self, values: Tensor) -> Tensor:
        return (values + self.shift) * self.scale
