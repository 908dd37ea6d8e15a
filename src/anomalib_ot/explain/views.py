"""All views by name, and what they are drawn from."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from anomalib.models.components import AnomalibModule
from matplotlib.figure import Figure

from anomalib_ot.drawing.pictures import Picture, pictures_of
from anomalib_ot.models import Foct, Pradot, WtFlow
from anomalib_ot.models.foct.views.memory import (
    draw_foreground,
    draw_growth,
    draw_transport,
    find_support,
    memory_growth,
)
from anomalib_ot.models.pradot.views.assignments import draw_all_assignments
from anomalib_ot.models.pradot.views.cells import write_page
from anomalib_ot.models.pradot.views.projection import Method, draw_projection
from anomalib_ot.models.pradot.views.prototypes import NearestPatches, draw_prototypes, nearest_patches
from anomalib_ot.models.pradot.views.restoration import draw_restoration
from anomalib_ot.models.wt_flow.views.flow import draw_flow, ways_of

from .data import Data, Items, labels_of, paths_of
from .evidence import Evidence, NormalScores, draw_evidence, evidence_of

# Normal pictures that the flow of a picture is drawn beside.
_BESIDE = 8
# A p-value would compare what the model knows with what it does not.
_TRAINED_ON = NormalScores(why_none="no p-value, as the model was trained on this picture")


class Subject:
    """A fitted model, and the pictures that its views are drawn from.

    Args:
        model: A fitted model of ours.
        data: The pictures.
        normal: Scores of its normal pictures that are held out.
        seed: Seed of what is drawn at random.
        pixel: Pixel of a picture whose transport is drawn, from the left and from the top, as the model sees it; by
            default the highest of its map.
    """

    def __init__(
        self,
        model: AnomalibModule,
        data: Data,
        normal: NormalScores | None = None,
        seed: int = 0,
        pixel: tuple[float, float] | None = None,
    ) -> None:
        self.model = model.eval()
        # Which class it is of, the table of views says.
        self.torch_model: Any = model.model
        self.data = data
        self.normal = normal or NormalScores()
        self.seed = seed
        self.pixel = pixel

    def prepared(self, items: Items) -> Iterator[Picture]:
        """Pictures as the model sees them, one by one."""
        # A data set of torch has no iterator that ends.
        return pictures_of(self.model, (items[index] for index in range(len(items))))

    def evidence(self, picture: Picture) -> Evidence:
        """The evidence for or against a picture."""
        is_trained_on = picture.path in self.training_paths
        return evidence_of(self.model, picture, _TRAINED_ON if is_trained_on else self.normal)

    @cached_property
    def training_paths(self) -> set[str]:
        """Files of the training pictures."""
        return {*paths_of(self.data.training)}

    @cached_property
    def patches(self) -> dict[tuple[str, float], NearestPatches]:
        """Training patches that are nearest to Pradot's prototypes."""
        return nearest_patches(self.torch_model, self.prepared(self.data.training))

    @cached_property
    def support(self) -> list[Picture | None]:
        """Foct's support pictures, None for those that are not among the training pictures."""
        return find_support(self.torch_model, self.prepared(self.data.training))

    @cached_property
    def normal_pictures(self) -> list[Picture]:
        """A few normal pictures, held out from training if there are any."""
        items = self.data.held_out or self.data.training
        return list(self.prepared([items[index] for index in range(min(_BESIDE, len(items)))]))


@dataclass(frozen=True)
class View:
    """A kind of figure.

    Args:
        about: What it shows, for someone who sees it for the first time.
        models: Models that have it.
        draw: Draws it, by the name of its files. A view of a picture takes the subject and the picture; one of a model
            the subject, the pictures that are shown and the folder, for what is no figure.
        missing: Says what it lacks to be drawn; empty if nothing.
    """

    about: str
    models: tuple[type[AnomalibModule], ...]
    draw: Callable[..., dict[str, Figure]]
    missing: Callable[[Subject], str] = lambda _: ""


def _no_training(subject: Subject) -> str:
    return "" if subject.data.training else "the training pictures are not known; give the data module as data"


def _no_normal(subject: Subject) -> str:
    return (
        ""
        if subject.data.held_out or subject.data.training
        else "there are no normal pictures; give the data module as data"
    )


def _no_labels(subject: Subject) -> str:
    shown = subject.data.shown
    labels = labels_of(shown)
    if all(label is None for label in labels):
        return "which pictures are normal is not known; give the data module as data"
    # Cells of an anomalous picture are known by its mask alone.
    has_masks = hasattr(shown, "samples") and any(map(bool, shown.samples.get("mask_path", ())))
    return "" if has_masks or False in labels else "there are neither normal test pictures nor masks of anomalous ones"


def _no_support(subject: Subject) -> str:
    if all(subject.support):
        return ""
    return "the support pictures are not all among the training pictures; give the data module it was trained with"


def _not_online(subject: Subject) -> str:
    if not subject.torch_model.online:
        return "only a Foct with online=True learns from what it scores"
    return "" if subject.data.shown else "there is no stream of pictures; give a data module or a folder as data"


def _draw_evidence(subject: Subject, picture: Picture) -> dict[str, Figure]:
    return {"evidence": draw_evidence(subject.evidence(picture))}


def _draw_assignments(subject: Subject, picture: Picture) -> dict[str, Figure]:
    return {"assignments": draw_all_assignments(subject.torch_model, picture)}


def _draw_restoration(subject: Subject, picture: Picture) -> dict[str, Figure]:
    return {"restoration": draw_restoration(subject.torch_model, picture, subject.patches)}


def _draw_transport(subject: Subject, picture: Picture) -> dict[str, Figure]:
    return {"transport": draw_transport(subject.torch_model, picture, subject.support, subject.pixel)}


def _draw_flow(subject: Subject, picture: Picture) -> dict[str, Figure]:
    return {"flow": draw_flow(ways_of(subject.torch_model, picture, subject.normal_pictures), picture)}


def _draw_prototypes(subject: Subject, pictures: Sequence[Picture], folder: Path) -> dict[str, Figure]:
    del pictures, folder
    return {f"prototypes-{layer}-{alpha:g}": draw_prototypes(each) for (layer, alpha), each in subject.patches.items()}


def _draw_projection(subject: Subject, pictures: Sequence[Picture], folder: Path) -> dict[str, Figure]:
    del pictures, folder
    model = subject.torch_model
    method: Method = "umap" if find_spec("umap") else "tsne"
    return {
        f"projection-{layer}": draw_projection(model, subject.prepared(subject.data.shown), layer, method, subject.seed)
        for layer in model.layers
    }


def _write_cells(subject: Subject, pictures: Sequence[Picture], folder: Path) -> dict[str, Figure]:
    write_page(subject.torch_model, pictures, folder / "cells.html", subject.patches if subject.data.training else None)
    return {}


def _draw_foreground(subject: Subject, pictures: Sequence[Picture], folder: Path) -> dict[str, Figure]:
    del pictures, folder
    support = [each for each in subject.support if each is not None]
    return {"foreground": draw_foreground(subject.torch_model, support, cast("Foct", subject.model).foreground)}


def _draw_growth(subject: Subject, pictures: Sequence[Picture], folder: Path) -> dict[str, Figure]:
    del pictures, folder
    return {"growth": draw_growth(memory_growth(subject.torch_model, subject.prepared(subject.data.shown)))}


PICTURE_VIEWS = {
    "evidence": View(
        "What the model flags and how sure that is: regions above its threshold, the anomaly map, the place of the "
        "score among normal pictures, and how much each part of the model adds.",
        (Foct, Pradot, WtFlow),
        _draw_evidence,
    ),
    "assignments": View(
        "From each cell of the picture to the place of the prototype that it is compared with, and what that costs.",
        (Pradot,),
        _draw_assignments,
    ),
    "restoration": View(
        "The picture put together from the training patches of its prototypes; what cannot be restored is anomalous.",
        (Pradot,),
        _draw_restoration,
        _no_training,
    ),
    "transport": View(
        "Which cells of the support pictures the marked cell is sent to, and is thereby compared with.",
        (Foct,),
        _draw_transport,
    ),
    "flow": View(
        "How the velocity field moves usual and anomalous cells from features to noise, among normal ones.",
        (WtFlow,),
        _draw_flow,
        _no_normal,
    ),
}

MODEL_VIEWS = {
    "prototypes": View(
        "The training patches that are nearest to each prototype: what the model takes for normal, and where.",
        (Pradot,),
        _draw_prototypes,
        _no_training,
    ),
    "projection": View(
        "Cells of the pictures and prototypes in a plane, with neighbours where one costs little against the other.",
        (Pradot,),
        _draw_projection,
        _no_labels,
    ),
    "cells": View(
        "A page to go through the pictures cell by cell, for any weight of the place.", (Pradot,), _write_cells
    ),
    "foreground": View(
        "What counts as the product in the support pictures, and the cells that the memory keeps.",
        (Foct,),
        _draw_foreground,
        _no_support,
    ),
    "growth": View(
        "The episodic memory over the pictures in their order, from an empty one.", (Foct,), _draw_growth, _not_online
    ),
}


VIEWS = {**PICTURE_VIEWS, **MODEL_VIEWS}


def views_of(model: type[AnomalibModule], names: Sequence[str] | None = None) -> list[str]:
    """Names of the views of a model.

    Args:
        model: Class of the model.
        names: Those that are wanted; by default all.

    Returns:
        The names, those of pictures first.

    Raises:
        ValueError: If the model has no views, or none of a name.
    """
    available = [name for name, view in VIEWS.items() if issubclass(model, view.models)]
    if not available:
        msg = f"there are no views of {model.__name__}, but of Foct, Pradot and WtFlow"
        raise ValueError(msg)
    if unknown := [name for name in names or () if name not in available]:
        msg = f"{model.__name__} has no views {', '.join(unknown)}; it has {', '.join(available)}"
        raise ValueError(msg)
    return available if names is None else [name for name in available if name in names]
