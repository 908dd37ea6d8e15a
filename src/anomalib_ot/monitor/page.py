"""The page of a monitor: the course of the martingale, the first images of the drift, and the places that changed."""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from anomalib_ot.data.reading import read_picture
from anomalib_ot.drawing.figures import embedded, new_figure, show_map
from anomalib_ot.drawing.html import Embedded, render_page
from anomalib_ot.images.reading import ValueRange

from .course import SCORE, Course, Seen, named

_CHANGED = 6
_SIDE = 220
# Images whose p-values are averaged.
_WINDOW = 25


def drift_page(course: Course, about: Mapping[str, Any], summary: str) -> str:
    """Render the page.

    Args:
        course: What the monitor has seen.
        about: Names of the ``model``, the ``checkpoint``, the ``data`` and the ``reference``, None for the calibration,
            and the ``value_range`` of deep images.
        summary: One line with the result.

    Returns:
        The page, which needs no other file.
    """
    maps = course.mean_maps()
    first, last = course.since()[:1], course.changed(_CHANGED)
    return render_page(
        "anomalib_ot.monitor",
        "drift",
        about=about,
        summary=summary,
        course=course,
        drifted=course.drifted or SCORE,
        named=named,
        curve=embedded(draw_course(course)) if course.seen else None,
        places=None if maps is None else embedded(draw_places(*maps)),
        first=[(each, _thumbnail(each, about["value_range"])) for each in first],
        changed=[(each, _thumbnail(each, about["value_range"])) for each in last],
    )


def draw_course(course: Course) -> Figure:
    """Draw the martingales on a logarithmic scale, and p-values with their running mean.

    The p-values are those of the quantity that raised the first alarm, or else of the scores.
    """
    figure = Figure(figsize=(10, 5), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True)
    numbers = np.arange(1, len(course.seen) + 1)
    for name, monitor in course.monitors.items():
        shares = [each.states[name].martingale / monitor.threshold for each in course.seen]
        upper.semilogy(numbers, shares, label=name if len(course.monitors) > 1 else None)
    upper.axhline(1, color="tab:red", linestyle="--", label="alarm")
    upper.set_ylabel("martingale / alarm")
    shown = course.drifted or SCORE
    values = np.array([each.states[shown].p_value for each in course.seen])
    lower.plot(numbers, values, ".", color="tab:gray", markersize=3)
    if len(values) >= _WINDOW:
        means = np.convolve(values, np.full(_WINDOW, 1 / _WINDOW), "valid")
        lower.plot(numbers[_WINDOW - 1 :], means, color="tab:blue", label=f"mean of {_WINDOW}")
    lower.set_ylim(0, 1)
    lower.set_ylabel(f"p-value of the {shown}")
    lower.set_xlabel("image")
    if began := course.since():
        for panel in (upper, lower):
            panel.axvline(began[0].states[shown].index + 1, color="black", linestyle=":", label="drift began")
    for panel in (upper, lower):
        if panel.get_legend_handles_labels()[1]:
            # Beside the panel, so that it hides nothing.
            panel.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
    return figure


def draw_places(before: Tensor, since: Tensor) -> Figure:
    """Draw mean maps (H, W) before the drift and since it began, on one scale, and their difference."""
    figure, ((first, second, third),) = new_figure(1, 3)
    limits = (float(min(before.min(), since.min())), float(max(before.max(), since.max())))
    show_map(first, before, "mean map before", limits)
    show_map(second, since, "mean map since the drift began", limits)
    show_map(third, since - before, "difference")
    return figure


def _thumbnail(seen: Seen, value_range: ValueRange | None) -> Embedded | None:
    """The image, or None if its file has been removed since."""
    with suppress(FileNotFoundError, ValueError):
        return Embedded.of(transforms.to_pil_image(read_picture(seen.path, value_range)), _SIDE)
    return None
