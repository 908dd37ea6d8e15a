"""Defects that are made from one good image.

The kinds are those of CutPaste (Li et al., 2021, https://arxiv.org/abs/2104.04015) and of the comparison of models on
synthetic anomalies (SWSA, 2023, https://arxiv.org/abs/2310.10461), without a generative model: a patch of the image in
another place, scratches, stains, blur, and parts that are missing, exchanged or moved. anomalib's
``PerlinAnomalyGenerator`` draws from the random numbers of torch, and neither its area nor its contrast can be chosen.
"""

from collections.abc import Callable
from math import ceil, pi, sqrt
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from scipy import ndimage

from anomalib_ot.settings import require

from .shapes import Array, Mask, blob, draw_point, find_object, scratches

FEWEST_PIXELS = 4
"""Smallest number of pixels of a defect."""
# Draws of the place of a defect. The first that shows is taken.
_DRAWS = 8
# A pixel shows a defect of contrast 1 if a channel changes by more than this.
_VISIBLE = 8 / 255
# A defect shows if this share of its pixels does.
_SHOWS = 0.6
# Largest difference of the channels of a grey image.
_GREY = 2 / 255
_LARGEST_AREA = 0.5
_CHANNELS = 3
_DARK, _BRIGHT = 0.05, 0.95
# Standard deviation of the surroundings that fill a gap, as a share of its radius.
_REACH = 0.6
_LEAST_WEIGHT = 1e-6
# Distance that a part is moved, in its diameters.
_MOVE = (1.0, 2.5)
# Pairs of places of which the most different ones are exchanged.
_PAIRS = 5


class _Scene(NamedTuple):
    """An image (H, W, 3), the pixels (H, W) of its object, and the colour (3,) of the background, or None."""

    image: Array
    is_object: Mask
    background: Array | None


class _Change(NamedTuple):
    """The content (H, W, 3) that replaces the image, its coverage (H, W) in [0, 1] and its mask (H, W)."""

    content: Array
    coverage: Array
    mask: Mask


def synthetic_defect(
    image: Array, kind: str, area: float, contrast: float, random: Generator
) -> tuple[NDArray[np.float32], Mask]:
    """Make a defect in a good image.

    The defect lies on the object if the background is uniform. Of several places, the first is taken where the defect
    changes most of its pixels visibly.

    Args:
        image: Image (H, W, 3) in [0, 1].
        kind: One of ``KINDS``: ``cut_paste``, a patch of the image in another place; ``scratch``; ``stain``; ``blur``;
            ``missing``, a part that is replaced by its surroundings or by the background; ``exchanged``, two parts that
            swap places; ``moved``, a part in another place with a gap behind it.
        area: Share of the image that the mask covers, in (0, 0.5].
        contrast: Share of the change that is made, in (0, 1]: 1 replaces the pixels, less mixes them with those of the
            good image.
        random: Source of the place, the outline and the colours.

    Returns:
        The float32 image (H, W, 3) in [0, 1] and the mask (H, W) of the defect.

    Raises:
        ValueError: If the kind is unknown, the area or the contrast is out of range, the image is not (H, W, 3), or the
            area is less than four pixels of it.

    Example:
        >>> image = np.random.default_rng(0).random((64, 64, 3))
        >>> spoiled, mask = synthetic_defect(image, "stain", 0.01, 1.0, np.random.default_rng(1))
        >>> spoiled.shape, int(mask.sum())
        ((64, 64, 3), 41)
    """
    require(kind in _DEFECTS, "kind", KINDS, kind)
    require(0 < area <= _LARGEST_AREA, "area", f"above 0 and at most {_LARGEST_AREA}", area)
    require(0 < contrast <= 1, "contrast", "above 0 and at most 1", contrast)
    require(image.ndim == _CHANNELS and image.shape[2] == _CHANNELS, "image", "an array (H, W, 3)", image.shape)
    height, width = image.shape[:2]
    pixels = pixels_of(area, height * width)
    if pixels < FEWEST_PIXELS:
        msg = (
            f"an area of {area:g} is {pixels} pixels of an image of {height} x {width}, and a defect needs at least "
            f"{FEWEST_PIXELS}; choose a larger area or larger images"
        )
        raise ValueError(msg)
    scene = _Scene(image, *find_object(image))
    best: _Change | None = None
    most = 0.0
    for _ in range(_DRAWS):
        change = _DEFECTS[kind](scene, pixels, random)
        difference = change.coverage[change.mask, None] * (change.content - image)[change.mask]
        shown = float((np.abs(difference).max(1) > _VISIBLE).mean())
        if best is None or shown > most:
            best, most = change, shown
        if shown >= _SHOWS:
            break
    assert best is not None  # noqa: S101 - there is at least one draw
    spoiled = image + contrast * best.coverage[..., None] * (best.content - image)
    return spoiled.clip(0, 1).astype(np.float32), best.mask


def pixels_of(area: float, size: int) -> int:
    """Number of pixels of a defect that covers an area, as a share, of an image with this many pixels."""
    return round(area * size)


def _cut_paste(scene: _Scene, pixels: int, random: Generator) -> _Change:
    """A patch from another place of the object, turned, and a little brighter or darker."""
    shape = scene.image.shape[:2]
    coverage, mask = blob(scene.is_object, pixels, random)
    window, side = _window(coverage)
    top, left = (
        int(np.clip(place - side // 2, 0, max(0, size - side)))
        for place, size in zip(draw_point(scene.is_object, random), shape, strict=True)
    )
    patch = np.rot90(scene.image[top : top + side, left : left + side], int(random.integers(4)))
    content = scene.image.copy()
    target = content[window]
    rows, columns = (np.arange(size) % limit for size, limit in zip(target.shape[:2], patch.shape[:2], strict=True))
    content[window] = patch[np.ix_(rows, columns)] * random.uniform(0.7, 1.3)
    return _Change(content, coverage, mask)


def _scratch(scene: _Scene, pixels: int, random: Generator) -> _Change:
    """A dark line on bright ground, or a bright one on dark ground."""
    coverage, mask = scratches(scene.is_object, pixels, random)
    level = _DARK if scene.image[mask].mean() > (_DARK + _BRIGHT) / 2 else _BRIGHT
    return _Change(np.full_like(scene.image, level), coverage, mask)


def _stain(scene: _Scene, pixels: int, random: Generator) -> _Change:
    """A blot of one colour, grey in a grey image, of uneven thickness."""
    coverage, mask = blob(scene.is_object, pixels, random)
    uneven = ndimage.gaussian_filter(random.normal(size=mask.shape), max(1.0, sqrt(pixels) / 6))
    thickness = 0.75 + 0.25 * np.clip(uneven / (2 * uneven.std()), -1, 1)
    colour = random.uniform(0, 1, 3)
    if np.ptp(scene.image[mask], axis=1).max() <= _GREY:
        colour[:] = colour.mean()
    return _Change(np.broadcast_to(colour, scene.image.shape), coverage * thickness, mask)


def _blur(scene: _Scene, pixels: int, random: Generator) -> _Change:
    """A region out of focus."""
    coverage, mask = blob(scene.is_object, pixels, random)
    width = np.clip(_radius(pixels) / 3, 1.0, min(mask.shape) / 50)
    return _Change(ndimage.gaussian_filter(scene.image, (width, width, 0)), coverage, mask)


def _missing(scene: _Scene, pixels: int, random: Generator) -> _Change:
    """A part that is replaced by the background or by what surrounds it."""
    coverage, mask = blob(scene.is_object, pixels, random)
    if scene.background is not None and random.random() < 1 / 2:
        outside = ~scene.is_object
        grain = scene.image[outside][random.integers(outside.sum(), size=mask.shape)] - scene.background
        return _Change(scene.background + grain, coverage, mask)
    return _Change(_filled(scene.image, mask, random), coverage, mask)


def _exchanged(scene: _Scene, pixels: int, random: Generator) -> _Change:
    """Two parts of the same outline that swap places: of some pairs, the one whose parts differ most."""
    _, mask = blob(scene.is_object, pixels // 2, random)
    changes = []
    for _ in range(_PAIRS):
        shift = np.subtract(draw_point(scene.is_object, random), _middle(mask))
        there = _shifted(mask, shift)
        # The part must not leave the image, and its two places must not overlap.
        if there.sum() < mask.sum() or (mask & there).any():
            continue
        content = np.where(mask[..., None], _shifted(scene.image, -shift), scene.image)
        content[there] = _shifted(scene.image, shift)[there]
        difference = float(np.abs(content - scene.image)[mask].mean())
        changes.append((difference, _Change(content, mask | there, mask | there)))
    return max(changes, key=lambda each: each[0])[1] if changes else _cut_paste(scene, pixels, random)


def _moved(scene: _Scene, pixels: int, random: Generator) -> _Change:
    """A part in another place, with a gap behind it."""
    _, mask = blob(scene.is_object, pixels // 2, random)
    distance, direction = random.uniform(*_MOVE) * 2 * _radius(pixels / 2), random.uniform(0, 2 * pi)
    shift = np.rint([distance * np.sin(direction), distance * np.cos(direction)]).astype(int)
    there = _shifted(mask, shift)
    content = _filled(scene.image, mask, random)
    content[there] = _shifted(scene.image, shift)[there]
    both = mask | there
    return _Change(content, both, both)


def _filled(image: Array, mask: Mask, random: Generator) -> Array:
    """An image whose masked pixels are replaced by the mean of what surrounds them, with grain from elsewhere."""
    width = max(1.0, _REACH * _radius(int(mask.sum())))
    # Only what is near contributes.
    window = tuple(
        slice(max(0, each.start - ceil(3 * width)), each.stop + ceil(3 * width)) for each in _window(mask)[0]
    )
    around, gap = image[window], mask[window]
    weight = ndimage.gaussian_filter((~gap).astype(np.float64), width, truncate=6)
    weighted = ndimage.gaussian_filter(around * ~gap[..., None], (width, width, 0), truncate=6)
    grain = around - ndimage.gaussian_filter(around, (2, 2, 0))
    grain = np.roll(grain, tuple(random.integers(0, gap.shape)), (0, 1))
    filled = image.copy()
    filled[window][gap] = (weighted / weight.clip(_LEAST_WEIGHT)[..., None] + grain)[gap]
    return filled


def _window(coverage: NDArray) -> tuple[tuple[slice, slice], int]:
    """The bounding box of a region, and its longer side."""
    rows, columns = (np.flatnonzero(coverage.any(axis)) for axis in (1, 0))
    window = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    return window, int(max(np.ptp(rows), np.ptp(columns))) + 1


def _middle(mask: Mask) -> NDArray[np.intp]:
    return np.rint(np.argwhere(mask).mean(0)).astype(int)


def _shifted(values: NDArray, shift: NDArray) -> NDArray:
    """Values (H, W, …) moved by rows and columns; zeros enter at the edges."""
    moved = np.zeros_like(values)
    targets, sources = zip(
        *(_overlap(int(by), size) for by, size in zip(shift, values.shape[:2], strict=True)), strict=True
    )
    moved[targets] = values[sources]
    return moved


def _overlap(by: int, size: int) -> tuple[slice, slice]:
    return slice(max(by, 0), max(0, size + min(by, 0))), slice(max(-by, 0), max(0, size - max(by, 0)))


def _radius(pixels: float) -> float:
    """Radius of a disc of this many pixels."""
    return sqrt(pixels / pi)


_DEFECTS: dict[str, Callable[[_Scene, int, Generator], _Change]] = {
    "cut_paste": _cut_paste,
    "scratch": _scratch,
    "stain": _stain,
    "blur": _blur,
    "missing": _missing,
    "exchanged": _exchanged,
    "moved": _moved,
}
KINDS = tuple(_DEFECTS)
"""Kinds of synthetic defects."""
