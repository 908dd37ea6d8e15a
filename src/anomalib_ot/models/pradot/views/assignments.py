"""Positions and costs of the prototypes of an image's cells (PRADOT, figure 4)."""

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from anomalib_ot.drawing.figures import COLOURS, new_figure, show_image, show_map
from anomalib_ot.drawing.pictures import Picture
from anomalib_ot.models.pradot import PradotModel
from anomalib_ot.models.pradot.prototypes import Assignment, Prototypes
from anomalib_ot.transport import grid_coordinates

_COLUMNS = 5
# The image under the arrows is darker, so that the bright arrows of high costs stand out.
_DARKER = 0.4


@torch.inference_mode()
def draw_assignments(
    model: PradotModel, picture: Picture, layer: str, alpha: float, highest: float | None = None
) -> Figure:
    """Draw an arrow from each cell of an image to the position of its prototype (eq. 6), and the costs.

    Five panels show the image, the arrows, the cost of each cell, which is its score, and the feature and spatial parts
    of this cost. All costs share one colour scale.

    Args:
        model: The torch model of a fitted Pradot.
        picture: The image, as :func:`pictures_of` prepares it for the model.
        layer: Layer of the model.
        alpha: Weight of the spatial cost, one of the model's.
        highest: Cost of the brightest colour, for a comparison of images; by default the highest cost of the image.

    Returns:
        The figure, a row of five panels.

    Raises:
        ValueError: If the model has no such layer or α.
        RuntimeError: If the model is not fitted.
    """
    prototypes = model.prototypes_of(layer, alpha)
    embeddings = model.embeddings(picture.prepared[None])
    figure, panels = new_figure(1, _COLUMNS)
    _draw_row(panels[0], picture, layer, prototypes, embeddings[layer], highest)
    return figure


@torch.inference_mode()
def draw_all_assignments(model: PradotModel, picture: Picture) -> Figure:
    """Draw the arrows for all layers and α of a model, one row each; see :func:`draw_assignments`.

    Args:
        model: The torch model of a fitted Pradot.
        picture: The image, as :func:`pictures_of` prepares it for the model.

    Returns:
        The figure. Each row has its own colour scale, as costs differ between layers and α.

    Raises:
        RuntimeError: If the model is not fitted.
    """
    embeddings = model.embeddings(picture.prepared[None])
    groups = list(model.by_layer())
    figure, panels = new_figure(len(groups), _COLUMNS)
    for row, (layer, prototypes) in zip(panels, groups, strict=True):
        _draw_row(row, picture, layer, prototypes, embeddings[layer], None)
    return figure


def _draw_row(
    panels: list[Axes],
    picture: Picture,
    layer: str,
    prototypes: Prototypes,
    embeddings: Tensor,
    highest: float | None,
) -> None:
    """Draw image, arrows, cost and its parts, for embeddings (1, D, H, W)."""
    assignment, alpha = prototypes.assign(embeddings), prototypes.alpha
    cost = assignment.score(alpha)[0]
    limits = (0.0, highest or float(cost.max()))
    show_image(panels[0], picture.image, rf"{picture.name}: {layer}, $\alpha$ = {alpha:g}", picture.mask)
    show_image(panels[1], _DARKER * picture.image, "arrows from cells to their prototypes")
    _draw_arrows(panels[1], prototypes, assignment, cost, picture, limits)
    show_map(panels[2], cost, "cost of a cell, its score (no unit)", limits)
    show_map(
        panels[3], (1 - alpha) * assignment.feature[0], rf"feature part: {1 - alpha:g} $\times$ unlikeness", limits
    )
    show_map(panels[4], alpha * assignment.space[0], rf"spatial part: {alpha:g} $\times$ distance", limits)


def _draw_arrows(
    panel: Axes,
    prototypes: Prototypes,
    assignment: Assignment,
    cost: Tensor,
    picture: Picture,
    limits: tuple[float, float],
) -> None:
    """Draw arrows from cells to prototypes on an image, in the order of their cost."""
    grid = cost.shape
    starts = grid_coordinates(*grid, device=cost.device)
    ends = prototypes.coordinates[assignment.prototype.flatten()]
    order = cost.flatten().argsort()
    rows, columns = _pixels(starts[order], grid, picture).T.cpu().numpy()
    down, right = _pixels(ends[order], grid, picture).T.cpu().numpy() - (rows, columns)
    shown = cost.flatten()[order].cpu().numpy()
    # A cell whose prototype has the same position has no arrow; a dot shows its cost.
    panel.scatter(columns, rows, 2, shown, cmap=COLOURS, vmin=limits[0], vmax=limits[1], zorder=1)
    panel.quiver(
        columns,
        rows,
        right,
        down,
        shown,
        angles="xy",
        scale_units="xy",
        scale=1,
        width=0.006,
        cmap=COLOURS,
        clim=limits,
    )


def _pixels(coordinates: Tensor, grid: torch.Size, picture: Picture) -> Tensor:
    """Centres of cells in pixels, rows first, for coordinates (N, 2) in [0, 1]."""
    cells = coordinates.new_tensor(grid)
    sides = coordinates.new_tensor(picture.image.shape[-2:])
    return (coordinates * (cells - 1) + 0.5) * sides / cells - 0.5
