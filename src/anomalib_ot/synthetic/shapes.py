"""Where a synthetic defect lies, and its outline."""

from math import ceil, pi, sqrt

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage

Array = NDArray[np.floating]
Mask = NDArray[np.bool_]
Point = tuple[int, int]

# Share of the shorter side that counts as the border.
_BORDER = 0.02
# An object differs from the colour of the border by at least this, by this multiple of how much the border itself
# varies, and by more than shadows: this share of the largest difference.
_DIFFERS, _VARIES, _SHADOW = 0.06, 2.0, 0.2
# Gaps up to twice this share of the shorter side belong to the object.
_GAP = 0.015
# With a smaller or larger share of the pixels, there is no object on a background, but a surface.
_OBJECT_SHARE = 0.08, 0.9
# Width of a soft edge, in pixels.
_EDGE = 1.5
# Harmonics of an outline, and their amplitude.
_HARMONICS, _AMPLITUDE = 6, 0.5
_ELONGATION = 2.5
_SMALLEST_RADIUS = 0.35
# Length of a scratch, as shares of the shorter side, and its largest width.
_LENGTH, _WIDTH = (0.15, 0.6), 0.008
_BEND = 0.15
# A defect stays within a connected part of the object if it covers at most this share of it.
_SHARE_WITHIN = 0.7


def find_object(image: Array) -> tuple[Mask, Array | None]:
    """Find the object on a uniform background.

    Args:
        image: Image (H, W, 3) in [0, 1].

    Returns:
        The object's pixels (H, W), and the colour (3,) of the background. All pixels and None if the image shows a
        surface, or a scene whose border is not uniform.
    """
    side = min(image.shape[:2])
    width = max(1, round(_BORDER * side))
    strips = (image[:width], image[-width:], image[:, :width], image[:, -width:])
    border = np.concatenate([strip.reshape(-1, 3) for strip in strips])
    colour = np.median(border, axis=0)
    varies = np.quantile(np.abs(border - colour).max(1), 0.9)
    difference = ndimage.gaussian_filter(np.abs(image - colour).max(2), side / 200)
    least = max(_DIFFERS, _VARIES * varies, _SHADOW * difference.max())
    closed = ndimage.binary_closing(difference > least, iterations=max(1, round(_GAP * side)))
    found: Mask = ndimage.binary_fill_holes(closed)
    fewest, most = _OBJECT_SHARE
    return (found, colour) if fewest <= found.mean() <= most else (np.ones_like(found), None)


def draw_point(mask: Mask, random: Generator) -> Point:
    """Row and column of a random pixel of a mask, which has at least one."""
    chosen = int(random.choice(np.flatnonzero(mask)))
    return divmod(chosen, mask.shape[1])


def blob(within: Mask, pixels: int, random: Generator) -> tuple[Array, Mask]:
    """A compact region with an irregular outline.

    Args:
        within: Pixels (H, W) that it may cover. It stays in a connected part of them that is large enough.
        pixels: Number of pixels of the mask.
        random: Source of the place and the outline.

    Returns:
        Coverage (H, W) in [0, 1] with a soft edge, and the mask (H, W).
    """
    centre, within = _draw_part(within, random)
    rows, columns = np.ogrid[: within.shape[0], : within.shape[1]]
    angle, elongation = random.uniform(0, pi), random.uniform(1, _ELONGATION)
    down, right = rows - centre[0], columns - centre[1]
    along = (np.cos(angle) * right + np.sin(angle) * down) / sqrt(elongation)
    across = (np.cos(angle) * down - np.sin(angle) * right) * sqrt(elongation)
    direction = np.arctan2(across, along)
    radius = np.ones_like(direction)
    for harmonic in range(2, _HARMONICS):
        amplitude = random.normal(0, _AMPLITUDE / harmonic)
        radius += amplitude * np.cos(harmonic * direction + random.uniform(0, 2 * pi))
    return _nearest(np.hypot(along, across) / radius.clip(_SMALLEST_RADIUS), within, pixels)


def scratches(within: Mask, pixels: int, random: Generator) -> tuple[Array, Mask]:
    """A bent line; several nearly parallel ones if one of this area would be too wide.

    Args:
        within: As for :func:`blob`.
        pixels: Number of pixels of the mask.
        random: Source of the place and the lines.

    Returns:
        As for :func:`blob`.
    """
    centre, within = _draw_part(within, random)
    shape = within.shape
    side = min(shape)
    length = min(random.uniform(*_LENGTH) * side, max(2.0, pixels / _EDGE))
    widest = max(2.0, _WIDTH * side)
    angle = random.uniform(0, pi)
    lines = Image.new("1", (shape[1], shape[0]))
    steps = np.linspace(-1, 1, 12)[:, None]
    count = ceil(pixels / (length * widest))
    for _ in range(count):
        turned = angle + random.normal(0, 0.1)
        along = np.array([np.cos(turned), np.sin(turned)])
        across = np.array([-along[1], along[0]])
        offset = random.normal(0, 0.3 * length, 2) if count > 1 else np.zeros(2)
        middle = np.array([centre[1], centre[0]]) + offset
        bend = random.uniform(-_BEND, _BEND) * length
        points = middle + steps * length / 2 * along + (1 - steps**2) * bend * across
        ImageDraw.Draw(lines).line([(float(x), float(y)) for x, y in points], fill=1)
    drawn = np.asarray(lines)
    return _nearest(ndimage.distance_transform_edt(~drawn), within, pixels)


def _draw_part(within: Mask, random: Generator) -> tuple[Point, Mask]:
    """A random pixel of a mask, and the connected part of the mask around it."""
    point = draw_point(within, random)
    parts, _ = ndimage.label(within)
    return point, parts == parts[point]


def _nearest(distance: Array, within: Mask, pixels: int) -> tuple[Array, Mask]:
    """The given number of pixels with the smallest distance, with a soft edge."""
    if pixels <= _SHARE_WITHIN * within.sum():
        distance = np.where(within, distance, np.inf)
    order = np.argpartition(distance, pixels - 1, axis=None)[:pixels]
    mask = np.zeros(distance.shape, dtype=bool)
    mask.flat[order] = True
    return np.clip(1 - ndimage.distance_transform_edt(~mask) / _EDGE, 0, 1), mask
