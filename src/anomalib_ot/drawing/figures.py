"""Figures of the views. They are not attached to a window, so views work in any thread and without a display."""

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from anomalib_ot.settings import require

from .html import Embedded

# One colour map for all scores, readable in greyscale and for colour-blind readers.
COLOURS = "inferno"
OUTLINE = "cyan"
# Two colours of the palette of Okabe and Ito, which colour-blind readers can tell apart.
BLUE, ORANGE = "#0072b2", "#d55e00"
FORMATS = ("png", "svg")
_ALLOWED_FORMATS = (*FORMATS, "pdf")
# Characters of a title that fit into an inch.
_PER_INCH = 13


def new_figure(rows: int, columns: int, title: str = "", side: float = 3.0) -> tuple[Figure, list[list[Axes]]]:
    """A figure of square panels without ticks.

    Args:
        rows: Number of rows.
        columns: Number of columns.
        title: Title of the figure, wrapped to its width.
        side: Width and height of a panel, in inches.

    Returns:
        The figure and its panels, row by row.
    """
    figure = Figure(figsize=(columns * side, rows * side), layout="constrained")
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(fill(title, int(columns * side * _PER_INCH)), fontsize="medium")
    panels = figure.subplots(rows, columns, squeeze=False)
    for panel in panels.flat:
        panel.set_xticks([])
        panel.set_yticks([])
    return figure, panels.tolist()


def show_image(panel: Axes, image: Tensor, title: str = "", mask: Tensor | None = None) -> None:
    """Show an RGB image (3, h, w) in [0, 1], with the outline of a Boolean mask (h, w)."""
    panel.imshow(image.permute(1, 2, 0).cpu().numpy(), interpolation="nearest")
    panel.set_title(title, fontsize="small")
    if mask is not None and mask.any() and not mask.all():
        panel.contour(mask.cpu().numpy().astype(np.float32), [0.5], colors=OUTLINE, linewidths=1)


def show_map(panel: Axes, values: Tensor, title: str = "", limits: tuple[float, float] | None = None) -> None:
    """Show scores (h, w) with a colour bar.

    Args:
        panel: The panel to draw on.
        values: The scores.
        title: Title of the panel.
        limits: Values of the darkest and the brightest colour; by default the smallest and the largest score.
    """
    low, high = limits or (None, None)
    shown = panel.imshow(values.cpu().numpy(), cmap=COLOURS, vmin=low, vmax=high, interpolation="nearest")
    panel.set_title(title, fontsize="small")
    figure = panel.get_figure()
    assert figure is not None  # noqa: S101 - a panel is part of a figure
    figure.colorbar(shown, ax=panel, shrink=0.8)


def embedded(figure: Figure, side: int | None = None) -> Embedded:
    """Render a figure for a page, reduced to a longest side in pixels if it is larger."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Embedded.of(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB"), side)


def require_formats(formats: Sequence[str]) -> None:
    """Refuse unknown formats of figures, and an empty list."""
    wrong = next((each for each in formats if each not in _ALLOWED_FORMATS), None)
    require(bool(formats) and wrong is None, "each of formats", _ALLOWED_FORMATS, wrong)


def save(figure: Figure, stem: Path, formats: Sequence[str] = FORMATS) -> list[Path]:
    """Write a figure in several formats.

    Args:
        figure: The figure.
        stem: Path without a suffix; missing folders are created.
        formats: Suffixes: ``svg`` and ``pdf`` for vector graphics, ``png`` for pixels.

    Returns:
        The files.
    """
    stem.parent.mkdir(parents=True, exist_ok=True)
    # The name may contain dots.
    paths = [stem.with_name(f"{stem.name}.{suffix}") for suffix in formats]
    for path in paths:
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    return paths
