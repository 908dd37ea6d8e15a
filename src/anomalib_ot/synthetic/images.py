"""Sets of good images with synthetic defects of all kinds, areas and contrasts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from anomalib_ot.images.reading import ValueRange, naming_unreadable, read_values
from anomalib_ot.settings import require, require_whole

from .defects import FEWEST_PIXELS, KINDS, pixels_of, synthetic_defect
from .shapes import Mask

AREAS = (0.001, 0.004, 0.016, 0.064)
"""Shares of the image that defects cover."""
CONTRASTS = (0.25, 0.5, 1.0)
"""Shares of the change that defects make."""
# Longest side in pixels: larger than the models' images, and small enough to hold hundreds.
_LONGEST = 512


@dataclass(frozen=True)
class SyntheticImage:
    """A good image with a synthetic defect.

    Attributes:
        path: File of the good image.
        kind: Kind of the defect, one of ``KINDS``.
        area: Share of the image that the defect covers.
        contrast: Share of the change that is made.
        image: float32 (H, W, 3) in [0, 1]; its longest side has at most 512 pixels.
        mask: (H, W), True on the defect.
    """

    path: Path
    kind: str
    area: float
    contrast: float
    image: NDArray[np.float32]
    mask: Mask


def possible_areas(paths: Sequence[Path], areas: Sequence[float] = AREAS) -> list[float]:
    """The areas that a defect can cover in each of some images; in small ones, the smaller areas have too few pixels.

    Args:
        paths: Files of good images. Their sizes are read, and not their pixels.
        areas: Shares of the image.

    Returns:
        Those of the areas that are possible, in the same order.

    Raises:
        ValueError: If an image cannot be read.
        FileNotFoundError: If a file does not exist.
    """
    fewest = min(prod(_reduced(_size_of(path))) for path in paths)
    return [area for area in areas if pixels_of(area, fewest) >= FEWEST_PIXELS]


def synthetic_images(
    paths: Sequence[Path],
    count: int,
    seed: int,
    kinds: Sequence[str] = KINDS,
    areas: Sequence[float] = AREAS,
    contrasts: Sequence[float] = CONTRASTS,
    value_range: ValueRange | None = None,
) -> Iterator[SyntheticImage]:
    """Make defects in good images, of each combination of kind, area and contrast equally often, one after another.

    Args:
        paths: Files of good images.
        count: Number of images to make. The combinations are drawn without replacement until all were drawn.
        seed: Seed of all draws. The same arguments give the same images.
        kinds: Kinds of defects.
        areas: Shares of the image.
        contrasts: Shares of the change.
        value_range: Values that map to black and white in images with more than 8 bits per channel.

    Yields:
        The images.

    Raises:
        ValueError: If there are no paths, an image cannot be read, is too small for an area, or an argument is out of
            range.
    """
    require(len(paths) > 0, "paths", "at least one good image", list(paths))
    require_whole(1, "count", count)
    every = list(product(kinds, areas, contrasts))
    sources = np.random.default_rng([seed, 0]).permutation(len(paths))
    for index in range(count):
        turn, place = divmod(index, len(every))
        order = np.random.default_rng([seed, 1, turn]).permutation(len(every))
        kind, area, contrast = every[order[place]]
        path = paths[sources[index % len(paths)]]
        random = np.random.default_rng([seed, 2, index])
        try:
            image, mask = synthetic_defect(read_reduced(path, value_range), kind, area, contrast, random)
        except ValueError as error:
            msg = f"no synthetic defect can be made in {path}: {error}"
            raise ValueError(msg) from error
        yield SyntheticImage(path, kind, area, contrast, image, mask)


def read_reduced(path: Path, value_range: ValueRange | None = None) -> NDArray[np.float32]:
    """Read an image, reduced so that its longest side has at most 512 pixels.

    Args:
        path: The file.
        value_range: Values that map to black and white in images with more than 8 bits per channel.

    Returns:
        float32 image (H, W, 3) in [0, 1].

    Raises:
        ValueError: If it cannot be read.
        FileNotFoundError: If the file does not exist.
    """
    values = read_values(path, value_range)
    whole = values.shape[1], values.shape[0]
    size = _reduced(whole)
    if size == whole:
        return values
    channels = [
        np.asarray(Image.fromarray(values[..., index]).resize(size, Image.Resampling.BOX)) for index in range(3)
    ]
    return np.stack(channels, axis=2).clip(0, 1)


def _size_of(path: Path) -> tuple[int, int]:
    with naming_unreadable(path), Image.open(path) as image:
        return image.size


def _reduced(size: tuple[int, int]) -> tuple[int, int]:
    """Width and height of an image whose longest side has at most 512 pixels."""
    factor = min(1.0, _LONGEST / max(size))
    width, height = (max(1, round(factor * side)) for side in size)
    return width, height
