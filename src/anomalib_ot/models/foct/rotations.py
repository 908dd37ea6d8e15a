"""Views of an image, turned by equal angles."""

from math import ceil, hypot

import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transforms


def turned_views(images: Tensor, rotations: int) -> Tensor:
    """Turn images by equal angles about their centre, and cut off what leaves the frame.

    What lies beyond an edge is its mirror image, and beyond the far edge of that the next one, as often as it takes.

    Args:
        images: (K, C, h, w), floating point.
        rotations: Number of views, the first of which is the image itself.

    Returns:
        (K, rotations, C, h, w).
    """
    if rotations == 1:
        return images[:, None]
    height, width = images.shape[-2:]
    rows, columns = (_mirrored(side, _margin(side, height, width), images.device) for side in (height, width))
    # Half precision cannot tell the places of neighbouring pixels apart.
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
    """Pixels beyond either end of a side that a view at any angle may show: half the diagonal from the centre."""
    # A quarter is enough for a square. What is placed with another margin is rounded otherwise.
    return max(side // 4, ceil((hypot(height - 1, width - 1) - (side - 1)) / 2))


def _mirrored(side: int, margin: int, device: torch.device) -> Tensor:
    """Which pixel of a side is seen at each place from so many before its start to as many after its end."""
    period = max(2 * (side - 1), 1)
    places = torch.arange(-margin, side + margin, device=device) % period
    return torch.minimum(places, period - places)
