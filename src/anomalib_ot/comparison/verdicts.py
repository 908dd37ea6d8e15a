"""What the verdicts of a calibrated model promise, and what they do on the test images."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from anomalib.data import InferenceBatch
from numpy.typing import NDArray
from torch import Tensor

from anomalib_ot.decide.post_processor import ConformalPostProcessor
from anomalib_ot.decide.promise import Promise
from anomalib_ot.host.calibration import HELD_OUT, TRAINED
from anomalib_ot.settings import require_whole


@dataclass(frozen=True)
class Verdicts(Promise):
    """Promised and realised false alarms of a run, and detected anomalies.

    Args:
        false_alarm_rate: As for :class:`~anomalib_ot.decide.promise.Promise`, like the next three.
        supported_rate: Rate that the calibration images support.
        calibration_images: Number of calibration images.
        calibration_source: Where their scores are from.
        false_alarms: Number of good test images that are called anomalous.
        good_images: Number of good test images.
        detected: Number of anomalous test images that are called anomalous.
        anomalous_images: Number of anomalous test images.
        calibrated_on_test: Whether test images calibrate, so that false alarms among them say nothing about new ones.

    Raises:
        ValueError: If a number of images is not whole or below 1, or more are called anomalous than there are.
    """

    false_alarms: int
    good_images: int
    detected: int
    anomalous_images: int
    calibrated_on_test: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        require_whole(1, "good_images", self.good_images)
        require_whole(1, "anomalous_images", self.anomalous_images)
        require_whole(0, "false_alarms", self.false_alarms, self.good_images)
        require_whole(0, "detected", self.detected, self.anomalous_images)

    @classmethod
    def of(
        cls,
        processor: Any,
        raw_scores: Tensor,
        labels: NDArray[Any],
        images: Collection[str],
        validated: Collection[str],
    ) -> "Verdicts | None":
        """The verdicts of a post-processor on test images.

        Args:
            processor: The post-processor.
            raw_scores: Raw image scores (N,).
            labels: Integers (N,), 0 normal, 1 anomalous.
            images: Path of each test image.
            validated: Path of each good validation image.

        Returns:
            The verdicts; None if the post-processor promises no rate, or has no threshold.
        """
        if not isinstance(processor, ConformalPostProcessor) or not processor.is_calibrated("image"):
            return None
        is_rejected = processor(InferenceBatch(pred_score=raw_scores.to(processor.image_calibration.device))).pred_label
        if is_rejected is None:
            return None
        rejected, promise = is_rejected.cpu().numpy(), Promise.made_by(processor)
        # With any other source, the scores of the validation images were not used.
        by_validation = promise.calibration_source in {HELD_OUT, TRAINED}
        return cls(
            **vars(promise),
            false_alarms=int(rejected[labels == 0].sum()),
            good_images=int((labels == 0).sum()),
            detected=int(rejected[labels == 1].sum()),
            anomalous_images=int((labels == 1).sum()),
            calibrated_on_test=by_validation and not {*images}.isdisjoint(validated),
        )
