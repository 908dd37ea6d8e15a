"""Views of an image, rotated by equal angles."""

from math import ceil, hypot

import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transforms


def turned_views(images: Tensor, rotations: int) -> Tensor:
    """Rotate images by equal angles about their centre, and crop them to the frame.

    Beyond an edge, the image is mirrored, as many times as needed.

    Args:
        images: (K, C, h, w), floating point.
        rotations: Number of views. The first one is the image itself.

    Returns:
        (K, rotations, C, h, w).
    """
    if rotations == 1:
        return images[:, None]
    height, width = images.shape[-2:]
    rows, columns = (_mirrored(side, _margin(side, height, width), images.device) for side in (height, width))
    # Half precision cannot resolve the positions of neighbouring pixels.
    padded = images[..., rows[:, None], columns].float()
    return torch.stack(
        [
            transforms.center_crop(
                transforms.rotate(padded, 360 * i / rotations, InterpolationMode.BILINEAR), [height, width]
            ).to(images.dtype)
            for i in range(rotations)
        ],
        dim=1,
    )


def _margin(side: int, height: int, width: int) -> int:
    """Pixels beyond either end of a side that a view may show at any angle: half the diagonal from the centre."""
    # A quarter is enough for a square. Another margin would change the rounding of positions.
    return max(side // 4, ceil((hypot(height - 1, width - 1) - (side - 1)) / 2))


def _mirrored(side: int, margin: int, device: torch.device) -> Tensor:
    """Index of the pixel at each position, from ``margin`` pixels before the side to ``margin`` pixels after it."""
    period = max(2 * (side - 1), 1)
    places = torch.arange(-margin, side + margin, device=device) % period
    return torch.minimum(places, period - places)
