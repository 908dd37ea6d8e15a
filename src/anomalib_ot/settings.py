"""Checks of users' settings."""

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, cast

_SMALLEST, _LARGEST = 1e-18, 1e18
_LARGEST_SEED = 2**32 - 1
# Wider than any image, in pixels.
_WIDEST = 10_000


def require(condition: bool, name: str, allowed: object, value: object) -> None:
    """Check that a value is in range.

    Args:
        condition: Whether it is in range.
        name: Name of the argument.
        allowed: Description of the allowed values, or a tuple of them.
        value: The value.

    Raises:
        ValueError: If it is out of range.
    """
    if not condition:
        allowed = " or ".join(map(repr, allowed)) if isinstance(allowed, tuple) else allowed
        msg = f"{name} must be {allowed}, not {value!r}"
        raise ValueError(msg)


def require_whole(least: int, name: str, value: Any, most: int | None = None) -> None:
    """Check that a value is a whole number in a range.

    Args:
        least: Smallest allowed value.
        name: Name of the argument.
        value: The value.
        most: Largest allowed value, if the value determines the size of something; unlimited by default.

    Raises:
        ValueError: If it is out of range, is not whole, or is not a number.
    """
    is_whole = isinstance(value, Integral) and not isinstance(value, bool)
    allowed = f"at least {least}" if most is None else f"from {least} to {most}"
    require(value >= least and (most is None or value <= most), name, allowed, value)
    require(is_whole, name, f"{allowed} and whole", value)


def require_finite(condition: bool, name: str, allowed: str, value: object) -> None:
    """Check that a number is in an unbounded range, is finite, and has a square that single precision can represent.

    Args:
        condition: Whether it is in range.
        name: Name of the argument.
        allowed: Description of the allowed values.
        value: The value.

    Raises:
        ValueError: If it is out of range, is not finite, or its square overflows or underflows in single precision.
    """
    is_finite = isinstance(value, Real) and math.isfinite(value)
    require(condition, name, allowed, value)
    require(is_finite, name, f"{allowed} and finite", value)
    size = abs(float(cast("float", value)))
    require(size == 0 or _SMALLEST <= size <= _LARGEST, name, f"{allowed}, and between 1e-18 and 1e18 in size", value)


def require_image_size(image_size: Sequence[int]) -> None:
    """Refuse an image size that is not height and width, in pixels.

    Raises:
        ValueError: If there are not two numbers, or one is not whole or below 1.
    """
    require(len(image_size) == 2, "image_size", "height and width", image_size)  # noqa: PLR2004 - height and width
    for pixels in image_size:
        require_whole(1, "each of image_size", pixels)


def require_smoothing(smoothing: float) -> None:
    """Refuse a standard deviation, in pixels, that no Gaussian over an image has.

    Raises:
        ValueError: If it is negative or wider than any image.
    """
    require(0 <= smoothing <= _WIDEST, "smoothing", f"from 0 to {_WIDEST} pixels", smoothing)


def require_seed(seed: int) -> None:
    """Refuse a seed that Lightning does not accept.

    Raises:
        ValueError: If it is not a whole number in [0, 2³²).
    """
    require_whole(0, "seed", seed, _LARGEST_SEED)
