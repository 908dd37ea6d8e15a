"""Views of Foct: where it sends the cells of a picture, and what its memory holds."""

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
    """The support pictures, None for those that are not among the training pictures."""
    return find_support(subject.torch_model, subject.prepared(subject.data.training))


def _no_support(subject: Subject) -> str:
    if all(subject.once(_support)):
        return ""
    return "the support pictures are not all among the training pictures; give the data module it was trained with"


def _not_online(subject: Subject) -> str:
    if not subject.torch_model.settings.online:
        return "only a Foct with online=True learns from what it scores"
    return "" if subject.data.shown else "there is no stream of pictures; give a data module or a folder as data"


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
        "Which cells of the support pictures the marked cell is sent to, and is thereby compared with.",
        _draw_transport,
    ),
}
MODEL_VIEWS = {
    "foreground": View(
        "What counts as the product in the support pictures, and the cells that the memory keeps.",
        _draw_foreground,
        _no_support,
    ),
    "growth": View(
        "The episodic memory over the pictures in their order, from an empty one.", _draw_growth, _not_online
    ),
}
