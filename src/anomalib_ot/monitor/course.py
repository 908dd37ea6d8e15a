"""What a monitor has seen of a stream of images."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from anomalib_ot.decide.drift import DriftMonitor, DriftState

# Of an image's map, and of the images whose maps are kept: 40 MB in total.
_CELLS = 32
_KEPT = 10_000


@dataclass(frozen=True)
class Seen:
    """An image of the stream.

    Args:
        path: Its file.
        score: Its raw score.
        state: State of the monitor after it.
    """

    path: Path
    score: float
    state: DriftState


class Course:
    """The images of a stream with the states of the monitor, and coarse anomaly maps of the last 10,000 images.

    Args:
        monitor: The monitor.
        reference: Anomaly maps (h, w) of the images that the stream is compared with; empty if they are unknown.

    Attributes:
        seen: The images that were scored, in order.
        skipped: Images that could not be scored, with the reasons.
    """

    def __init__(self, monitor: DriftMonitor, reference: Iterable[Tensor] = ()) -> None:
        self.monitor = monitor
        self.seen: list[Seen] = []
        self.skipped: dict[Path, str] = {}
        self._reference = [_coarse(each) for each in reference]
        self._maps: deque[Tensor] = deque(maxlen=_KEPT)

    def add(self, path: Path, score: float, anomaly_map: Tensor) -> Seen:
        """Add the next image of the stream.

        Args:
            path: Its file.
            score: Its raw score.
            anomaly_map: Its raw anomaly map (h, w).

        Returns:
            The image with the state of the monitor.

        Raises:
            ValueError: If the score is NaN or infinite.
        """
        self.seen.append(Seen(path, score, self.monitor.update(score)))
        self._maps.append(_coarse(anomaly_map))
        return self.seen[-1]

    @property
    def alarm(self) -> Seen | None:
        """The image that raised the alarm; None without one."""
        if not (self.seen and self.seen[-1].state.is_alarm):
            return None
        return next(each for each in self.seen if each.state.is_alarm)

    @property
    def since(self) -> list[Seen]:
        """The images since the drift probably began; empty without an alarm."""
        began = self.seen[-1].state.began if self.seen else None
        return [] if began is None else self.seen[began:]

    def changed(self, count: int) -> list[Seen]:
        """The images since the drift began whose scores changed most: the highest, or the lowest ones.

        Args:
            count: Largest number of images.
        """
        sign = -1 if self.seen and self.seen[-1].state.is_higher else 1
        return sorted(self.since, key=lambda each: sign * each.score)[:count]

    def mean_maps(self) -> tuple[Tensor, Tensor] | None:
        """Mean coarse maps (H, W) of the images before the drift began, with those of the reference, and since then.

        Returns:
            The two maps; None without an alarm, or without images before the drift.
        """
        # Without an alarm, all images are before the drift.
        began = len(self._maps) - min(len(self.since), len(self._maps))
        maps = [*self._maps]
        before, since = [*self._reference, *maps[:began]], maps[began:]
        if not (before and since):
            return None
        return torch.stack(before).mean(0), torch.stack(since).mean(0)


def _coarse(anomaly_map: Tensor) -> Tensor:
    """The means of square blocks of a map (h, w), at most 32 in a row or column."""
    block = ceil(max(anomaly_map.shape) / _CELLS)
    return avg_pool2d(anomaly_map[None].float().cpu(), block, ceil_mode=True)[0]
