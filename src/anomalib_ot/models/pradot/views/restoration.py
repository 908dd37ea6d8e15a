"""Images restored from the patches of their prototypes, and the difference (PRADOT, figure 5 right)."""

from collections.abc import Mapping

import torch
from matplotlib.figure import Figure
from torch import Tensor

from anomalib_ot.drawing.figures import new_figure, show_image, show_map
from anomalib_ot.drawing.pictures import Picture
from anomalib_ot.models.pradot import PradotModel

from .prototypes import NearestPatches, assemble, cut, resized

Nearest = Mapping[tuple[str, float], NearestPatches]


@torch.inference_mode()
def restore(model: PradotModel, picture: Picture, nearest: Nearest) -> dict[tuple[str, float], Tensor]:
    """Replace each cell of an image by the patch of its prototype (eq. 6).

    Args:
        model: The torch model of a fitted Pradot.
        picture: The image, as :func:`pictures_of` prepares it for the model.
        nearest: Patches of the model's prototypes, from :func:`nearest_patches`, for the layers and α to use.

    Returns:
        The restored images, RGB in [0, 1], (3, h, w), by layer and α.

    Raises:
        ValueError: If the model has no such layer or α, or the patches belong to another model.
        RuntimeError: If the model is not fitted.
    """
    embeddings = model.embeddings(picture.prepared[None])
    restored = {}
    for key, patches in nearest.items():
        prototypes = model.prototypes_of(*key)
        if not torch.equal(patches.coordinates, prototypes.coordinates):
            msg = f"the patches of {key[0]} and alpha {key[1]:g} are not those of this model: find them again"
            raise ValueError(msg)
        chosen = prototypes.assign(embeddings[key[0]]).prototype[0]
        image = assemble(patches.patches[chosen.flatten()], (chosen.shape[0], chosen.shape[1]))
        restored[key] = resized(image, (picture.image.shape[1], picture.image.shape[2]))
    return restored


@torch.inference_mode()
def restoration_map(model: PradotModel, picture: Picture, nearest: Nearest) -> Tensor:
    """Compute a second anomaly map, the difference between an image and its restoration from prototypes.

    The mean absolute difference of a cell replaces its cost. Maps of layers and α have equal weights, and are upsampled
    and smoothed as those of the model. The score of the image is the maximum. If the poses of normal parts vary between
    images, their patches do not fit together, and this map may be no better than chance.

    Args:
        model: The torch model of a fitted Pradot.
        picture: The image, as :func:`pictures_of` prepares it for the model.
        nearest: Patches of the model's prototypes, as for :func:`restore`.

    Returns:
        (h, w), in [0, 1].

    Raises:
        ValueError: If the model has no such layer or α, or the patches belong to another model.
        RuntimeError: If the model is not fitted.
    """
    restored = restore(model, picture, nearest)
    maps = [difference(picture.image, image, nearest[key].grid) / len(restored) for key, image in restored.items()]
    size = picture.image.shape[-2:]
    return model.anomaly_map_generator([each[None, None] for each in maps], size)[0, 0]


def difference(image: Tensor, restored: Tensor, grid: tuple[int, int]) -> Tensor:
    """Mean absolute difference of two images (3, h, w) in each cell of a grid (H, W), in [0, 1]."""
    return cut((image - restored).abs(), grid).mean((1, 2, 3)).unflatten(0, grid)


@torch.inference_mode()
def draw_restoration(model: PradotModel, picture: Picture, nearest: Nearest) -> Figure:
    """Draw an image, its restoration from prototypes and their difference, one row for each layer and α.

    Args:
        model: The torch model of a fitted Pradot.
        picture: The image, as :func:`pictures_of` prepares it for the model.
        nearest: Patches of the model's prototypes, as for :func:`restore`.

    Returns:
        The figure. All differences share one colour scale.

    Raises:
        ValueError: If the model has no such layer or α, or the patches belong to another model.
        RuntimeError: If the model is not fitted.
    """
    restored = restore(model, picture, nearest)
    differences = {key: difference(picture.image, image, nearest[key].grid) for key, image in restored.items()}
    limits = (0.0, max(float(each.max()) for each in differences.values()))
    figure, panels = new_figure(len(restored), 3)
    for row, (key, image) in zip(panels, restored.items(), strict=True):
        show_image(row[0], picture.image, picture.name, picture.mask)
        show_image(row[1], image, rf"restored from {key[0]}, $\alpha$ = {key[1]:g}")
        show_map(row[2], differences[key], "mean difference of a cell, 0 to 1", limits)
    return figure
