"""Charts of a page, which the macro ``chart`` of ``chart.html`` draws as SVG."""

from collections.abc import Sequence
from dataclasses import dataclass

# Curves differ in colour and, for readers who cannot distinguish colours, in dashes.
_COLOURS = 8
_DASHES = ("none", "7 3", "2 2.5", "9 3 2 3")


@dataclass(frozen=True)
class Curve:
    """A curve of a chart.

    Args:
        label: Its name in the legend.
        points: Its points in the unit square, from (0, 0) at the lower left to (1, 1).
        index: Its place among the curves, from which its colour and dashes follow.
        value: Text beside the label.
    """

    label: str
    points: Sequence[tuple[float, float]]
    index: int
    value: str = ""

    @property
    def colour(self) -> int:
        """Number of its colour, that of the class ``c0``, …, ``c7`` in the style of the page."""
        return self.index % _COLOURS

    @property
    def dash(self) -> str:
        """Its dashes, as SVG's ``stroke-dasharray``: others where a colour returns."""
        return _DASHES[(self.index + self.index // _COLOURS) % len(_DASHES)]


@dataclass(frozen=True)
class Chart:
    """Curves over two axes, the horizontal and the vertical one.

    Args:
        title: Caption of the chart.
        description: What it shows, for readers who cannot see it.
        size: Lengths of the axes in pixels.
        labels: What the axes show.
        ticks: Two or more texts along each axis, at even distances from its lower end to its upper one.
        curves: The curves.
    """

    title: str
    description: str
    size: tuple[int, int]
    labels: tuple[str, str]
    ticks: tuple[Sequence[str], Sequence[str]]
    curves: Sequence[Curve]
