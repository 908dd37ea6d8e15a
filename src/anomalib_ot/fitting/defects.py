"""The part of the page about synthetic defects: what they look like, and which the model detects."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
from PIL import Image

from anomalib_ot.drawing.charts import Chart, Curve
from anomalib_ot.drawing.html import Embedded
from anomalib_ot.edge.drawing import drawn_on
from anomalib_ot.images.reading import ValueRange, read_values
from anomalib_ot.selection import Trial
from anomalib_ot.synthetic import AREAS, KINDS, synthetic_defect
from anomalib_ot.synthetic.defects import FEWEST_PIXELS, pixels_of

# Side of an example in pixels, and the largest area of its defect.
_SIDE = 180
_LARGEST = 0.016


@dataclass(frozen=True)
class Example:
    """An image with a synthetic defect, or without one.

    Args:
        kind: Kind of the defect.
        image: The image, with the outline of the defect.
    """

    kind: str
    image: Embedded


@dataclass(frozen=True)
class Defects:
    """What the page says of synthetic defects.

    Args:
        about: Sentences about them.
        examples: An image without a defect and with each kind; empty if the images are too small for defects.
        about_examples: A sentence about these.
        areas: Areas of the defects, smallest first.
        chart: Detected shares by area, a curve for each contrast; None for fewer than two areas.
        rows: The same in percent: the contrast and the share of each area.
    """

    about: str
    examples: list[Example]
    about_examples: str
    areas: list[str]
    chart: Chart | None
    rows: list[list[str]]


def defects_of(trial: Trial, image: Path, seed: int, value_range: ValueRange | None = None) -> Defects:
    """What the page says of the synthetic defects of a trial.

    Args:
        trial: The trial.
        image: A good image to draw examples on.
        seed: Seed of the examples.
        value_range: Values that map to black and white in images with more than 8 bits per channel.
    """
    areas = sorted({each.area for each in trial.detection})
    shares = {(each.contrast, each.area): each.share for each in trial.detection}
    contrasts = sorted({contrast for contrast, _ in shares}, reverse=True)
    columns = [f"{100 * area:g} %" for area in areas]
    rows = {f"{contrast:g}": [shares.get((contrast, area)) for area in areas] for contrast in contrasts}
    picture = _reduced(image, value_range)
    possible = [area for area in areas if pixels_of(area, prod(picture.size)) >= FEWEST_PIXELS]
    shown = max((area for area in possible if area <= _LARGEST), default=max(possible, default=0.0))
    return Defects(
        about=_about(trial, areas),
        examples=_examples(picture, shown, seed) if possible else [],
        about_examples=f"Defects of {100 * shown:g} % of the image, at contrast 1. The outline is no part of them.",
        areas=columns,
        chart=_chart(columns, rows) if len(columns) > 1 else None,
        rows=[[contrast, *map(_percent, row)] for contrast, row in rows.items()],
    )


def in_words(kind: str) -> str:
    """A kind of synthetic defects in words."""
    return kind.replace("_", " ")


def _about(trial: Trial, areas: Sequence[float]) -> str:
    if not areas:
        return (
            "The images are too small to draw defects on them, so it is not known from which size on the model detects "
            "one. Try it on images of real defects."
        )
    left_out = [f"{100 * area:g} %" for area in AREAS if area not in areas]
    ending = (
        f" Defects of {' and '.join(left_out)} of the image are left out, as the images are too small for them."
        if left_out
        else ""
    )
    count = min(each.count for each in trial.detection)
    return (
        "Shares of the defects drawn on good images that are rejected at "
        f"{100 * trial.false_alarm_rate:.2g} % false alarms, a rate that the held-out images support; at "
        "another rate, the shares differ. Contrast 1 is the full change, such as another part in its place. Each share "
        f"is of {count} images or more.{ending}"
    )


def _chart(areas: Sequence[str], rows: Mapping[str, Sequence[float | None]]) -> Chart:
    """Shares over areas, with a curve for each contrast."""
    last = len(areas) - 1
    curves = [
        Curve(f"contrast {contrast}", [(at / last, share) for at, share in enumerate(row) if share is not None], index)
        for index, (contrast, row) in enumerate(rows.items())
    ]
    return Chart(
        "Detected synthetic defects by the share of the image that they cover; the table has the numbers",
        "Detected share over the area of the defects, a line for each contrast",
        (320, 180),
        ("area of the defect, as a share of the image", ""),
        (areas, [f"{percent} %" for percent in range(0, 101, 25)]),
        curves,
    )


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f}"


def _reduced(path: Path, value_range: ValueRange | None) -> Image.Image:
    picture = Image.fromarray(np.rint(255 * read_values(path, value_range)).astype(np.uint8))
    picture.thumbnail((_SIDE, _SIDE))
    return picture


def _examples(picture: Image.Image, area: float, seed: int) -> list[Example]:
    good = np.asarray(picture, np.float32) / 255
    examples = [Example("no defect", Embedded.of(picture))]
    for index, kind in enumerate(KINDS):
        spoiled, mask = synthetic_defect(good, kind, area, 1.0, np.random.default_rng([seed, index]))
        examples.append(Example(in_words(kind), Embedded.of(drawn_on(spoiled, None, mask))))
    return examples
