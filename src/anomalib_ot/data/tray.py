"""Images of a tray of parts, composed from the photographs in scikit-image's wheel.

Each of nine compartments contains one part. On a normal tray, every compartment contains the right part. A logical
anomaly puts intact parts in the wrong compartments or leaves one out. A structural anomaly damages one part.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageOps
from skimage import data as photographs

Box = tuple[float, float, float, float]
Array = NDArray[np.floating]

SIZE = 256
"""Height and width of an image, in pixels."""

_CENTRES = [(row, column) for row in (48, 128, 208) for column in (48, 128, 208)]
_HALF_COMPARTMENT = 37
# A compartment with the walls around it: large enough for a part and its shadow.
_HALF_WINDOW = 46
# Shapes are drawn larger by this factor and then reduced, to smooth their edges.
_OVERSAMPLING = 4
# A pixel belongs to a part that covers a larger share of it than this.
_COVERED = 0.5
# On parts below this mean level, of 255, a bright scratch is more visible than a dark one.
_DARK_LEVEL = 110
# Damage that covers a smaller share of a pixel is left out, so that a mask contains exactly the pixels that change.
_LEAST_COVERAGE = 0.1


@dataclass(frozen=True)
class Part:
    """A kind of part, and the crops of a photograph that show it.

    Attributes:
        photograph: Name of the photograph in ``skimage.data``.
        crops: Row, column and radius of each interchangeable crop, in pixels of the photograph.
        size: Side of the part, in pixels of the image.
        turn: Largest rotation, in degrees.
        outline: Ellipses whose union is the part, as boxes (left, top, right, bottom) in units of the crop; empty for
            a square tile.
        tint: Colours that replace black and white in a grey photograph.
    """

    photograph: str
    crops: tuple[tuple[int, int, int], ...]
    size: int = 56
    turn: float = 180.0
    outline: tuple[Box, ...] = ((0.0, 0.0, 1.0, 1.0),)
    tint: tuple[str, str] = ("black", "white")

    def cut_outs(self) -> list[Image.Image]:
        """Every crop as an RGBA image of ``size`` x ``size`` pixels, transparent outside the outline."""
        image = Image.fromarray(getattr(photographs, self.photograph)())
        image = ImageOps.colorize(image, *self.tint) if image.mode == "L" else image.convert("RGB")
        stencil = self._stencil()
        cut_outs = []
        for row, column, radius in self.crops:
            crop = image.crop((column - radius, row - radius, column + radius, row + radius))
            crop = crop.resize(stencil.size, Image.Resampling.LANCZOS)
            crop.putalpha(stencil)
            cut_outs.append(crop)
        return cut_outs

    def _stencil(self) -> Image.Image:
        side = self.size * _OVERSAMPLING
        stencil = Image.new("L", (side, side))
        draw = ImageDraw.Draw(stencil)
        for box in self.outline:
            draw.ellipse([side * edge for edge in box], fill=255)
        if not self.outline:
            draw.rounded_rectangle((0, 0, side, side), radius=side // 12, fill=255)
        return stencil.reduce(_OVERSAMPLING)


_TEXTURE = tuple((row, column, radius) for radius in (60, 90) for row in (130, 380) for column in (130, 380))
_COINS = ((51, 155, 22), (187, 347, 31), (193, 212, 23), (260, 46, 27), (263, 244, 23), (44, 335, 28))

PARTS = {
    "coin": Part("coins", _COINS, size=50, tint=("#1c140a", "#ffeecb")),
    "cup": Part(
        "coffee", ((204, 277, 203),), size=60, turn=20.0, outline=((0.0, 0.16, 1.0, 0.96), (0.24, 0.04, 0.82, 0.5))
    ),
    "turf": Part("grass", _TEXTURE, tint=("#0a1605", "#d9eea6")),
    "gravel": Part("gravel", _TEXTURE, tint=("#161310", "#f4ead9")),
    "cat": Part("chelsea", ((150, 205, 145), (140, 185, 130), (165, 222, 125)), size=52, turn=12.0, outline=()),
    "brick": Part("brick", _TEXTURE, size=52, turn=12.0, outline=(), tint=("#2a0e06", "#f2c3a4")),
    "tissue": Part("immunohistochemistry", ((110, 110, 90), (130, 150, 95), (120, 370, 95), (380, 80, 70))),
    "badge": Part("logo", ((250, 250, 236),)),
}
LAYOUT = ("coin", "cup", "turf", "gravel", "cat", "coin", "brick", "tissue", "badge")
"""The part that belongs in each compartment, row by row."""


@dataclass(frozen=True)
class Placement:
    """A part and its pose in a compartment.

    Attributes:
        part: Key into ``PARTS``.
        crop: Index of the part's crop.
        shift: Offset from the compartment's centre in rows and columns, in pixels.
        angle: Rotation, in degrees.
        gain: Brightness relative to the photograph.
    """

    part: str
    crop: int
    shift: tuple[int, int]
    angle: float
    gain: float


Placements = dict[int, Placement]
"""The part in each compartment; empty compartments are left out."""


class Tray:
    """Draws normal and anomalous images of the tray.

    Args:
        seed: Seed of all images, at least 0.

    Example:
        >>> tray = Tray(seed=0)
        >>> image, masks = tray.picture((0, 0), "swapped_part")
        >>> image.shape, image.dtype.name, [mask.shape for mask in masks]
        ((256, 256, 3), 'uint8', [(256, 256), (256, 256)])
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self._cut_outs = {name: part.cut_outs() for name, part in PARTS.items()}
        self._empty = _empty_tray()

    def picture(
        self, key: Sequence[int], defect: str | None = None
    ) -> tuple[NDArray[np.uint8], list[NDArray[np.bool_]]]:
        """Draw one image.

        The normal and the anomalous images of a key differ in the defect only.

        Args:
            key: Non-negative integers that identify the image among those of the seed.
            defect: Key into ``LOGICAL_ANOMALIES`` or ``STRUCTURAL_ANOMALIES``; ``None`` for a normal image.

        Returns:
            The RGB image (256, 256, 3), and one mask (256, 256) for each place that the defect affects.

        Raises:
            ValueError: If the defect is unknown.
        """
        layout, camera, damage = (
            np.random.default_rng(seed) for seed in np.random.SeedSequence([self.seed, *key]).spawn(3)
        )
        placements = {compartment: _lay(part, layout) for compartment, part in enumerate(LAYOUT)}
        scene, outlines = self._compose(placements)
        masks = []
        if defect in LOGICAL_ANOMALIES:
            changed, compartments = LOGICAL_ANOMALIES[defect](placements, damage)
            scene, changed_outlines = self._compose(changed)
            # The part in the wrong place, or the part that is missing.
            masks = [changed_outlines.get(i, outlines[i]) > _COVERED for i in compartments]
        elif defect in STRUCTURAL_ANOMALIES:
            outline = outlines[int(damage.integers(len(LAYOUT)))]
            coverage, colour = STRUCTURAL_ANOMALIES[defect](scene, outline, damage)
            coverage = np.where(coverage * outline >= _LEAST_COVERAGE, coverage * outline, 0)
            scene = _overlay(scene, coverage, colour)
            masks = [coverage > 0]
        elif defect is not None:
            msg = f"unknown defect {defect!r}; choose from {', '.join([*LOGICAL_ANOMALIES, *STRUCTURAL_ANOMALIES])}"
            raise ValueError(msg)
        return _expose(scene, camera), masks

    def _compose(self, placements: Placements) -> tuple[Array, dict[int, Array]]:
        """The scene (256, 256, 3), in [0, 255], and the outline (256, 256) of each part in it, in [0, 1]."""
        scene = self._empty.copy()
        outlines = {}
        for compartment, placement in placements.items():
            row, column = _CENTRES[compartment]
            window = np.s_[row - _HALF_WINDOW : row + _HALF_WINDOW, column - _HALF_WINDOW : column + _HALF_WINDOW]
            layer = self._layer(placement)
            shadow = ImageChops.offset(layer.getchannel("A").filter(ImageFilter.GaussianBlur(2.5)), 2, 3)
            shaded = scene[window] * (1 - 0.6 * _coverage(shadow))[..., None]
            outline = _coverage(layer.getchannel("A"))
            scene[window] = _overlay(shaded, outline, placement.gain * np.asarray(layer, np.float32)[..., :3])
            outlines[compartment] = np.zeros((SIZE, SIZE), np.float32)
            outlines[compartment][window] = outline
        return scene, outlines

    def _layer(self, placement: Placement) -> Image.Image:
        """The part in its pose within the window, RGBA."""
        image = self._cut_outs[placement.part][placement.crop]
        image = image.rotate(placement.angle, Image.Resampling.BICUBIC, expand=True)
        layer = Image.new("RGBA", (2 * _HALF_WINDOW, 2 * _HALF_WINDOW))
        row, column = placement.shift
        layer.paste(image, (_HALF_WINDOW + column - image.width // 2, _HALF_WINDOW + row - image.height // 2))
        return layer


def _empty_tray() -> Array:
    """A wooden tray with nine compartments lined with felt, lit from the upper left."""
    walls = Image.new("L", (SIZE, SIZE), 255)
    for row, column in _CENTRES:
        box = (column - _HALF_COMPARTMENT, row - _HALF_COMPARTMENT, column + _HALF_COMPARTMENT, row + _HALF_COMPARTMENT)
        ImageDraw.Draw(walls).rounded_rectangle(box, radius=3, fill=0)
    felt = ImageOps.colorize(Image.fromarray(photographs.moon()), "black", "#a9bfd2").crop((0, 275, 180, 455))
    wood = Image.fromarray(photographs.coffee()).crop((490, 110, 600, 400))
    wall = _coverage(walls)
    shadow = np.roll(_coverage(walls.filter(ImageFilter.GaussianBlur(3))), (4, 3), (0, 1))
    bevel = np.roll(wall, (-1, -1), (0, 1)) - np.roll(wall, (1, 1), (0, 1))
    scene = np.asarray(felt.resize(walls.size), np.float32) * (1 - 0.5 * shadow)[..., None]
    return _overlay(scene, wall, np.asarray(wood.resize(walls.size), np.float32) + 45 * bevel[..., None])


def _lay(part: str, rng: Generator) -> Placement:
    return Placement(
        part,
        crop=int(rng.integers(len(PARTS[part].crops))),
        shift=(int(rng.integers(-6, 7)), int(rng.integers(-6, 7))),
        angle=rng.uniform(-1, 1) * PARTS[part].turn,
        gain=rng.uniform(0.8, 1.15),
    )


def _expose(scene: Array, rng: Generator) -> NDArray[np.uint8]:
    """Photograph the scene, with uneven light of random strength and sensor noise."""
    ramp = np.linspace(-1, 1, SIZE)
    light = rng.uniform(0.92, 1.08) + rng.uniform(-0.08, 0.08) * ramp + rng.uniform(-0.08, 0.08) * ramp[:, None]
    image = scene * light[..., None] + rng.normal(0, 3, scene.shape)
    return image.round().clip(0, 255).astype(np.uint8)


def _swap_parts(placements: Placements, rng: Generator) -> tuple[Placements, list[int]]:
    """Exchange two parts of different kinds."""
    i, j = _compartments_of_two_kinds(rng)
    return placements | {i: placements[j], j: placements[i]}, [i, j]


def _remove_part(placements: Placements, rng: Generator) -> tuple[Placements, list[int]]:
    i = int(rng.integers(len(LAYOUT)))
    return {compartment: placement for compartment, placement in placements.items() if compartment != i}, [i]


def _duplicate_part(placements: Placements, rng: Generator) -> tuple[Placements, list[int]]:
    """Put a second part of one kind where a part of another kind belongs."""
    i, j = _compartments_of_two_kinds(rng)
    return placements | {i: _lay(LAYOUT[j], rng)}, [i]


def _compartments_of_two_kinds(rng: Generator) -> tuple[int, int]:
    pairs = [(i, j) for i, part in enumerate(LAYOUT) for j, other in enumerate(LAYOUT) if part != other]
    return pairs[int(rng.integers(len(pairs)))]


def _scratch(scene: Array, outline: Array, rng: Generator) -> tuple[Array, Array]:
    """A slightly bent line across the part: dark on a bright part, bright on a dark one."""
    direction = rng.uniform(0, np.pi)
    along = np.array([np.cos(direction), np.sin(direction)])
    across = np.array([-along[1], along[0]])
    steps = np.linspace(-1, 1, 12)[:, None]
    points = _middle(outline, rng) + steps * rng.uniform(16, 24) * along + (1 - steps**2) * rng.uniform(-5, 5) * across
    image = Image.new("L", (SIZE * _OVERSAMPLING, SIZE * _OVERSAMPLING))
    width = round(rng.uniform(1.8, 2.6) * _OVERSAMPLING)
    ImageDraw.Draw(image).line([tuple(point) for point in points * _OVERSAMPLING], fill=255, width=width, joint="curve")
    brightness = scene[outline > _COVERED].mean()
    colour = np.full(3, 30 if brightness > _DARK_LEVEL else 235, np.float32)
    return 0.9 * _coverage(image.reduce(_OVERSAMPLING)), colour


def _stain(_scene: Array, outline: Array, rng: Generator) -> tuple[Array, Array]:
    """A translucent blot of violet ink."""
    image = Image.new("L", (SIZE, SIZE))
    for x, y in _middle(outline, rng) + rng.normal(0, 3.5, (6, 2)):
        width, height = rng.uniform(3, 6.5, 2)
        ImageDraw.Draw(image).ellipse((x - width, y - height, x + width, y + height), fill=255)
    return 0.75 * _coverage(image.filter(ImageFilter.GaussianBlur(1))), np.array([38, 20, 92], np.float32)


def _chip(_scene: Array, outline: Array, rng: Generator) -> tuple[Array, Array]:
    """A dark gap where a piece has broken off the edge."""
    edge = np.argwhere((outline > 0) & (outline < 1))
    row, column = edge[rng.integers(len(edge))]
    angles = np.linspace(0, 2 * np.pi, 11)[:-1]
    radii = rng.uniform(8, 13, 10)
    corners = np.stack([column + radii * np.cos(angles), row + radii * np.sin(angles)], axis=1)
    image = Image.new("L", (SIZE * _OVERSAMPLING, SIZE * _OVERSAMPLING))
    ImageDraw.Draw(image).polygon([tuple(corner) for corner in corners * _OVERSAMPLING], fill=255)
    return _coverage(image.reduce(_OVERSAMPLING)), np.array([22, 23, 26], np.float32)


def _middle(outline: Array, rng: Generator) -> NDArray[np.float64]:
    """A point (x, y) near the middle of a part."""
    return np.argwhere(outline > _COVERED).mean(0)[::-1] + rng.uniform(-9, 9, 2)


def _coverage(image: Image.Image) -> Array:
    return np.asarray(image, np.float32) / 255


def _overlay(scene: Array, coverage: Array, colour: Array) -> Array:
    return scene + coverage[..., None] * (colour - scene)


# Each maps the normal placements to the anomalous ones and the affected compartments.
LOGICAL_ANOMALIES = {"swapped_part": _swap_parts, "missing_part": _remove_part, "duplicated_part": _duplicate_part}
# Each maps the scene and the outline of the part to the damage: its coverage (256, 256) in [0, 1] and its colour (3,).
STRUCTURAL_ANOMALIES = {"scratch": _scratch, "stain": _stain, "chip": _chip}
