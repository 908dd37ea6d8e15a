"""What a fit has found and made."""

from dataclasses import dataclass
from pathlib import Path

from anomalib.models.components import AnomalibModule

from anomalib_ot.host.class_paths import class_of
from anomalib_ot.host.seeding import Seeded
from anomalib_ot.images.reading import ValueRange
from anomalib_ot.selection import Candidate, Trial

from .calibration import Calibration
from .exported import Exported
from .looking import Look


@dataclass(frozen=True)
class HandedOver:
    """What a fit has found and made.

    Args:
        images: Folder of the images.
        output: Folder of the result.
        look: What a look at the images has found.
        trials: The trials, the chosen one first.
        calibration: What the threshold promises, and the images behind it.
        exported: The exported files in float32 and INT8.
        seconds: Duration of this call.
        seed: Seed of all random numbers.
        value_range: Values that map to black and white in images with more than 8 bits per channel;
            None for the range of the data type.
    """

    images: Path
    output: Path
    look: Look
    trials: list[Trial]
    calibration: Calibration
    exported: tuple[Exported, Exported]
    seconds: float
    seed: int
    value_range: ValueRange | None = None

    @property
    def is_repeatable(self) -> bool:
        """Whether the same training gives the same model: anomalib's command sets no seed for models of anomalib."""
        return issubclass(class_of(AnomalibModule, {"class_path": self.chosen.class_path}), Seeded)

    @property
    def chosen(self) -> Candidate:
        """The chosen model."""
        return self.trials[0].candidate
