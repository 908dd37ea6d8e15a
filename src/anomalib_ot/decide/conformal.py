"""Thresholds and p-values with a promised rate of false alarms, from the scores of good images.

All functions take calibration scores c_1 … c_n: scores of good images that the model was not trained on. If a new good
image is exchangeable with them, which means that their order tells nothing, its score s has a p-value of at most α with
probability at most α, for every α and every n (Vovk, Gammerman and Shafer, Algorithmic learning in a random world,
2005; for outliers: Bates, Candès, Lei, Romano and Sesia, Testing for outliers with conformal p-values, 2023,
https://arxiv.org/abs/2104.08279). The promise is about the drawing of the calibration images and the new image
together: for one fixed set of calibration images, the realised rate varies around it.

This module needs NumPy alone, so that it runs beside an exported model. ``crepes`` 0.9 and ``MAPIE`` 1.6 compute the
same p-values, but depend on pandas or scikit-learn and are built around classifiers and regressors. ``nonconform`` is
for anomaly detection, but was not available to try. The rank statistics here are a few lines of NumPy.
"""

import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from anomalib_ot.settings import require

# A product such as 0.29 · 100 is slightly below the whole number that it stands for.
_ROUNDING = 1e-9
_FEWEST = 2
# Units from the threshold, in the range of single precision, that are shown as 0 or 1.
_FURTHEST = 1e30


class UnsupportedRateWarning(UserWarning):
    """There are too few good images for the false-alarm rate that was asked for."""


def require_rate(name: str, rate: float) -> None:
    """Check that a rate is in (0, 1).

    Args:
        name: Name of the argument.
        rate: The rate.

    Raises:
        ValueError: If it is not.
    """
    require(0 < rate < 1, name, "between 0 and 1, such as 0.01 for 1 %", rate)


def calibration_scores(scores: ArrayLike) -> NDArray[np.float64]:
    """Check and sort the scores of good images.

    Args:
        scores: Scores (n,) of good images that the model was not trained on.

    Returns:
        The scores in ascending order.

    Raises:
        ValueError: If there are fewer than two, one is not finite, or all are equal.
    """
    values = np.sort(np.asarray(scores, dtype=np.float64), axis=None)
    if len(values) < _FEWEST:
        msg = f"a threshold needs the scores of at least 2 good images, got {len(values)}; hold out more good images"
        raise ValueError(msg)
    if not np.isfinite(values).all():
        bad = int((~np.isfinite(values)).sum())
        msg = f"{bad} of {len(values)} scores of good images are NaN or infinite; check the model and its precision"
        raise ValueError(msg)
    if values[0] == values[-1]:
        msg = (
            f"all {len(values)} scores of good images are {values[0]:g}, so that they say nothing about the next one; "
            "check that the images differ, and that the model was trained"
        )
        raise ValueError(msg)
    return values


def supported_rate(count: int) -> float:
    """Smallest false-alarm rate that the scores of ``count`` good images can promise: 1 / (n + 1)."""
    return 1 / (count + 1)


def promised_rate(rate: float, count: int) -> float:
    """Rate that a threshold promises for a rate that was asked for: what the good images support, if that is more."""
    return max(rate, supported_rate(count))


def images_for(rate: float) -> int:
    """Smallest number of good images that can promise a false-alarm rate: 1 / rate − 1, rounded up."""
    return math.ceil(1 / rate - 1 - _ROUNDING)


def why_unsupported(count: int, rate: float) -> str | None:
    """Why the scores of some good images cannot promise a rate, and what they promise; None if they can.

    Args:
        count: Number of good images.
        rate: False-alarm rate in (0, 1).
    """
    if count >= images_for(rate):
        return None
    return (
        f"a false-alarm rate of {rate:.3g} was asked for, but the scores of {count} good images support no rate below "
        f"{supported_rate(count):.2g}, which is used: the threshold is the highest of these scores. "
        f"{images_for(rate)} good images would support {rate:.3g}"
    )


def threshold(calibration: ArrayLike, rate: float) -> float:
    """Threshold that the score of a good image exceeds with a probability of at most ``rate``.

    It is the ⌈(n + 1)(1 − rate)⌉-th smallest calibration score. A score is above it if and only if its p-value is at
    most ``rate``. See the module for the guarantee.

    Args:
        calibration: Scores (n,) of good images that the model was not trained on.
        rate: Promised rate of false alarms, in (0, 1).

    Returns:
        The threshold. With fewer than 1 / rate − 1 images it is their highest score, which promises
        :func:`supported_rate`.

    Raises:
        ValueError: If the rate is not in (0, 1), there are fewer than two scores, one is not finite, or all are equal.

    Warns:
        UnsupportedRateWarning: If there are too few images for the rate.

    Example:
        >>> threshold([0.1, 0.4, 0.2, 0.3], rate=0.25)
        0.4
    """
    require_rate("false_alarm_rate", rate)
    scores = calibration_scores(calibration)
    if reason := why_unsupported(len(scores), rate):
        warnings.warn(reason, UnsupportedRateWarning, stacklevel=2)
    # Number of calibration scores, of the new score and them, that may be above.
    allowed = max(1, math.floor(rate * (len(scores) + 1) + _ROUNDING))
    return float(scores[-allowed])


def p_values(scores: ArrayLike, calibration: ArrayLike) -> NDArray[np.float64]:
    """Conformal p-value of each score: (1 + #{i : c_i ≥ s}) / (n + 1).

    Args:
        scores: Scores of any shape.
        calibration: Scores (n,) of good images that the model was not trained on.

    Returns:
        P-values of the shape of ``scores``, in [1 / (n + 1), 1].

    Raises:
        ValueError: If a score is NaN, or the calibration scores are fewer than two, not finite or all equal.

    Example:
        >>> float(p_values(0.35, [0.1, 0.4, 0.2, 0.3]))
        0.4
    """
    return rank_p_values(require_numbers(scores), calibration_scores(calibration))


def rank_p_values(scores: ArrayLike, ascending: ArrayLike) -> NDArray[np.float64]:
    """As :func:`p_values`, for any number of ascending calibration scores, which are not checked."""
    known = np.asarray(ascending, dtype=np.float64)
    at_least = len(known) - np.searchsorted(known, scores, side="left")
    return np.asarray((1 + at_least) / (len(known) + 1))


def benjamini_hochberg(p_values: ArrayLike, false_discovery_rate: float) -> NDArray[np.bool_]:
    """Images of a batch that are anomalous, with at most a share of false ones among them on average.

    The procedure of Benjamini and Hochberg (Controlling the false discovery rate, 1995). It stays valid for conformal
    p-values that share their calibration scores (Bates et al., 2023).

    Args:
        p_values: P-values (B,) of the images of a batch.
        false_discovery_rate: Largest expected share of good images among those that are called anomalous, in (0, 1).

    Returns:
        Whether each image is called anomalous, (B,).

    Raises:
        ValueError: If the rate is not in (0, 1), or a p-value is not in [0, 1].

    Example:
        >>> benjamini_hochberg([0.01, 0.02, 0.6, 0.9], 0.1).tolist()
        [True, True, False, False]
    """
    # The functions above do not need SciPy, which takes about a second to import.
    from scipy.stats import false_discovery_control  # noqa: PLC0415

    require_rate("false_discovery_rate", false_discovery_rate)
    values = np.asarray(p_values, dtype=np.float64)
    if not values.size:
        return np.zeros(values.shape, dtype=bool)
    adjusted: NDArray[np.float64] = false_discovery_control(values)
    # The adjustment divides by ranks, which rounds.
    return adjusted <= false_discovery_rate * (1 + _ROUNDING)


def require_numbers(scores: ArrayLike) -> NDArray[np.float64]:
    """Scores as an array, without NaN, which is neither above nor below a threshold.

    Raises:
        ValueError: If a score is NaN.
    """
    values = np.asarray(scores, dtype=np.float64)
    if np.isnan(values).any():
        msg = "a score is NaN, which is neither normal nor anomalous; check the image and the precision of the model"
        raise ValueError(msg)
    return values


def compressed(units: Any) -> Any:
    """``0.5 + 0.5 · u / (1 + |u|)``, in (0, 1), of a finite number, array or tensor u."""
    return 0.5 + 0.5 * units / (1 + abs(units))


@dataclass(frozen=True)
class ConformalScale:
    """How a raw score is shown: ``0.5 + 0.5 · u / (1 + |u|)`` with u = (raw − threshold) / unit.

    Shown scores of finite raw ones are in (0, 1), the threshold is 0.5, and no two raw scores are shown alike, apart
    from rounding. Infinite ones are shown as 0 and 1. Its methods take numbers, arrays or tensors.

    Args:
        raw_threshold: Raw score above which something is anomalous.
        unit: Difference of raw scores that is shown as 0.25 below or above the threshold, positive.
        threshold: Shown score above which something is anomalous: 0.5, or None without thresholding.

    Example:
        >>> scale = ConformalScale(raw_threshold=3.0, unit=1.0)
        >>> scale.shown(4.0), scale.raw(0.75)
        (0.75, 4.0)
    """

    raw_threshold: float
    unit: float
    threshold: float | None = 0.5

    @property
    def is_raw(self) -> bool:
        """Whether raw scores are shown as they are."""
        return False

    def shown(self, raw: Any) -> Any:
        """Raw scores as they are shown."""
        units = (raw - self.raw_threshold) / self.unit
        # Infinity divided by infinity would be NaN.
        limits = -_FURTHEST, _FURTHEST
        units = units.clip(*limits) if hasattr(units, "clip") else min(max(units, limits[0]), limits[1])
        return compressed(units)

    def raw(self, shown: Any) -> Any:
        """The inverse of :meth:`shown`. In single precision, scores far above the threshold lose digits."""
        signed = 2 * shown - 1
        return self.raw_threshold + self.unit * signed / (1 - abs(signed))


def unit_of(calibration: ArrayLike) -> float:
    """Unit of the scale of shown scores: highest calibration score minus the median.

    If more than half of the scores share the highest one, the unit is the range of the scores.

    Args:
        calibration: Scores (n,) of good images.

    Returns:
        The unit, positive.

    Raises:
        ValueError: If there are fewer than two scores, one is not finite, or all are equal.
    """
    scores = calibration_scores(calibration)
    return float(scores[-1] - np.median(scores)) or float(scores[-1] - scores[0])
