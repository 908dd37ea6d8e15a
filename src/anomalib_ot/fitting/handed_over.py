"""What a fit has found and made."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import cast

from anomalib.models.components import AnomalibModule

from anomalib_ot.decide.conformal import promised_rate
from anomalib_ot.decide.post_processor import ConformalPostProcessor
from anomalib_ot.host.calibration import HELD_OUT, Source
from anomalib_ot.host.class_paths import class_of
from anomalib_ot.host.seeding import Seeded
from anomalib_ot.inspection.contamination import Suspect
from anomalib_ot.inspection.look import Inspection
from anomalib_ot.selection import Candidate, Trial

from .exported import Exported


@dataclass(frozen=True)
class Verdicts:
    """What the verdicts of a model promise.

    Args:
        asked: Rate of false alarms that was asked for.
        supported: Rate that the calibration images support, at least the one that was asked for.
        count: Number of calibration images.
        source: Where their scores are from.
        p_values: Each calibration image with the share of these images, itself included, that score as high, the least
            certain ones first; empty if other images than those of the training calibrate.
    """

    asked: float
    supported: float
    count: int
    source: Source
    p_values: list[tuple[Path, float]]

    @classmethod
    def of(cls, processor: ConformalPostProcessor, trained_on: Sequence[Path]) -> "Verdicts":
        """What a calibrated post-processor promises.

        Args:
            processor: The post-processor.
            trained_on: Images that the model was trained on, in order; those of a model that calibrates itself.
        """
        scores = processor.image_calibration.tolist()
        count = len(scores)
        p_values = []
        if processor.calibration_source != HELD_OUT and count == len(trained_on):
            ranked = sorted(zip(scores, trained_on, strict=True), key=lambda pair: -pair[0])
            p_values = [(path, sum(other >= score for other, _ in ranked) / count) for score, path in ranked]
        supported = promised_rate(processor.false_alarm_rate, count)
        source = cast("Source", processor.calibration_source)
        return cls(processor.false_alarm_rate, supported, count, source, p_values)


@dataclass(frozen=True)
class Look:
    """What a look at the images has found.

    Args:
        inspection: Findings on single images.
        suspects: Images that are unlike the others, the most unusual ones first.
        dropped: Those of them that are left out.
        groups: Groups of images that look like different products; one group if they do not.
    """

    inspection: Inspection
    suspects: list[Suspect]
    dropped: list[Path]
    groups: list[list[Path]]

    @cached_property
    def used(self) -> list[Path]:
        """Images that the model learns from, those included that a model holds out to set its threshold."""
        dropped = {*self.dropped}
        return [path for path in self.inspection.images if path not in dropped]

    @property
    def left_out(self) -> int:
        """Number of images that are left out."""
        return len(self.inspection.left_out) + len(self.dropped)


@dataclass(frozen=True)
class HandedOver:
    """What a fit has found and made.

    Args:
        images: Folder of the images.
        output: Folder of the result.
        look: What a look at the images has found.
        trials: The trials, the chosen one first.
        verdicts: What the verdicts promise.
        exported: The exported files in float32 and INT8.
        seconds: Duration of the fit.
        seed: Seed of all random numbers.
    """

    images: Path
    output: Path
    look: Look
    trials: list[Trial]
    verdicts: Verdicts
    exported: tuple[Exported, Exported]
    seconds: float
    seed: int

    @property
    def is_repeatable(self) -> bool:
        """Whether the same training gives the same model: anomalib's command sets no seed for models of anomalib."""
        return issubclass(class_of(AnomalibModule, {"class_path": self.chosen.class_path}), Seeded)

    @property
    def chosen(self) -> Candidate:
        """The chosen model."""
        return self.trials[0].candidate
