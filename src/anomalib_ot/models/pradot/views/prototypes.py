"""Prototypes, represented by their most similar training patches (PRADOT, figure 5 left)."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil, sqrt

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from anomalib_ot.drawing.figures import new_figure, show_image, show_map
from anomalib_ot.drawing.pictures import Picture
from anomalib_ot.models.pradot import PradotModel
from anomalib_ot.models.pradot.prototypes import Prototypes
from anomalib_ot.transport import SpatialCost, feature_cost, grid_coordinates, spatial_cost

Grid = tuple[int, int]

# Grey of positions without a prototype.
_EMPTY = 0.85
# Mosaics of the prototypes of each position.
_RANKS = ("first", "second", "third", "fourth")


@dataclass(frozen=True)
class NearestPatches:
    """The nearest training patch of each prototype of a layer and an α.

    Args:
        layer: The layer.
        alpha: Weight of the spatial cost.
        grid: Rows and columns of the layer's feature map. Each cell is a patch.
        prototype_grid: Rows and columns of the prototypes' positions; fewer if the prototypes have a coarser grid.
        patches: RGB in [0, 1], (P, 3, a, b) in pixels.
        distances: Cost of eq. 1 between each prototype and its patch, (P,).
        pictures: Name of the image of each patch.
        cells: Number of the cell of the image, counted row by row, (P,).
        coordinates: Coordinates of the prototypes, rows first, in [0, 1], (P, 2).
        usage: Number of cells of the training images whose nearest prototype it is (eq. 6), (P,).
    """

    layer: str
    alpha: float
    grid: Grid
    prototype_grid: Grid
    patches: Tensor
    distances: Tensor
    pictures: tuple[str, ...]
    cells: Tensor
    coordinates: Tensor
    usage: Tensor


@torch.inference_mode()
def nearest_patches(model: PradotModel, pictures: Iterable[Picture]) -> dict[tuple[str, float], NearestPatches]:
    """Find the nearest patch of the training images to each prototype, by the cost of eq. 1.

    For global prototypes (α = 0) this is the largest cosine similarity, as in the paper. For local ones the position
    counts too. The images are iterated over once, and only the nearest patches so far are kept.

    Args:
        model: The torch model of a fitted Pradot.
        pictures: The training images, all of one size, as :func:`pictures_of` prepares them for the model.

    Returns:
        The patches by layer and α.

    Raises:
        RuntimeError: If the model is not fitted.
        ValueError: If there are no images.
    """
    searches = {(layer, each.alpha): _Search(layer, each) for layer, each in model.by_layer()}
    count = 0
    for count, picture in enumerate(pictures, 1):  # noqa: B007 - shows whether there are any
        embeddings = model.embeddings(picture.prepared[None])
        for (layer, _), search in searches.items():
            search.add(picture, embeddings[layer])
    if not count:
        msg = "there are no images to find patches in; give one or more"
        raise ValueError(msg)
    return {key: search.result() for key, search in searches.items()}


class _Search:
    """The nearest patches so far of the prototypes of one layer and one α."""

    def __init__(self, layer: str, prototypes: Prototypes) -> None:
        self.layer = layer
        self.prototypes = prototypes
        count = len(prototypes.features)
        self.distances = prototypes.features.new_full((count,), torch.inf)
        self.cells = torch.zeros_like(self.distances, dtype=torch.int64)
        self.usage = torch.zeros_like(self.cells)
        self.pictures = [""] * count
        self.patches = torch.empty(0)
        self.grid = (0, 0)

    def add(self, picture: Picture, embeddings: Tensor) -> None:
        """Search one more image, with its embeddings (1, D, H, W)."""
        height, width = self.grid = (embeddings.shape[-2], embeddings.shape[-1])
        patches = cut(picture.image, self.grid)
        if not self.patches.numel():
            self.patches = patches.new_zeros(len(self.distances), *patches.shape[1:])
        distances, cells = plain_cost(
            embeddings[0].flatten(1).T,
            grid_coordinates(height, width, device=embeddings.device),
            self.prototypes.features,
            self.prototypes.coordinates,
            self.prototypes.alpha,
            self.prototypes.settings.spatial,
        ).min(0)
        nearer = distances < self.distances
        self.distances[nearer], self.cells[nearer] = distances[nearer], cells[nearer]
        self.patches[nearer] = patches[cells[nearer]]
        for index in nearer.nonzero()[:, 0].tolist():
            self.pictures[index] = picture.name
        used = self.prototypes.assign(embeddings).prototype.flatten()
        self.usage += used.bincount(minlength=len(self.usage))

    def result(self) -> NearestPatches:
        """The nearest patches of all images so far."""
        _, height, width = self.prototypes.layout(*self.grid)
        return NearestPatches(
            self.layer,
            self.prototypes.alpha,
            self.grid,
            (height, width),
            self.patches,
            self.distances,
            tuple(self.pictures),
            self.cells,
            self.prototypes.coordinates,
            self.usage,
        )


def plain_cost(
    features: Tensor,
    coordinates: Tensor,
    other_features: Tensor,
    other_coordinates: Tensor,
    alpha: float,
    kind: SpatialCost,
) -> Tensor:
    """Unscaled cost of eq. 1 between embeddings, or embeddings and prototypes, which is comparable between images.

    Args:
        features: (N, D).
        coordinates: (N, 2), in [0, 1].
        other_features: (P, D).
        other_coordinates: (P, 2), in [0, 1].
        alpha: Weight of the spatial cost, in [0, 1].
        kind: See :func:`anomalib_ot.transport.spatial_cost`.

    Returns:
        (N, P).
    """
    squared = spatial_cost(coordinates, other_coordinates)
    # torch.cdist loses digits, as in the score.
    space = squared.sqrt() if kind == "euclidean" else squared
    return feature_cost(features, other_features).lerp(space, alpha)


def cut(image: Tensor, grid: Grid) -> Tensor:
    """Cut an image (3, h, w) into patches (H·W, 3, a, b), one for each cell of a grid of H rows and W columns.

    The image is enlarged if its sides are not multiples of H and W.
    """
    height, width = (ceil(side / cells) for side, cells in zip(image.shape[-2:], grid, strict=True))
    image = resized(image, (height * grid[0], width * grid[1]))
    return image.unfold(1, height, height).unfold(2, width, width).permute(1, 2, 0, 3, 4).flatten(0, 1)


def assemble(patches: Tensor, grid: Grid) -> Tensor:
    """Assemble patches (H·W, 3, a, b) to an image (3, H·a, W·b), the inverse of :func:`cut`."""
    return patches.unflatten(0, grid).permute(2, 0, 3, 1, 4).flatten(1, 2).flatten(2, 3)


def resized(image: Tensor, size: Grid) -> Tensor:
    """Resize an image (3, h, w) to a size in pixels; an image of this size is returned as it is."""
    if image.shape[-2:] == size:
        return image
    return F.interpolate(image[None], size, mode="bilinear", align_corners=False)[0]


def draw_prototypes(nearest: NearestPatches) -> Figure:
    """Draw the prototypes of one layer and one α by their nearest patches.

    Local prototypes (α > 0) are drawn at their positions: their number at each position, and up to four mosaics, of the
    most used prototype at each position, the second most used, and so on. Positions without a prototype are grey, as
    many are after compression. Global prototypes (α = 0) are drawn in a list, the most used first.

    Args:
        nearest: The patches.

    Returns:
        The figure.
    """
    return _draw_places(nearest) if nearest.alpha > 0 else _draw_sheet(nearest)


def _draw_places(nearest: NearestPatches) -> Figure:
    height, width = nearest.prototype_grid
    places = _places(nearest)
    ranks = _ranks(places, nearest.usage)
    counts = places.bincount(minlength=height * width)
    shown = min(len(_RANKS), int(counts.max()))
    figure, panels = new_figure(1, 1 + shown)
    title = rf"{nearest.layer}, $\alpha$ = {nearest.alpha:g}: number of prototypes at each position"
    show_map(panels[0][0], counts.view(height, width), title, (0, int(counts.max())))
    for rank, panel in enumerate(panels[0][1:]):
        mosaic = nearest.patches.new_full((height * width, *nearest.patches.shape[1:]), _EMPTY)
        here = ranks == rank
        mosaic[places[here]] = nearest.patches[here]
        title = f"{_RANKS[rank]} most used prototype at each position"
        show_image(panel, assemble(mosaic, nearest.prototype_grid), title)
    return figure


def _draw_sheet(nearest: NearestPatches) -> Figure:
    count = len(nearest.patches)
    columns = ceil(sqrt(count))
    rows = ceil(count / columns)
    # A border of one pixel separates the patches.
    patches = F.pad(nearest.patches[nearest.usage.argsort(descending=True)], (0, 1, 0, 1), value=_EMPTY)
    sheet = patches.new_full((rows * columns, *patches.shape[1:]), _EMPTY)
    sheet[:count] = patches
    figure, panels = new_figure(1, 1, side=6.0)
    title = rf"{nearest.layer}, $\alpha$ = {nearest.alpha:g}: {count} prototypes, the most used first, row by row"
    show_image(panels[0][0], assemble(sheet, (rows, columns)), title)
    return figure


def _places(nearest: NearestPatches) -> Tensor:
    """Nearest position in the prototypes' grid of each prototype, counted row by row, (P,)."""
    height, width = nearest.prototype_grid
    rows, columns = (nearest.coordinates * nearest.coordinates.new_tensor([height - 1, width - 1])).round().long().T
    return rows * width + columns


def _ranks(places: Tensor, usage: Tensor) -> Tensor:
    """Rank of each prototype by usage among those at its position; the first one wins a tie, (P,)."""
    order = usage.argsort(descending=True, stable=True)
    order = order[places[order].argsort(stable=True)]
    place = places[order]
    ranks = torch.empty_like(order)
    ranks[order] = torch.arange(len(order), device=order.device) - torch.searchsorted(place, place)
    return ranks
