"""Decisions beside an exported model: verdicts and p-values at any false-alarm rate, with NumPy alone."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from anomalib_ot.images.reading import EIGHT_BITS, Reading
from anomalib_ot.settings import require

from .conformal import ConformalScale, calibration_scores, p_values, require_numbers, require_rate, threshold

CALIBRATION = ".calibration.json"
"""Suffix of the file's name, after the name of the exported model."""

_FORMAT = 1
# Of the files of an export; ONNX may store large weights beside the graph.
_SUFFIXES = (".bin", ".onnx", ".onnx.data", ".pt", ".xml")


@dataclass(frozen=True)
class Level:
    """Calibration of images, or of pixels.

    Args:
        scores: Calibration scores (n,): image scores, or the maximum of each map.
        scale: How the exported model shows raw scores; None if it shows them as they are.
    """

    scores: NDArray[np.float64]
    scale: ConformalScale | None = None

    def raw(self, shown: ArrayLike) -> NDArray[np.float64]:
        """Raw scores of shown ones."""
        values = require_numbers(shown)
        # Shown scores of 0 and 1 are those of infinite raw ones.
        with np.errstate(divide="ignore"):
            return values if self.scale is None else self.scale.raw(values)

    def to_dict(self) -> dict[str, Any]:
        """The calibration as plain values for JSON."""
        shown = None if self.scale is None else {"threshold": self.scale.raw_threshold, "unit": self.scale.unit}
        return {"scores": self.scores.tolist(), "shown": shown}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "Level":
        """The calibration from the values of :meth:`to_dict`."""
        shown = content["shown"]
        scale = None if shown is None else ConformalScale(float(shown["threshold"]), float(shown["unit"]))
        return cls(calibration_scores(content["scores"]), scale)


@dataclass(frozen=True)
class Decision:
    """Verdicts and p-values of an exported model, at its own or any other false-alarm rate.

    Args:
        model: Class of the model.
        false_alarm_rate: Promised rate of false alarms of the exported model, in (0, 1).
        image: Calibration of image scores.
        pixel: Calibration of maps; None if the model has no maps.
        reading: How the training read images with more than 8 bits per channel, as far as it is known.

    Example:
        >>> scale = ConformalScale(raw_threshold=0.4, unit=0.1)
        >>> decision = Decision("WtFlow", 0.2, Level(np.array([0.1, 0.2, 0.3, 0.4]), scale))
        >>> raw = decision.raw_scores([0.25, 0.75])
        >>> decision.is_anomalous(raw).tolist(), decision.p_values(raw).tolist()
        ([False, True], [0.4, 0.2])
    """

    model: str
    false_alarm_rate: float
    image: Level
    pixel: Level | None = None
    reading: Reading = EIGHT_BITS

    @classmethod
    def load(cls, exported: str | Path) -> "Decision":
        """Load the decision of an exported model from ``NAME.calibration.json`` beside it.

        Args:
            exported: Path of the exported file: ``model.xml``, ``model.onnx`` or ``model.pt``.

        Returns:
            The decision.

        Raises:
            FileNotFoundError: If there is no calibration file beside the exported one.
            ValueError: If the calibration file is damaged, or was written for another exported file.
        """
        path = Path(exported)
        place = calibration_of(path)
        if not place.is_file():
            msg = (
                f"there is no {place.name} beside {path}; export the model again, with the ConformalPostProcessor "
                "calibrated on good images"
            )
            raise FileNotFoundError(msg)
        try:
            content = json.loads(place.read_text(encoding="utf-8"))
            require(content["format"] == _FORMAT, "format", _FORMAT, content["format"])
            levels = [None if content[name] is None else Level.from_dict(content[name]) for name in ("image", "pixel")]
            require_rate("false_alarm_rate", content["false_alarm_rate"])
            files, image = dict(content["files"]), levels[0]
            # Files of earlier versions have none.
            reading = Reading.from_plain(content.get("reading"))
        except (KeyError, TypeError, ValueError) as error:
            msg = f"{place} is not a calibration file of this anomalib-ot, or is damaged ({error}); export again"
            raise ValueError(msg) from error
        if image is None or path.name not in files:
            msg = f"{place} is not the calibration of {path.name}, but of {', '.join(files) or 'no file'}; export again"
            raise ValueError(msg)
        for name, checksum in files.items():
            if not path.with_name(name).is_file() or checksum_of(path.with_name(name)) != checksum:
                msg = (
                    f"{place} is the calibration of another {content['model']}: {name} is not the file that was "
                    "exported with it. Keep the files of an export together, or export again"
                )
                raise ValueError(msg)
        return cls(content["model"], content["false_alarm_rate"], image, levels[1], reading)

    def write(self, exported: Path) -> None:
        """Write ``NAME.calibration.json`` beside an exported file, with the checksum of each file of the export."""
        parts = [exported.with_name(f"{exported.stem}{suffix}") for suffix in _SUFFIXES]
        content = {
            "format": _FORMAT,
            "model": self.model,
            "false_alarm_rate": self.false_alarm_rate,
            "files": {each.name: checksum_of(each) for each in parts if each.is_file()},
            "image": self.image.to_dict(),
            "pixel": None if self.pixel is None else self.pixel.to_dict(),
            "reading": self.reading.plain,
        }
        calibration_of(exported).write_text(json.dumps(content, indent=1, allow_nan=False), encoding="utf-8")

    def raw_scores(self, shown: ArrayLike) -> NDArray[np.float64]:
        """Raw image scores of those that the exported model returns.

        Raises:
            ValueError: If a score is NaN.
        """
        return self.image.raw(shown)

    def raw_maps(self, shown: ArrayLike) -> NDArray[np.float64]:
        """Raw anomaly maps of those that the exported model returns.

        Raises:
            ValueError: If the model has no maps, or a pixel is NaN.
        """
        return self._maps().raw(shown)

    def threshold(self, rate: float | None = None) -> float:
        """Raw image score above which an image is anomalous.

        Args:
            rate: Promised rate of false alarms, in (0, 1); by default that of the exported model.

        Raises:
            ValueError: If the rate is not in (0, 1).

        Warns:
            UnsupportedRateWarning: If there are too few calibration scores for the rate.
        """
        return threshold(self.image.scores, self._rate(rate))

    def pixel_threshold(self, rate: float | None = None) -> float:
        """Raw score that no pixel of a good image exceeds, except at the rate; arguments as :meth:`threshold`."""
        return threshold(self._maps().scores, self._rate(rate))

    def is_anomalous(self, raw_scores: ArrayLike, rate: float | None = None) -> NDArray[np.bool_]:
        """Verdict of each raw image score; arguments and warnings as :meth:`threshold`."""
        return require_numbers(raw_scores) > self.threshold(rate)

    def masks(self, raw_scores: ArrayLike, raw_maps: ArrayLike, rate: float | None = None) -> NDArray[np.bool_]:
        """Anomalous pixels; an image has some if and only if it is anomalous.

        Args:
            raw_scores: Raw image scores (B,).
            raw_maps: Raw anomaly maps (B, …, h, w).
            rate: As for :meth:`threshold`.

        Returns:
            For an anomalous image, the pixels above the pixel threshold; its highest pixels if none is. (B, …, h, w).
        """
        maps = require_numbers(raw_maps)
        labels = self.is_anomalous(raw_scores, rate).reshape(-1, *(1,) * (maps.ndim - 1))
        highest = maps.max((-2, -1), keepdims=True)
        return labels & ((maps > self.pixel_threshold(rate)) | (maps == highest))

    def p_values(self, raw_scores: ArrayLike) -> NDArray[np.float64]:
        """Conformal p-value of each raw image score, see :func:`~anomalib_ot.decide.conformal.p_values`."""
        return p_values(raw_scores, self.image.scores)

    def p_values_of_pixels(self, raw_maps: ArrayLike) -> NDArray[np.float64]:
        """P-value of each pixel: the share of good images whose highest pixel is at least as high.

        The p-value of a region is the smallest of its pixels. The chance that a good image has *any* pixel with a
        p-value of at most α is at most α.

        Args:
            raw_maps: Raw anomaly maps, or raw scores of pixels, of any shape.

        Returns:
            P-values of the same shape, see :func:`~anomalib_ot.decide.conformal.p_values`.

        Raises:
            ValueError: If the model has no maps, or a pixel is NaN.

        Example:
            >>> pixels = Level(np.array([1.0, 2.0, 3.0, 4.0]))
            >>> decision = Decision("WtFlow", 0.2, Level(np.array([0.1, 0.2, 0.3, 0.4])), pixels)
            >>> anomaly_map, regions = np.array([[5.0, 0.0], [0.0, 3.5]]), np.array([[1, 0], [0, 2]])
            >>> p_values = decision.p_values_of_pixels(anomaly_map)
            >>> [float(p_values[regions == number].min()) for number in (1, 2)]
            [0.2, 0.4]
        """
        return p_values(raw_maps, self._maps().scores)

    def _rate(self, rate: float | None) -> float:
        return self.false_alarm_rate if rate is None else rate

    def _maps(self) -> Level:
        if self.pixel is None:
            msg = f"{self.model} has no anomaly maps, so that there is no threshold for pixels"
            raise ValueError(msg)
        return self.pixel


def calibration_of(exported: Path) -> Path:
    """Path of the calibration file of an exported file."""
    return exported.with_name(f"{exported.stem}{CALIBRATION}")


def checksum_of(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        digest = sha256()
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()
