"""Reads images with more than 8 bits per channel, of which anomalib's reader loses all bits or half of them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from math import isfinite
from pathlib import Path
from typing import Any, NoReturn

import cv2
import numpy as np
import torch
from anomalib.data.utils import read_image
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as transforms

from anomalib_ot.settings import require

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
        low, high = value_range
        is_range = isfinite(low) and isfinite(high) and low < high
        require(is_range, "value_range", "two finite numbers, the lower one first", value_range)


def read_picture(
    path: Path | str, value_range: ValueRange | None = None, size: tuple[int, int] | None = None
) -> Tensor:
    """Read an image of any bit depth, in the format in which anomalib reads 8-bit images.

    anomalib's ``read_image`` turns all values above 255 of a grey image white, and drops the lower half of the bits of
    a colour image. This function reads all bits and scales the values. As in ``read_image``, transparency is dropped,
    and the EXIF orientation rotates some TIFF files and no others.

    Args:
        path: The file.
        value_range: Values that map to black and white; values outside are clipped. The default is the range of 16 bits
            (for TIFF, of the bits per sample), and (0, 1) for floating-point numbers. Images with up to 8 bits per
            channel have their own range, and are read as anomalib reads them.
        size: Height and width to resize to, as the models do before scoring; use it for an exported model. By default
            the size of the file.

    Returns:
        float32 image (3, H, W) in [0, 1].

    Raises:
        ValueError: If ``value_range`` is invalid; if the file contains 32-bit integers, or floating-point numbers
            outside [0, 1], and no range is given; if its colours cannot be read at their full depth; or if the file is
            not an image, is damaged or is too large.
        FileNotFoundError: If the file does not exist.

    Example:
        >>> read_picture("camera_of_12_bits.png", (0, 4095)).shape  # doctest: +SKIP
        torch.Size([3, 1024, 1280])
    """
    check_value_range(value_range)
    picture = read_deep_picture(path, value_range)
    if picture is None:
        with naming_unreadable(path):
            picture = torch.as_tensor(read_image(path, as_tensor=True))
    return picture if size is None else resized(picture, size)


def resized(image: Tensor, size: Sequence[int]) -> Tensor:
    """Resize an image (3, H, W) in [0, 1] as the models' pre-processors do, and clip it to [0, 1].

    Resizing 8-bit values, or with another library's interpolation, changes the third decimal place of a score.
    """
    # Resizing may exceed 1 by a rounding error, and anomalib's inferencer interprets values above 1 as 8-bit values.
    return transforms.resize(image, list(size), antialias=True).clamp(0, 1)


def read_deep_picture(path: Path | str, value_range: ValueRange | None = None) -> Tensor | None:
    """As :func:`read_picture`, but return None for an image with up to 8 bits per channel."""
    found = deep_values(path)
    if found is None:
        return None
    values, usual_range = found
    low, high = value_range or usual_range or _refuse(path, "contains 32-bit integers")
    if value_range is None and values.dtype.kind == "f" and not (values.min() >= low and values.max() <= high):
        _refuse(path, f"contains numbers from {values.min():g} to {values.max():g}")
    scaled = ((values.astype(np.float64) - low) / (high - low)).clip(0, 1).astype(np.float32)
    channels = torch.from_numpy(np.atleast_3d(scaled).transpose(2, 0, 1).copy())
    return tv_tensors.Image(channels.expand(3, -1, -1).contiguous())


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
        bits = max(tags.get(_BITS_PER_SAMPLE, (16,)))
        if image.mode == "F":
            return np.asarray(image), (0.0, 1.0)
        if image.mode.startswith("I;16"):
            return np.asarray(image), (0.0, 2.0**bits - 1)
        if image.mode == "I":
            # Pillow scales the values of PGM files, and of no other format, to 16 bits.
            return np.asarray(image), _SIXTEEN_BITS if image.format == "PPM" else None
        # Pillow reduces colours to 8 bits when it decodes them. For PNG, only the decoder's mode shows the depth.
        is_deep = bits > _BYTE if tags else any(";16" in str(tile[3]) for tile in image.tile)
        if not is_deep or not image.mode.startswith("RGB"):
            return None
        planes_apart = tags.get(_PLANAR) == _PLANES_APART
        # Pillow raises an error for a truncated file; OpenCV does not.
        image.load()
    return _colours(path, planes_apart), _SIXTEEN_BITS


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
    decoded = None
    if not planes_apart:
        with suppress(cv2.error):
            decoded = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)
    if decoded is None or decoded.dtype != np.uint16 or decoded.ndim != 3:  # noqa: PLR2004 - rows, columns, channels
        msg = f"the colours of {path} cannot be read at their full depth; save it as PNG with 8 or 16 bits per channel"
        raise ValueError(msg)
    # From blue, green, red and possibly alpha to RGB.
    return decoded[..., 2::-1]


def _refuse(path: Path | str, why: str) -> NoReturn:
    msg = f"{path} {why}, whose black and white are unknown: set value_range to these two values"
    raise ValueError(msg)
