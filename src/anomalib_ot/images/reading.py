"""Reads images of any bit depth as arrays, with NumPy and Pillow alone."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from anomalib_ot.settings import require

logger = logging.getLogger(__name__)

ValueRange = tuple[float, float]

_SIXTEEN_BITS = (0.0, 65535.0)
_BYTE = 8
# Tags of a TIFF file.
_BITS_PER_SAMPLE, _PLANAR = 258, 284
_PLANES_APART = 2


def check_value_range(value_range: ValueRange | None) -> None:
    """Check a range of values.

    Raises:
        ValueError: If it is not two finite numbers, the lower one first.
    """
    if value_range is not None:
        is_pair = isinstance(value_range, Sequence) and len(value_range) == 2  # noqa: PLR2004 - black and white
        require(is_pair, "value_range", "two finite numbers, the lower one first", value_range)
        low, high = value_range
        is_range = isfinite(low) and isfinite(high) and low < high
        require(is_range, "value_range", "two finite numbers, the lower one first", value_range)


@dataclass(frozen=True)
class Reading:
    """How images with more than 8 bits per channel are read.

    Args:
        is_full_range: Whether all bits count; anomalib reads these images as if they had 8 bits.
        value_range: Values that map to black and white at the full range; None for the range of the data type.
        is_deep: Whether a model was trained on such images, as far as its first image tells. It does not count in
            comparisons.

    Raises:
        ValueError: If ``value_range`` is invalid.
    """

    is_full_range: bool = False
    value_range: ValueRange | None = None
    is_deep: bool = field(default=False, compare=False)

    def __post_init__(self) -> None:
        check_value_range(self.value_range)
        if self.value_range is not None:
            low, high = self.value_range
            # Numbers of NumPy could not be stored.
            object.__setattr__(self, "value_range", (float(low), float(high)))

    @classmethod
    def from_plain(cls, plain: Any) -> "Reading":
        """The reading from the values of :attr:`plain`; from None, as earlier versions have it, anomalib's.

        Raises:
            ValueError: If they are damaged.
        """
        try:
            return cls() if plain is None else cls(**plain)
        except TypeError as error:
            msg = f"the record of how images were read is damaged: {error}"
            raise ValueError(msg) from error

    @property
    def plain(self) -> dict[str, Any]:
        """The reading as plain values."""
        return asdict(self)

    def warn_of(self, now: "Reading", source: str) -> bool:
        """Warn that images are not read as those that a model was trained on, if it was trained on such images.

        Args:
            now: How they are read.
            source: What reads them, to begin a sentence.

        Returns:
            Whether there was a warning.
        """
        is_other = self.is_deep and self != now
        if is_other:
            logger.warning(
                "%s reads images with more than 8 bits per channel %s, but the model was trained on images that were "
                "read %s. Its threshold does not apply to these scores: read them alike.",
                source,
                now,
                self,
            )
        return is_other

    def __str__(self) -> str:
        """The reading in words."""
        if not self.is_full_range:
            return "as if they had 8 bits"
        if self.value_range is None:
            return "in the range of their data type"
        low, high = (f"{each:g}" if float(f"{each:g}") == each else repr(each) for each in self.value_range)
        return f"with value_range [{low}, {high}]"


EIGHT_BITS = Reading()
"""The reading of anomalib."""


def reading_asked_for(value_range: ValueRange | None, trained: Reading) -> Reading:
    """The reading with a range of values; without one, that of the training.

    Args:
        value_range: The range that is asked for.
        trained: How the training read images.

    Returns:
        The reading. A warning says if the training had another one.
    """
    if value_range is None:
        return trained
    asked = Reading(is_full_range=True, value_range=value_range)
    trained.warn_of(asked, "value_range")
    return asked


def read_values(path: Path | str, value_range: ValueRange | None = None) -> NDArray[np.float32]:
    """Read an image of any bit depth, with the values of :func:`~anomalib_ot.data.reading.read_picture`.

    Args:
        path: The file.
        value_range: As for ``read_picture``.

    Returns:
        float32 image (H, W, 3) in [0, 1].

    Raises:
        ValueError: In the cases of ``read_picture``.
        FileNotFoundError: If the file does not exist.
    """
    values, _ = read_values_and_depth(path, value_range)
    return values


def read_values_and_depth(path: Path | str, value_range: ValueRange | None = None) -> tuple[NDArray[np.float32], bool]:
    """As :func:`read_values`, and whether the image has more than 8 bits per channel."""
    found = deep_values(path)
    if found is not None:
        scaled = scaled_values(*found, value_range, path)
        return scaled if scaled.ndim == 3 else np.repeat(scaled[..., None], 3, axis=2), True  # noqa: PLR2004 - H, W, colours
    with naming_unreadable(path), Image.open(path) as image:
        return scaled_bytes(np.asarray(image.convert("RGB"))), False


def scaled_bytes(values: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Scale bytes to [0, 1] with the rounding of torch, which multiplies by the reciprocal."""
    return values.astype(np.float32) * np.float32(1 / 255)


def scaled_values(
    values: NDArray[Any], usual_range: ValueRange | None, value_range: ValueRange | None, source: Path | str
) -> NDArray[np.float32]:
    """Scale the values of an image with more than 8 bits per channel to [0, 1].

    Args:
        values: The values.
        usual_range: Values that are black and white according to the data type; None if it does not define them.
        value_range: Values that map to black and white instead; values outside are clipped.
        source: Name of the image, for messages.

    Returns:
        float32 values of the same shape.

    Raises:
        ValueError: If no range is given, and the data type has none or floating-point numbers exceed it.
    """
    low, high = value_range or usual_range or _refuse(source, "contains 32-bit integers")
    if value_range is None and values.dtype.kind == "f" and not (values.min() >= low and values.max() <= high):
        _refuse(source, f"contains numbers from {values.min():g} to {values.max():g}")
    scaled: NDArray[np.float64] = ((values.astype(np.float64) - low) / (high - low)).clip(0, 1)
    return scaled.astype(np.float32)


def deep_values(path: Path | str) -> tuple[NDArray[Any], ValueRange | None] | None:
    """Values of an image with more than 8 bits per channel, as stored in the file.

    Args:
        path: The file.

    Returns:
        The values, (H, W) of a grey image or (H, W, 3) of a colour image, and their range. The range is the values that
        are black and white according to the data type, or None if the type does not define them. None instead of both
        for an image with up to 8 bits per channel.

    Raises:
        ValueError: If the colours cannot be read at their full depth, or the file cannot be read at all.
        FileNotFoundError: If the file does not exist.
    """
    with naming_unreadable(path), Image.open(path) as image:
        tags = image.tag_v2 if image.format == "TIFF" else {}
        # Decoding may rotate the image and remove tags, so read the tag before.
        bits = bits_of(image)
        if grey := deep_grey_values(image, bits):
            return grey
        # Pillow reduces colours to 8 bits when it decodes them. For PNG, only the decoder's mode shows the depth.
        is_deep = bits > _BYTE if tags else any(";16" in str(tile[3]) for tile in image.tile)
        if not is_deep or not image.mode.startswith("RGB"):
            return None
        planes_apart = tags.get(_PLANAR) == _PLANES_APART
        # Pillow raises an error for a truncated file; OpenCV does not.
        image.load()
    return _colours(path, planes_apart), _SIXTEEN_BITS


def bits_of(image: Image.Image) -> int:
    """Bits of a sample in the file of a Pillow image, as far as it says so; 16 otherwise."""
    tags: Any = getattr(image, "tag_v2", {})
    return int(max(tags.get(_BITS_PER_SAMPLE, (16,))))


def deep_grey_values(image: Image.Image, bits: int = 16) -> tuple[NDArray[Any], ValueRange | None] | None:
    """Values of a grey Pillow image with more than 8 bits, as :func:`deep_values`; None for any other image.

    Args:
        image: The image.
        bits: Bits of a sample in its file.
    """
    if image.mode == "F":
        return np.asarray(image), (0.0, 1.0)
    if image.mode.startswith("I;16"):
        return np.asarray(image), (0.0, 2.0**bits - 1)
    if image.mode == "I":
        # Pillow scales the values of PGM files, and of no other format, to 16 bits.
        return np.asarray(image), _SIXTEEN_BITS if image.format == "PPM" else None
    return None


@contextmanager
def naming_unreadable(path: Path | str) -> Iterator[None]:
    """Name the image that cannot be read; Pillow's own errors rarely do.

    Raises:
        ValueError: If the file is not an image, is damaged, or is too large.
    """
    try:
        yield
    except (FileNotFoundError, MemoryError):
        raise
    except Exception as error:
        # The reader of each format raises errors of other types.
        msg = f"cannot read {path}: {error}"
        raise ValueError(msg) from error


def _colours(path: Path | str, planes_apart: bool) -> NDArray[Any]:
    # OpenCV reads 16-bit colours, but not from separate planes, for which it returns uninitialised memory.
    decoded = None if planes_apart else _decoded(path)
    if decoded is None or decoded.dtype != np.uint16 or decoded.ndim != 3:  # noqa: PLR2004 - rows, columns, channels
        msg = f"the colours of {path} cannot be read at their full depth; save it as PNG with 8 or 16 bits per channel"
        raise ValueError(msg)
    # From blue, green, red and possibly alpha to RGB.
    return decoded[..., 2::-1]


def _decoded(path: Path | str) -> NDArray[Any] | None:
    """Values that OpenCV decodes, None if it cannot."""
    try:
        import cv2  # noqa: PLC0415 - an edge device may lack it
    except ImportError as error:
        msg = (
            f"reading the colours of {path} at their full depth needs OpenCV, which is not installed; run: pip install "
            "opencv-python-headless, or save the image with 8 bits per channel"
        )
        raise ValueError(msg) from error
    with suppress(cv2.error):
        return cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)
    return None


def _refuse(path: Path | str, why: str) -> NoReturn:
    msg = f"{path} {why}, whose black and white are unknown: set value_range to these two values"
    raise ValueError(msg)
