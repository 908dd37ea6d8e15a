"""Embeddings and prototypes in two dimensions (PRADOT, figure 6)."""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal, get_args

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from sklearn.manifold import TSNE
from torch import Tensor

from anomalib_ot.drawing.figures import new_figure
from anomalib_ot.drawing.pictures import Picture
from anomalib_ot.models.pradot import PradotModel
from anomalib_ot.settings import require
from anomalib_ot.transport import grid_coordinates

from .prototypes import cut, plain_cost

Method = Literal["umap", "tsne"]

# A cell with a larger share of abnormal pixels is abnormal (paper).
_ABNORMAL = 0.3
_NEIGHBOURS = 50
# Otherwise cells at one position of similar images would overlap.
_SPREAD = 0.5
_PERPLEXITY = 30
# Colours of the corners of an image: red and gold above, blue and green below.
_CORNERS = np.array([[[0.85, 0.1, 0.25], [0.98, 0.8, 0.1]], [[0.2, 0.2, 0.85], [0.1, 0.7, 0.45]]])


@dataclass(frozen=True)
class Cells:
    """Cells of images, drawn at random.

    Args:
        layer: Layer of the features.
        features: Features that are compared with prototypes, (N, D), on the CPU.
        coordinates: Positions of the cells, rows first, in [0, 1], (N, 2).
        abnormal: Whether more than 30 % of a cell's pixels are abnormal, (N,).
    """

    layer: str
    features: Tensor
    coordinates: Tensor
    abnormal: Tensor


@dataclass(frozen=True)
class Projection:
    """Cells and prototypes in two dimensions.

    Args:
        points: Cells, then prototypes, (N, 2), without a unit.
        coordinates: Position of each point in the image, rows first, in [0, 1], (N, 2).
        abnormal: Whether each point is an abnormal cell, (N,).
        prototypes: Whether each point is a prototype, (N,).
    """

    points: NDArray[np.floating]
    coordinates: NDArray[np.floating]
    abnormal: NDArray[np.bool_]
    prototypes: NDArray[np.bool_]


class _Draw:
    """A random sample without replacement from a stream of rows (N, C): those with the smallest random keys."""

    def __init__(self, limit: int, generator: torch.Generator) -> None:
        self.limit = limit
        self.generator = generator
        self.keys = torch.empty(0)
        self.rows = torch.empty(0)

    def add(self, rows: Tensor) -> None:
        """Include rows in the draw."""
        keys = torch.cat([self.keys, torch.rand(len(rows), generator=self.generator)])
        self.keys, kept = keys.topk(min(self.limit, len(keys)), largest=False)
        self.rows = torch.cat([self.rows.view(-1, rows.shape[1]), rows])[kept]


@torch.inference_mode()
def sample_cells(
    model: PradotModel, pictures: Iterable[Picture], layer: str, count: int = 1500, seed: int = 0
) -> Cells:
    """Draw cells of test images at random, at most a third of them abnormal ones.

    Memory does not grow with the number of images. Cells of an abnormal image without a mask may be normal or abnormal,
    and are left out.

    Args:
        model: The torch model of a fitted Pradot.
        pictures: The images, as :func:`pictures_of` prepares them for the model.
        layer: Layer of the model.
        count: Largest number of cells, at least 3.
        seed: Seed of the draw.

    Returns:
        The cells, the normal ones first.

    Raises:
        ValueError: If the model has no such layer, the count is too small, or there is no cell to draw.
        RuntimeError: If the model is not fitted.
    """
    require(layer in model.layers, "layer", model.layers, layer)
    require(count >= 3, "count", "at least 3", count)  # noqa: PLR2004 - the least number with a third
    generator = torch.Generator().manual_seed(seed)
    normal, abnormal = _Draw(count, generator), _Draw(count // 3, generator)
    for picture in pictures:
        maps = model.embeddings(picture.prepared[None])[layer].cpu()
        grid = (maps.shape[-2], maps.shape[-1])
        is_abnormal = _abnormal_cells(picture, grid)
        if is_abnormal is not None:
            rows = torch.cat([maps[0].flatten(1).T, grid_coordinates(*grid)], 1)
            normal.add(rows[~is_abnormal])
            abnormal.add(rows[is_abnormal])
    rows = torch.cat([normal.rows[: count - len(abnormal.rows)], abnormal.rows])
    if not len(rows):
        msg = "there is no cell to draw: give normal images, or abnormal ones with masks"
        raise ValueError(msg)
    return Cells(layer, rows[:, :-2], rows[:, -2:], torch.arange(len(rows)) >= len(rows) - len(abnormal.rows))


def _abnormal_cells(picture: Picture, grid: tuple[int, int]) -> Tensor | None:
    """Whether each cell of a grid is abnormal, (H·W,), or None if that is unknown."""
    if picture.mask is not None:
        return cut(picture.mask[None].float().cpu(), grid).mean((1, 2, 3)) > _ABNORMAL
    return torch.zeros(grid[0] * grid[1], dtype=torch.bool) if picture.label is False else None


@torch.inference_mode()
def project(
    model: PradotModel, cells: Cells, alpha: float, method: Method = "umap", count: int = 500, seed: int = 0
) -> Projection:
    """Project cells and prototypes to two dimensions, such that points with a low cost (eq. 1) are neighbours.

    Args:
        model: The torch model of a fitted Pradot.
        cells: The cells, from :func:`sample_cells`. All costs between them and the prototypes are kept at once, 16 MB
            for 2000 points.
        alpha: Weight of the spatial cost, one of the model's.
        method: ``umap`` or ``tsne``.
        count: Largest number of prototypes, drawn at random.
        seed: Seed of the draw and the method; the same seed gives the same points.

    Returns:
        The points.

    Raises:
        ValueError: If the model has no such layer or α, or the method is unknown.
        ModuleNotFoundError: If the method is UMAP, which is not installed.
    """
    _check(method)
    prototypes = model.prototypes_of(cells.layer, alpha)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(prototypes.features), generator=generator)[:count].to(prototypes.features.device)
    features = torch.cat([cells.features, prototypes.features[chosen].cpu()])
    coordinates = torch.cat([cells.coordinates, prototypes.coordinates[chosen].cpu()])
    costs = plain_cost(features, coordinates, features, coordinates, alpha, prototypes.settings.spatial)
    # Rounding makes costs slightly negative and asymmetric.
    costs = ((costs + costs.T) / 2).clamp(min=0).fill_diagonal_(0)
    is_prototype = torch.arange(len(features)) >= len(cells.features)
    return Projection(
        _UMAP_OR_TSNE[method](costs.numpy(), seed),
        coordinates.numpy(),
        torch.cat([cells.abnormal, is_prototype.new_zeros(len(chosen))]).numpy(),
        is_prototype.numpy(),
    )


def _check(method: str) -> None:
    require(method in get_args(Method), "method", get_args(Method), method)
    if method == "umap" and find_spec("umap") is None:
        msg = 'UMAP is not installed; run: pip install "anomalib-ot[viz]", or use the method tsne'
        raise ModuleNotFoundError(msg)


def _umap(costs: NDArray[np.floating], seed: int) -> NDArray[np.floating]:
    from umap import UMAP  # noqa: PLC0415 - optional

    neighbours = min(_NEIGHBOURS, len(costs) - 1)
    with warnings.catch_warnings():
        # The warning says that precomputed costs have no inverse transform.
        warnings.filterwarnings("ignore", message="using precomputed metric")
        umap = UMAP(neighbours, min_dist=_SPREAD, metric="precomputed", init="random", random_state=seed, n_jobs=1)
        return umap.fit_transform(costs)


def _tsne(costs: NDArray[np.floating], seed: int) -> NDArray[np.floating]:
    perplexity = min(_PERPLEXITY, (len(costs) - 1) / 3)
    return TSNE(perplexity=perplexity, metric="precomputed", init="random", random_state=seed).fit_transform(costs)


_UMAP_OR_TSNE = {"umap": _umap, "tsne": _tsne}


def draw_projection(
    model: PradotModel, pictures: Iterable[Picture], layer: str, method: Method = "umap", seed: int = 0
) -> Figure:
    """Draw cells of test images and the prototypes of a layer in two dimensions, a panel for each α.

    The colour of a point is its position in the image. With α = 0 points are neighbours by their features only. With
    larger α, points of one position come together, and abnormal cells stay away from all prototypes.

    Args:
        model: The torch model of a fitted Pradot.
        pictures: Test images, as :func:`pictures_of` prepares them for the model; the abnormal ones with masks.
        layer: Layer of the model.
        method: ``umap`` or ``tsne``.
        seed: Seed of all random numbers.

    Returns:
        The figure.

    Raises:
        ValueError: If the model has no such layer, the method is unknown, or it is unknown which cells are normal.
        RuntimeError: If the model is not fitted.
        ModuleNotFoundError: If the method is UMAP, which is not installed.
    """
    _check(method)
    cells = sample_cells(model, pictures, layer, seed=seed)
    alphas = [prototypes.alpha for name, prototypes in model.by_layer() if name == layer]
    figure, [panels] = new_figure(1, len(alphas) + 1, side=4.0)
    for panel, alpha in zip(panels, alphas, strict=False):
        _draw_points(panel, project(model, cells, alpha, method, seed=seed))
        panel.set_title(rf"{layer}, $\alpha$ = {alpha:g}", fontsize="small")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    panels[-1].imshow(_colours(grid_coordinates(64, 64).numpy()).reshape(64, 64, 3))
    panels[-1].set_title("colour: position in the image", fontsize="small")
    return figure


def _draw_points(panel: Axes, projection: Projection) -> None:
    colours = _colours(projection.coordinates)
    # Marker, area in points² and line width. Prototypes are drawn below the cells.
    kinds = (
        ("prototype", projection.prototypes, "D", 26.0, 0.5),
        ("normal cell", ~(projection.abnormal | projection.prototypes), "o", 6.0, 0.0),
        ("abnormal cell", projection.abnormal, "x", 16.0, 1.2),
    )
    for label, which, marker, area, line in kinds:
        edges = "black" if marker == "D" else None
        x, y = projection.points[which].T
        panel.scatter(x, y, area, colours[which], marker=marker, label=label, linewidths=line, edgecolors=edges)


def _colours(coordinates: NDArray[np.floating]) -> NDArray[np.floating]:
    """Colours (N, 3) of positions (N, 2), interpolated between those of the corners."""
    down, right = coordinates.T[..., None]
    above, below = (left * (1 - right) + other * right for left, other in _CORNERS)
    return above * (1 - down) + below * down
