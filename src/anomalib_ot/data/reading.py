"""Reads images of any bit depth as tensors, in the format in which anomalib reads 8-bit images."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from anomalib.data.utils import read_image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as transforms

from anomalib_ot.images.reading import ValueRange, check_value_range, deep_values, naming_unreadable, scaled_values


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
    scaled = scaled_values(*found, value_range, path)
    channels = torch.from_numpy(np.atleast_3d(scaled).transpose(2, 0, 1).copy())
    return tv_tensors.Image(channels.expand(3, -1, -1).contiguous())
