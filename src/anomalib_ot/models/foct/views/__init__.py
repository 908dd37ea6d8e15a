"""Views of Foct: the transport of an image's cells, and the contents of its memory."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from anomalib_ot.drawing.pictures import Picture
from anomalib_ot.drawing.views import Subject, View

from .memory import Growth, draw_foreground, draw_growth, draw_transport, find_support, memory_growth

__all__ = [
    "MODEL_VIEWS",
    "PICTURE_VIEWS",
    "Growth",
    "draw_foreground",
    "draw_growth",
    "draw_transport",
    "find_support",
    "memory_growth",
]


def _support(subject: Subject) -> list[Picture | None]:
    """The support images; None for those that are not among the training images."""
    return find_support(subject.torch_model, subject.prepared(subject.data.training))


def _no_support(subject: Subject) -> str:
    if all(subject.once(_support)):
        return ""
    return "some support images are not among the training images; give the data module of the training"


def _not_online(subject: Subject) -> str:
    if not subject.torch_model.settings.online:
        return "only a Foct with online=True learns from the images that it scores"
    return "" if subject.data.shown else "there is no stream of images; give a data module or a folder as data"


def _draw_transport(subject: Subject, picture: Picture) -> dict[str, Figure]:
    return {"transport": draw_transport(subject.torch_model, picture, subject.once(_support), subject.pixel)}


def _draw_foreground(subject: Subject, pictures: Sequence[Picture], folder: Path) -> dict[str, Figure]:
    del pictures, folder
    support = [each for each in subject.once(_support) if each is not None]
    model: Any = subject.model
    return {"foreground": draw_foreground(subject.torch_model, support, model.foreground)}


def _draw_growth(subject: Subject, pictures: Sequence[Picture], folder: Path) -> dict[str, Figure]:
    del pictures, folder
    return {"growth": draw_growth(memory_growth(subject.torch_model, subject.prepared(subject.data.shown)))}


PICTURE_VIEWS = {
    "transport": View(
        "Cells of the support images to which the transport sends the marked cell, and with which it is compared.",
        _draw_transport,
    ),
}
MODEL_VIEWS = {
    "foreground": View(
        "Foreground of the support images, and the cells that the memory keeps.",
        _draw_foreground,
        _no_support,
    ),
    "growth": View(
        "Growth of the episodic memory over the images in their order, from an empty one.", _draw_growth, _not_online
    ),
}
