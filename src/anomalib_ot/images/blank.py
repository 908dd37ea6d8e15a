"""Images that show little or nothing."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

WHITE = 1 - 0.5 / 255
"""Smallest value that counts as white, to within half a level of 8 bits, where white is 1."""
# Share of the pixels. Of the measured images, bottles on a lit background have a third.
_ALL_OVER = 0.99
# 12 bits in a 16-bit file reach a sixteenth; the brightest pixel of the darkest measured image reaches a quarter.
_DARK = 1 / 8
# In levels of 8 bits. The most uniform of the measured images spans 74 levels, and 25 at 64 px.
_ONE_COLOUR = 2 / 255
# Stride of the pixels that are checked first.
_STRIDE = 4


def blank_images(images: Any, to_numpy: Callable[[Any], NDArray[np.float32]] = np.asarray) -> dict[int, str]:
    """Find images without content.

    Args:
        images: Images (B, 3, H, W) in [0, 1], as an array or a tensor.
        to_numpy: Turns a part of them into an array.

    Returns:
        What is wrong, by index of the image.
    """
    # A few pixels suffice to clear most images.
    suspects = _judge(to_numpy(images[..., ::_STRIDE, ::_STRIDE]))
    return {index: what for index in suspects for what in _judge(to_numpy(images[index : index + 1])).values()}


def _judge(images: NDArray[np.float32]) -> dict[int, str]:
    verdicts = {
        "white all over": (images.min(1) >= WHITE).mean((1, 2)) >= _ALL_OVER,
        "of one colour": (images.max((2, 3)) - images.min((2, 3))).max(1) < _ONE_COLOUR,
        "darker than an eighth of white all over": images.max((1, 2, 3)) < _DARK,
    }
    return {
        int(index): next(what for what, bad in verdicts.items() if bad[index])
        for index in np.stack([*verdicts.values()]).any(0).nonzero()[0]
    }
