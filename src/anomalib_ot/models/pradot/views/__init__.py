"""Views of Pradot: its prototypes, and which of them each cell of a picture is compared with."""

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
    """Training patches that are nearest to the prototypes."""
    return nearest_patches(subject.torch_model, subject.prepared(subject.data.training))


def _no_labels(subject: Subject) -> str:
    shown = subject.data.shown
    labels = labels_of(shown)
    if all(label is None for label in labels):
        return "which pictures are normal is not known; give the data module as data"
    # Cells of an anomalous picture are known by its mask alone.
    has_masks = hasattr(shown, "samples") and any(map(bool, shown.samples.get("mask_path", ())))
    return "" if has_masks or False in labels else "there are neither normal test pictures nor masks of anomalous ones"


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
        "From each cell of the picture to the place of the prototype that it is compared with, and what that costs.",
        _draw_assignments,
    ),
    "restoration": View(
        "The picture put together from the training patches of its prototypes; what cannot be restored is anomalous.",
        _draw_restoration,
        no_training,
    ),
}
MODEL_VIEWS = {
    "prototypes": View(
        "The training patches that are nearest to each prototype: what the model takes for normal, and where.",
        _draw_prototypes,
        no_training,
    ),
    "projection": View(
        "Cells of the pictures and prototypes in a plane, with neighbours where one costs little against the other.",
        _draw_projection,
        _no_labels,
    ),
    "cells": View("A page to go through the pictures cell by cell, for any weight of the place.", _write_cells),
}
