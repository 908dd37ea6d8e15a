"""A page to explore a fitted Pradot: hover over a cell to see its prototype, change α to update the map."""

import base64
from collections.abc import Mapping, Sequence
from math import ceil, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from anomalib_ot.drawing.figures import COLOURS
from anomalib_ot.drawing.html import data_uri, render_page
from anomalib_ot.drawing.pictures import Picture, stack
from anomalib_ot.files import write_text
from anomalib_ot.models.pradot import PradotModel
from anomalib_ot.models.pradot.prototypes import Prototypes

from .prototypes import NearestPatches, assemble

# Weights of the spatial cost in the score, in addition to those of the training.
_WEIGHTS = tuple(tenth / 10 for tenth in range(11))
_STEPS = 2**16 - 1


@torch.inference_mode()
def write_page(
    model: PradotModel,
    pictures: Sequence[Picture],
    path: Path,
    patches: Mapping[tuple[str, float], NearestPatches] | None = None,
) -> Path:
    """Write a self-contained page, which needs no network.

    It shows the scores of each layer and each learned set of prototypes, for weights of the spatial cost (α of eq. 1)
    from 0 to 1. The prototypes do not change; only the weight in the score does.

    Args:
        model: A fitted model.
        pictures: The images to show, as :func:`pictures_of` prepares them; ten give a page of a few MB.
        path: File to write; missing folders are created.
        patches: Training patches that represent the prototypes, from :func:`nearest_patches`. Without them, the page
            shows the positions of prototypes only.

    Returns:
        The file.

    Raises:
        ValueError: If there are no images, or the patches of a layer and α are missing or belong to other prototypes.
        RuntimeError: If the model is not fitted.
    """
    if not pictures:
        msg = "there are no images to show; give one or more"
        raise ValueError(msg)
    if patches is not None:
        _check(patches, model)
    content = _content(model, pictures, patches or {})
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_text(path, render_page(__package__, "cells", **content))


def _check(patches: Mapping[tuple[str, float], NearestPatches], model: PradotModel) -> None:
    for layer, prototypes in model.by_layer():
        found = patches.get((layer, prototypes.alpha))
        if found is None or len(found.patches) != len(prototypes.features):
            msg = f"patches must be those of this model; {layer} with alpha {prototypes.alpha:g} lacks them or differs"
            raise ValueError(msg)


def _content(
    model: PradotModel, pictures: Sequence[Picture], patches: Mapping[tuple[str, float], NearestPatches]
) -> dict[str, Any]:
    """Content of the template, and the data of its script."""
    embeddings = model.embeddings(stack(pictures))
    groups = list(model.by_layer())
    weights = sorted({*_WEIGHTS, *(prototypes.alpha for _, prototypes in groups)})
    layers: dict[str, dict[str, Any]] = {}
    for layer, prototypes in groups:
        maps = embeddings[layer]
        rows, columns = maps.shape[-2:]
        entry = layers.setdefault(layer, {"name": layer, "rows": rows, "columns": columns, "highest": 0.0, "sets": []})
        made, highest = _set(prototypes, maps, weights, patches.get((layer, prototypes.alpha)))
        # One colour scale for all images, sets and weights of a layer, so that their maps can be compared.
        entry["highest"] = max(entry["highest"], highest)
        entry["sets"].append(made)
    names = [
        {"name": picture.name, "label": picture.label, "image": data_uri(_image(picture.image), "WEBP")}
        for picture in pictures
    ]
    colours = colormaps[COLOURS](np.linspace(0, 1, 256), bytes=True)[:, :3]
    size = pictures[0].image.shape[:0:-1]
    drawn = {"colours": _pack(colours), "size": size, "weights": weights, "layers": list(layers.values())}
    return {"pictures": names, "data": drawn}


def _set(
    prototypes: Prototypes, maps: Tensor, weights: Sequence[float], patches: NearestPatches | None
) -> tuple[dict[str, Any], float]:
    """One set of prototypes with its assignments of feature maps (B, D, H, W), and the highest score of all weights."""
    assignments = [prototypes.assign(maps, weight) for weight in weights]
    highest = max(float(each.score(weight).max()) for each, weight in zip(assignments, weights, strict=True))
    nearest, feature, space = (
        torch.stack([getattr(each, part) for each in assignments]) for part in ("prototype", "feature", "space")
    )
    # In a large model, most prototypes are not the nearest one of any cell of a few images.
    used, winners = nearest.unique(return_inverse=True)
    made = {
        "alpha": prototypes.alpha,
        "count": len(prototypes.features),
        "numbers": _pack(_array(used)),
        "coordinates": _quantise(prototypes.coordinates[used]),
        # For each weight, image, row and column.
        "winners": _pack(_array(winners)),
        "features": _quantise(feature),
        "spaces": _quantise(space),
    }
    return made | (_sheet(patches, used.cpu()) if patches else {}), highest


def _sheet(nearest: NearestPatches, used: Tensor) -> dict[str, Any]:
    """Patches of some prototypes, tiled into one image, and their sources."""
    columns = ceil(sqrt(len(used)))
    rows = ceil(len(used) / columns)
    patches = nearest.patches.cpu()
    sheet = patches.new_zeros(rows * columns, *patches.shape[1:])
    sheet[: len(used)] = patches[used]
    names = sorted({nearest.pictures[index] for index in used.tolist()})
    position = {name: index for index, name in enumerate(names)}
    return {
        # Without chroma subsampling, patches of 8 pixels, as most are, do not bleed into each other in a JPEG.
        "sheet": data_uri(_image(assemble(sheet, (rows, columns))), "JPEG", subsampling=0),
        "across": columns,
        "patch": patches.shape[:1:-1],
        "names": names,
        "pictures": _pack(np.array([position[nearest.pictures[index]] for index in used.tolist()])),
        "cells": _pack(_array(nearest.cells.cpu()[used])),
    }


def _image(image: Tensor) -> Image.Image:
    """An image (3, h, w) in [0, 1] for Pillow."""
    return Image.fromarray(_array((image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0)))


def _quantise(values: Tensor) -> dict[str, Any]:
    """Quantise values of at least 0 to whole multiples of a unit."""
    unit = float(values.max()) / _STEPS or 1.0
    return _pack(_array((values.double() / unit).round())) | {"unit": unit}


def _pack(values: NDArray[Any]) -> dict[str, Any]:
    """Encode whole numbers of at least 0, with the fewest bytes per number."""
    kind = next(kind for kind in (np.uint8, np.uint16, np.uint32) if values.max() <= np.iinfo(kind).max)
    little = values.astype(np.dtype(kind).newbyteorder("<"))
    return {"type": np.dtype(kind).name, "values": base64.b64encode(little.tobytes()).decode()}


def _array(values: Tensor) -> NDArray[Any]:
    return values.detach().cpu().numpy()
