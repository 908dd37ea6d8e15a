"""Pictures of more than eight bits a channel, of which anomalib's reader loses all or half."""

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
    """Refuse a range that is none.

    Raises:
        ValueError: If it is not of two finite numbers, the lower first.
    """
    if value_range is not None:
        low, high = value_range
        is_range = isfinite(low) and isfinite(high) and low < high
        require(is_range, "value_range", "two finite numbers, the lower first", value_range)


def read_picture(
    path: Path | str, value_range: ValueRange | None = None, size: tuple[int, int] | None = None
) -> Tensor:
    """Read a picture, of whatever depth, as anomalib reads one of eight bits.

    anomalib's own ``read_image`` makes all values above 255 of a grey picture white, and drops the lower half of the
    bits of a coloured one. Here they are read as they are, and scaled. As there, transparency is dropped, and a note
    of how the camera was held turns some TIFF files and no others.

    Args:
        path: The file.
        value_range: Values that become black and white; what lies beyond is cut off. By default those that 16 bits (or
            as many as a TIFF file has) can hold, and 0 and 1 for floating-point numbers. Pictures of up to eight bits
            have a range of their own and are read as anomalib reads them.
        size: Height and width to resize to, as the models do before they score, for an exported model; by default the
            file's own.

    Returns:
        float32 image (3, H, W) in [0, 1].

    Raises:
        ValueError: If the range is none; if the file is of 32-bit integers, or of floating-point numbers that do not
            lie in [0, 1], and no range is given; if its colours cannot be read at their full depth; or if the file is
            no picture, a damaged one or too large a one.
        FileNotFoundError: If there is no such file.

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
    """Resize an image (3, H, W) in [0, 1] as the models' pre-processors do, and keep it there.

    Bytes, or another library's way to average, move a score in its third decimal place.
    """
    # Resizing overshoots one by a rounding error, and the host's inferencer takes anything above for bytes.
    return transforms.resize(image, list(size), antialias=True).clamp(0, 1)


def read_deep_picture(path: Path | str, value_range: ValueRange | None = None) -> Tensor | None:
    """As :func:`read_picture`, but None for a picture of up to eight bits a channel."""
    found = deep_values(path)
    if found is None:
        return None
    values, usual_range = found
    low, high = value_range or usual_range or _refuse(path, "holds 32-bit integers")
    if value_range is None and values.dtype.kind == "f" and not (values.min() >= low and values.max() <= high):
        _refuse(path, f"holds numbers from {values.min():g} to {values.max():g}")
    scaled = ((values.astype(np.float64) - low) / (high - low)).clip(0, 1).astype(np.float32)
    channels = torch.from_numpy(np.atleast_3d(scaled).transpose(2, 0, 1).copy())
    return tv_tensors.Image(channels.expand(3, -1, -1).contiguous())


def deep_values(path: Path | str) -> tuple[NDArray[Any], ValueRange | None] | None:
    """Values of a picture of more than eight bits a channel, as they are in the file.

    Args:
        path: The file.

    Returns:
        The values, (H, W) of a grey picture or (H, W, 3) of a coloured one, and those that are black and white by
        their type, None where that says nothing. None instead of both for a picture of up to eight bits.

    Raises:
        ValueError: If the colours cannot be read at their full depth, or the file not at all.
        FileNotFoundError: If there is no such file.
    """
    with naming_unreadable(path), Image.open(path) as image:
        tags = image.tag_v2 if image.format == "TIFF" else {}
        # Reading turns the picture and takes the tag of that away.
        bits = max(tags.get(_BITS_PER_SAMPLE, (16,)))
        if image.mode == "F":
            return np.asarray(image), (0.0, 1.0)
        if image.mode.startswith("I;16"):
            return np.asarray(image), (0.0, 2.0**bits - 1)
        if image.mode == "I":
            # Pillow brings those of PGM, and of no other kind, to 16 bits.
            return np.asarray(image), _SIXTEEN_BITS if image.format == "PPM" else None
        # Colours are cut to eight bits as they are read, which the decoder's name alone tells of PNG.
        is_deep = bits > _BYTE if tags else any(";16" in str(tile[3]) for tile in image.tile)
        if not is_deep or not image.mode.startswith("RGB"):
            return None
        planes_apart = tags.get(_PLANAR) == _PLANES_APART
        # OpenCV takes a file that is cut off for whole, Pillow does not.
        image.load()
    return _colours(path, planes_apart), _SIXTEEN_BITS


@contextmanager
def naming_unreadable(path: Path | str) -> Iterator[None]:
    """Name the picture that Pillow does not read, which its own errors rarely do.

    Raises:
        ValueError: If the file is no picture, a damaged one, or too large a one.
    """
    try:
        yield
    except (FileNotFoundError, MemoryError):
        raise
    except Exception as error:
        # Each format's reader has errors of its own for what it meets.
        msg = f"cannot read {path}: {error}"
        raise ValueError(msg) from error


def _colours(path: Path | str, planes_apart: bool) -> NDArray[Any]:
    # OpenCV reads 16 bits of a colour, but not from planes, of which it would give whatever lies in the memory.
    decoded = None
    if not planes_apart:
        with suppress(cv2.error):
            decoded = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)
    if decoded is None or decoded.dtype != np.uint16 or decoded.ndim != 3:  # noqa: PLR2004 - rows, columns, channels
        msg = f"the colours of {path} cannot be read at their full depth; save it as PNG, of eight or 16 bits"
        raise ValueError(msg)
    # Blue, green and red, and perhaps transparency.
    return decoded[..., 2::-1]


def _refuse(path: Path | str, why: str) -> NoReturn:
    msg = f"{path} {why}, which do not say what is black and white: set value_range to these two values"
    raise ValueError(msg)
