"""Views of Pradot: its prototypes, and the nearest one of each cell of an image."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from matplotlib.figure import Figure

from anomalib_ot.drawing.data import labels_of
from anomalib_ot.drawing.pictures import Picture
from anomalib_ot.drawing.views import Subject, View, no_training

from .assignments import draw_all_assignments, draw_assignments
from .cells import write_page
from .projection import Method, draw_projection
from .prototypes import NearestPatches, draw_prototypes, nearest_patches
from .restoration import draw_restoration

__all__ = [
    "MODEL_VIEWS",
    "PICTURE_VIEWS",
    "NearestPatches",
    "draw_all_assignments",
    "draw_assignments",
    "draw_projection",
    "draw_prototypes",
    "draw_restoration",
    "nearest_patches",
    "write_page",
]


def _patches(subject: Subject) -> dict[tuple[str, float], NearestPatches]:
    """The nearest training patch of each prototype."""
    return nearest_patches(subject.torch_model, subject.prepared(subject.data.training))


def _no_labels(subject: Subject) -> str:
    shown = subject.data.shown
    labels = labels_of(shown)
    if all(label is None for label in labels):
        return "it is not known which images are normal; give the data module as data"
    # Without a mask, the anomalous cells of an anomalous image are unknown.
    has_masks = hasattr(shown, "samples") and any(map(bool, shown.samples.get("mask_path", ())))
    return "" if has_masks or False in labels else "there are neither normal test images nor masks of anomalous ones"


def _draw_assignments(subject: Subject, picture: Picture) -> dict[str, Figure]:
    return {"assignments": draw_all_assignments(subject.torch_model, picture)}


def _draw_restoration(subject: Subject, picture: Picture) -> dict[str, Figure]:
    return {"restoration": draw_restoration(subject.torch_model, picture, subject.once(_patches))}


def _draw_prototypes(subject: Subject, pictures: Sequence[Picture], folder: Path) -> dict[str, Figure]:
    del pictures, folder
    found = subject.once(_patches)
    return {f"prototypes-{layer}-{alpha:g}": draw_prototypes(each) for (layer, alpha), each in found.items()}


def _draw_projection(subject: Subject, pictures: Sequence[Picture], folder: Path) -> dict[str, Figure]:
    del pictures, folder
    model = subject.torch_model
    method: Method = "umap" if find_spec("umap") else "tsne"
    return {
        f"projection-{layer}": draw_projection(model, subject.prepared(subject.data.shown), layer, method, subject.seed)
        for layer in model.layers
    }


def _write_cells(subject: Subject, pictures: Sequence[Picture], folder: Path) -> dict[str, Figure]:
    patches = subject.once(_patches) if subject.data.training else None
    write_page(subject.torch_model, pictures, folder / "cells.html", patches)
    return {}


PICTURE_VIEWS = {
    "assignments": View(
        "Arrows from each cell of the image to the position of its prototype, and their costs.",
        _draw_assignments,
    ),
    "restoration": View(
        "The image composed of the training patches of its prototypes; anomalies cannot be restored.",
        _draw_restoration,
        no_training,
    ),
}
MODEL_VIEWS = {
    "prototypes": View(
        "The nearest training patch of each prototype: what the model considers normal, and where.",
        _draw_prototypes,
        no_training,
    ),
    "projection": View(
        "Cells of the images and prototypes in two dimensions; neighbours have a low cost.",
        _draw_projection,
        _no_labels,
    ),
    "cells": View("A page to explore the images cell by cell, for any weight of the position.", _write_cells),
}
