"""What the threshold of a calibrated model promises."""

from dataclasses import dataclass

from anomalib_ot.settings import require_whole

from .conformal import promised_rate
from .post_processor import ConformalPostProcessor


@dataclass(frozen=True)
class Promise:
    """Rate of false alarms that a threshold promises, and the images that it comes from.

    Args:
        false_alarm_rate: Rate that was asked for, in (0, 1).
        supported_rate: Rate that the calibration images support, at least the one that was asked for.
        calibration_images: Number of calibration images.
        calibration_source: Where their scores are from, a :data:`~anomalib_ot.host.calibration.Source`.

    Raises:
        ValueError: If the number of images is not whole or below 1.
    """

    false_alarm_rate: float
    supported_rate: float
    calibration_images: int
    calibration_source: str

    def __post_init__(self) -> None:
        require_whole(1, "calibration_images", self.calibration_images)

    @staticmethod
    def made_by(processor: ConformalPostProcessor) -> "Promise":
        """The promise of a post-processor with calibration scores."""
        rate, count = processor.false_alarm_rate, processor.image_calibration.numel()
        return Promise(rate, promised_rate(rate, count), count, processor.calibration_source)
