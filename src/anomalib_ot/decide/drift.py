"""Drift of a stream of scores: says when good images no longer score like those of the calibration, or like the first.

The monitor is a conformal test martingale (Vovk, Gammerman and Shafer, Algorithmic learning in a random world, 2005;
Vovk, Testing randomness online, 2021, https://arxiv.org/abs/1906.09256). Each new image is compared with the
calibration images and all earlier images of the stream. The smoothed p-values of this comparison are independent and
uniform in (0, 1) if the calibration images and the stream are exchangeable. P-values against the calibration images
alone, such as those of :func:`~anomalib_ot.decide.conformal.p_values`, are not independent, as they share these images
(Bates et al., 2023, https://arxiv.org/abs/2104.08279), so that a monitor of them would promise nothing over a stream.

A gambler starts with a capital of 1 and bets against uniform p-values. Without drift the bets are fair, and by Ville's
inequality the capital ever reaches 1 / rate with a probability of at most the rate, however long the stream is.

This module needs NumPy alone. ``river`` and ``frouros`` bound false alarms at one step and not over a stream (ADWIN),
and ``alibi-detect`` tunes the expected time to a false alarm by simulation; none has a test martingale.
"""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite, log2
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from anomalib_ot.settings import require, require_whole

from .conformal import calibration_scores, require_rate

_FORMAT = 1
# Slopes of the bets. Below 2, so that no image loses or doubles the whole capital.
_SLOPES = (0.5, 1.0, 1.9)


def require_finite_value(name: str, value: float) -> None:
    """Check a value that a monitor is given.

    Raises:
        ValueError: If it is NaN or infinite.
    """
    require(isfinite(value), name, "finite; check the image and the precision of the model", value)


@dataclass(frozen=True)
class DriftState:
    """The state of a monitor after an image.

    Args:
        index: Index of the image in the stream, from 0.
        p_value: Smoothed p-value of its score, in (0, 1): low for a high score.
        martingale: Value of the martingale, positive. It stays the same after the alarm.
        is_alarm: Whether the alarm has been raised, at this image or before.
        began: Index of the image at which the drift probably began; None without an alarm.
        is_higher: Whether the scores are higher since then, not lower; None without an alarm.
    """

    index: int
    p_value: float
    martingale: float
    is_alarm: bool
    began: int | None = None
    is_higher: bool | None = None


class DriftMonitor:
    """Raises an alarm when the scores of a stream of good images drift.

    If the calibration images and all images of the stream are exchangeable, an alarm is ever raised with a probability
    of at most ``false_alarm_rate``. The scores must be those of one model that does not change, and that was trained on
    none of these images. Scores that the folds of a training left out are scores of other models, which are slightly
    higher: use ``watch_lower=False`` with them. The promise is then approximate.

    The martingale is Σ_τ w_τ Σ_e ∏_{t ≥ τ} (1 + e · (½ − p_t)) / E over E bets e. Each part of the capital waits for a
    time τ and then bets that p-values are low (e > 0, higher scores) or high (e < 0, lower scores), so that a late
    drift is found almost as fast as an early one. The weights are w_τ = 1 / log₂(τ + 1) − 1 / log₂(τ + 2), with τ from
    1. Shin, Ramdas and Rinaldo describe such mixtures over times (E-detectors, 2024, https://arxiv.org/abs/2203.03532).

    An image less than doubles the martingale, whatever its score is: at a rate of 1 %, six anomalous images in a row do
    not raise an alarm from a value of 1. All images count, as leaving out those with high scores would hide a strong
    drift. The promise is about streams of good images. ``python -m benchmarks.drift`` measures alarms with a share of
    anomalous images, and delays until the alarm after a change.

    The drift probably began where the ranks of the scores changed most. After the alarm, the bets end, and p-values
    compare with the images up to the alarm. Create a new monitor when the cause has been removed.

    Args:
        calibration: Scores (n,) of good images that the model was not trained on; None to compare the images of the
            stream with one another, which finds a drift only after many images without it.
        false_alarm_rate: Promised probability of a false alarm over the whole stream, in (0, 1).
        seed: Seed of the smoothing of p-values. The same seed and scores give the same states.
        watch_lower: Whether to watch for lower scores as well as for higher ones.

    Raises:
        ValueError: If the rate is not in (0, 1), the seed is negative, or the calibration scores are fewer than two,
            not finite or all equal.

    Example:
        >>> monitor = DriftMonitor(np.linspace(0, 1, 50), false_alarm_rate=0.05)
        >>> monitor.update(0.4).is_alarm
        False
        >>> states = [monitor.update(3 + 0.1 * index) for index in range(12)]
        >>> states[-1].is_alarm, states[-1].began, states[-1].is_higher
        (True, 1, True)
    """

    def __init__(
        self, calibration: ArrayLike | None, false_alarm_rate: float = 0.01, seed: int = 0, *, watch_lower: bool = True
    ) -> None:
        require_rate("false_alarm_rate", false_alarm_rate)
        require_whole(0, "seed", seed)
        self.false_alarm_rate = false_alarm_rate
        self.seed = seed
        self.watch_lower = watch_lower
        self._calibration: list[float] = [] if calibration is None else calibration_scores(calibration).tolist()
        self._compared = [*self._calibration]
        self._scores: list[float] = []
        self._random = np.random.default_rng(seed)
        self._bets = np.array([*_SLOPES, *(-slope for slope in _SLOPES if watch_lower)])
        # Capital that each bet has, and that waits.
        self._capital = np.zeros(len(self._bets))
        self._waiting = 1.0
        self._found: tuple[int, bool] | None = None

    @property
    def threshold(self) -> float:
        """The alarm is raised when the martingale reaches this value, 1 / rate."""
        return 1 / self.false_alarm_rate

    @property
    def calibration(self) -> tuple[float, ...]:
        """Scores that the stream is compared with; none if it is compared with itself."""
        return tuple(self._calibration)

    def update(self, score: float) -> DriftState:
        """Add the score of the next image of the stream.

        Args:
            score: Its raw score.

        Returns:
            The state after the image.

        Raises:
            ValueError: If the score is NaN or infinite. The monitor does not change.
        """
        require_finite_value("a score", score)
        p_value = self._p_value(score)
        index = len(self._scores)
        self._scores.append(score)
        if self._found is None:
            insort(self._compared, score)
            self._bet(index, p_value)
        martingale = float(self._capital.sum()) + self._waiting
        # Within the stream alone, nothing is before its first image.
        if self._found is None and martingale >= self.threshold and (self._calibration or index):
            is_higher = bool(self._capital[self._bets > 0].sum() > self._capital[self._bets < 0].sum())
            self._found = self._beginning(1 if is_higher else -1), is_higher
        return DriftState(index, p_value, martingale, self._found is not None, *(self._found or ()))

    def to_dict(self) -> dict[str, Any]:
        """Settings and all scores as plain values for JSON."""
        return {
            "format": _FORMAT,
            "false_alarm_rate": self.false_alarm_rate,
            "seed": self.seed,
            "watch_lower": self.watch_lower,
            "calibration": [*self._calibration] or None,
            "scores": [*self._scores],
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "DriftMonitor":
        """The monitor with the values of :meth:`to_dict`, ready for the next image.

        Raises:
            ValueError: If they are those of another format, or are damaged.
        """
        try:
            require(content["format"] == _FORMAT, "format", _FORMAT, content["format"])
            settings = {name: content[name] for name in ("false_alarm_rate", "seed", "watch_lower")}
            monitor = cls(content["calibration"], **settings)
            # Replayed, so that the state cannot contradict the scores.
            for score in content["scores"]:
                monitor.update(score)
        except (KeyError, TypeError, ValueError) as error:
            msg = f"the state of the drift monitor is damaged or of another version ({error}); start a new monitor"
            raise ValueError(msg) from error
        return monitor

    def _p_value(self, score: float) -> float:
        above = len(self._compared) - bisect_right(self._compared, score)
        equal = bisect_right(self._compared, score) - bisect_left(self._compared, score)
        # Ties, with the image itself among them, are broken at random: the p-value is then exactly uniform.
        return (above + float(self._random.random()) * (equal + 1)) / (len(self._compared) + 1)

    def _bet(self, index: int, p_value: float) -> None:
        waiting = 1 / log2(index + 3)
        factors = 1 + self._bets * (0.5 - p_value)
        self._capital = (self._capital + (self._waiting - waiting) / len(self._bets)) * factors
        self._waiting = waiting

    def _beginning(self, sign: int) -> int:
        """Index in the stream from which on ranks are most unlike those before, in units of their deviation.

        The statistic is that of Mann and Whitney, as in Pettitt, A non-parametric approach to the change-point problem,
        1979. The calibration images are before all images of the stream. Without
        these, the drift begins after the first image.
        """
        scores = np.array([*self._calibration, *self._scores])
        ordered = np.sort(scores)
        ranks = (np.searchsorted(ordered, scores, "left") + np.searchsorted(ordered, scores, "right") + 1) / 2
        total, first = len(scores), 0 if self._calibration else 1
        after = np.arange(len(self._scores) - first, 0, -1)
        sums = np.cumsum(ranks[::-1])[::-1][len(self._calibration) + first :]
        deviations = np.sqrt(after * (total - after) * (total + 1) / 12)
        return first + int(np.argmax(sign * (sums - after * (total + 1) / 2) / deviations))
