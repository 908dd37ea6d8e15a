"""Images as the input of an exported model."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from anomalib_ot.images.reading import (
    ValueRange,
    bits_of,
    check_value_range,
    deep_grey_values,
    naming_unreadable,
    read_values,
    scaled_bytes,
    scaled_values,
)

ImageInput = str | Path | NDArray[Any] | Image.Image

_USUAL_RANGES = {"u1": (0.0, 255.0), "u2": (0.0, 65535.0), "f": (0.0, 1.0)}


def pixels_of(image: ImageInput, value_range: ValueRange | None = None) -> NDArray[np.float32]:
    """RGB pixels of an image in any form.

    Files are read as :func:`~anomalib_ot.data.read_picture` reads them: transparency is dropped, other colour spaces
    are converted, and the EXIF orientation rotates some TIFF files and no others.

    Args:
        image: Path of a file; a Pillow image, which holds 8 bits of each colour only; or an array (H, W),
            (H, W, 1), (H, W, 3) or (H, W, 4) of grey values, RGB or RGB with transparency, of bytes, of 16-bit
            integers, or of floating-point numbers in [0, 1].
        value_range: Values that map to black and white; values outside are clipped. The default is the range of the
            data type. Images with up to 8 bits per channel have their own range.

    Returns:
        float32 pixels (H, W, 3) in [0, 1].

    Raises:
        ValueError: If the file cannot be read; if an array has another shape or type; or if the black and white of its
            values are unknown.
        FileNotFoundError: If the file does not exist.
    """
    check_value_range(value_range)
    if isinstance(image, str | Path):
        return read_values(image, value_range)
    if isinstance(image, Image.Image):
        with naming_unreadable("the image"):
            found = deep_grey_values(image, bits_of(image))
            if found is None:
                return scaled_bytes(np.asarray(image.convert("RGB")))
        return _colours(scaled_values(*found, value_range, "the image"))
    return _pixels_of_array(np.asarray(image), value_range)


def _pixels_of_array(values: NDArray[Any], value_range: ValueRange | None) -> NDArray[np.float32]:
    kind = "f" if values.dtype.kind == "f" else values.dtype.str[1:]
    is_image = values.ndim == 2 or (values.ndim == 3 and values.shape[2] in {1, 3, 4})  # noqa: PLR2004 - rows, columns, channels
    if not is_image or not values.size or (kind not in _USUAL_RANGES and (value_range is None or kind[0] not in "iu")):
        msg = (
            f"got an array of shape {values.shape} and type {values.dtype}, expected an image (H, W), (H, W, 3) or "
            "(H, W, 4) of uint8, uint16 or floating-point numbers; integers of other types need value_range"
        )
        raise ValueError(msg)
    if kind == "u1":
        return _colours(scaled_bytes(values))
    return _colours(scaled_values(values, _USUAL_RANGES.get(kind), value_range, "the array"))


def _colours(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """RGB of grey values (H, W) or (H, W, 1), or of colours with transparency."""
    channels = np.atleast_3d(values)[..., :3]
    return np.ascontiguousarray(np.broadcast_to(channels, (*channels.shape[:2], 3)))


def resized(pixels: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """Resize pixels (H, W, 3) as the models do in training, and clip them to [0, 1].

    Args:
        pixels: float32 pixels (H, W, 3).
        size: Height and width.

    Returns:
        float32 pixels (h, w, 3).
    """
    # Pillow's filter on floating-point numbers is that of torchvision with antialiasing.
    channels = [Image.fromarray(np.ascontiguousarray(pixels[..., channel])) for channel in range(3)]
    scaled = [np.asarray(each.resize(size[::-1], Image.Resampling.BILINEAR)) for each in channels]
    return np.dstack(scaled).clip(0, 1)
