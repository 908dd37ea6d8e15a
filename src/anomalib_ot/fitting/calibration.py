"""What the threshold of a trained model promises, and the images behind it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anomalib_ot.decide.post_processor import ConformalPostProcessor
from anomalib_ot.decide.promise import Promise
from anomalib_ot.host.calibration import HELD_OUT


@dataclass(frozen=True)
class Calibration:
    """What the threshold of a model promises, and the images behind it.

    Args:
        promise: The promise.
        p_values: Each calibration image with the share of these images, itself included, that score as high, the least
            certain ones first; empty if other images than those of the training calibrate.
    """

    promise: Promise
    p_values: list[tuple[Path, float]]

    @classmethod
    def of(cls, processor: ConformalPostProcessor, trained_on: Sequence[Path]) -> "Calibration":
        """The calibration of a post-processor.

        Args:
            processor: The post-processor.
            trained_on: Images that the model was trained on, in order; those of a model that calibrates itself.
        """
        promise, scores = Promise.made_by(processor), processor.image_calibration.tolist()
        p_values = []
        if promise.calibration_source != HELD_OUT and len(scores) == len(trained_on):
            ranked = sorted(zip(scores, trained_on, strict=True), key=lambda pair: -pair[0])
            p_values = [(path, sum(other >= score for other, _ in ranked) / len(scores)) for score, path in ranked]
        return cls(promise, p_values)

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> "Calibration":
        """The calibration from the values of :attr:`plain`."""
        return cls(Promise(**plain["promise"]), [(Path(path), value) for path, value in plain["p_values"]])

    @property
    def plain(self) -> dict[str, Any]:
        """The calibration as plain values."""
        return {"promise": vars(self.promise), "p_values": [[str(path), value] for path, value in self.p_values]}
