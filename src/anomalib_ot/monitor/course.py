"""What a monitor has seen of a stream of images."""

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from anomalib_ot.decide.drift import DriftMonitor, DriftState, require_finite_value

# The quantity that the model gives; the others are of the image itself.
SCORE = "score"
# Of an image's map, and of the images whose maps are kept: 40 MB in total.
_CELLS = 32
_KEPT = 10_000


@dataclass(frozen=True)
class Seen:
    """An image of the stream.

    Args:
        path: Its file.
        values: Its raw score, and what else is watched, by quantity.
        states: State of the monitor of each quantity after it.
    """

    path: Path
    values: Mapping[str, float]
    states: Mapping[str, DriftState]


class Course:
    """The images of a stream with the states of the monitors, and coarse anomaly maps of the last 10,000 images.

    Args:
        monitors: The monitor of each quantity.
        reference: Anomaly maps (h, w) of the images that the stream is compared with; empty if they are unknown.

    Attributes:
        seen: The images that were scored, in order.
        skipped: Images that could not be scored, with the reasons.
        alarms: The image that raised the alarm of each quantity, in the order of the alarms.
    """

    def __init__(self, monitors: Mapping[str, DriftMonitor], reference: Iterable[Tensor] = ()) -> None:
        self.monitors = monitors
        self.seen: list[Seen] = []
        self.skipped: dict[Path, str] = {}
        self.alarms: dict[str, Seen] = {}
        self._reference = [_coarse(each) for each in reference]
        self._maps: deque[Tensor] = deque(maxlen=_KEPT)

    def add(self, path: Path, values: Mapping[str, float], anomaly_map: Tensor) -> Seen:
        """Add the next image of the stream.

        Args:
            path: Its file.
            values: The value of each quantity that is watched.
            anomaly_map: Its raw anomaly map (h, w).

        Returns:
            The image with the states of the monitors.

        Raises:
            ValueError: If a value is NaN or infinite. No monitor changes.
        """
        # All before the first monitor changes.
        for quantity in self.monitors:
            require_finite_value(f"a {quantity}", values[quantity])
        seen = Seen(path, values, {name: monitor.update(values[name]) for name, monitor in self.monitors.items()})
        self.seen.append(seen)
        self._maps.append(_coarse(anomaly_map))
        for quantity, state in seen.states.items():
            if state.is_alarm:
                self.alarms.setdefault(quantity, seen)
        return seen

    @property
    def false_alarm_rate(self) -> float:
        """Promised probability of a false alarm of any monitor."""
        return sum(monitor.false_alarm_rate for monitor in self.monitors.values())

    @property
    def drifted(self) -> str | None:
        """The quantity that raised the first alarm; None without an alarm."""
        return next(iter(self.alarms), None)

    def is_higher(self, quantity: str) -> bool:
        """Whether a quantity that has drifted is higher since then, not lower."""
        return bool(self._state(quantity).is_higher)

    def since(self, quantity: str | None = None) -> list[Seen]:
        """The images since the drift of a quantity probably began, by default of the first; empty without an alarm."""
        quantity = quantity or self.drifted
        return self.seen[self._state(quantity).began :] if quantity in self.alarms else []

    def medians(self, quantity: str) -> tuple[float, float]:
        """Medians of a quantity that has drifted: before the drift began, with the reference, and since then."""
        values, began = [each.values[quantity] for each in self.seen], len(self.seen) - len(self.since(quantity))
        return median([*self.monitors[quantity].calibration, *values[:began]]), median(values[began:])

    def changed(self, count: int) -> list[Seen]:
        """The images since the drift began that changed most: those with the highest, or the lowest values.

        Args:
            count: Largest number of images.
        """
        quantity = self.drifted
        if quantity is None:
            return []
        sign = -1 if self.is_higher(quantity) else 1
        return sorted(self.since(), key=lambda each: sign * each.values[quantity])[:count]

    def _state(self, quantity: str) -> DriftState:
        return self.alarms[quantity].states[quantity]

    def mean_maps(self) -> tuple[Tensor, Tensor] | None:
        """Mean coarse maps (H, W) of the images before the drift began, with those of the reference, and since then.

        Returns:
            The two maps; None without an alarm, or without images before the drift.
        """
        # Without an alarm, all images are before the drift.
        began = len(self._maps) - min(len(self.since()), len(self._maps))
        maps = [*self._maps]
        before, since = [*self._reference, *maps[:began]], maps[began:]
        if not (before and since):
            return None
        return torch.stack(before).mean(0), torch.stack(since).mean(0)


def named(quantity: str) -> str:
    """The values of a quantity in a sentence."""
    return "scores" if quantity == SCORE else quantity


def _coarse(anomaly_map: Tensor) -> Tensor:
    """The means of square blocks of a map (h, w), at most 32 in a row or column."""
    block = ceil(max(anomaly_map.shape) / _CELLS)
    return avg_pool2d(anomaly_map[None].float().cpu(), block, ceil_mode=True)[0]
