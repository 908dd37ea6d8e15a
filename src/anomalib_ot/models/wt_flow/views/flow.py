"""Trajectories of an image's cells in WtFlow's velocity field, from features to noise."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import AutoLocator
from torch import Tensor

from anomalib_ot.drawing.figures import BLUE, ORANGE, new_figure, show_image, show_map
from anomalib_ot.drawing.pictures import Picture, stack
from anomalib_ot.models.wt_flow import WtFlowModel

_OTHER = "grey"
# Cells of each kind whose trajectory is drawn, and normal cells in the background.
_WAYS = 3
_CLOUD = 1500


@dataclass(frozen=True)
class Ways:
    """Trajectories of the cells of an image and of normal images in the field of one layer.

    Args:
        layer: The layer.
        times: Times from 0, the features, to 1, the noise, (T,).
        picture: x_t of the image's cells, (T, C, H, W).
        normal: x_t of the cells of the normal images, (T, N, C).
        minus_log_density: −log p of the image's cells, (H, W), by the number of steps of the model's score; the mean
            over channels, without the constant.
    """

    layer: str
    times: Tensor
    picture: Tensor
    normal: Tensor
    minus_log_density: Tensor


def ways_of(model: WtFlowModel, picture: Picture, normal: Sequence[Picture], steps: int = 16) -> list[Ways]:
    """Follow the cells of an image, and those of normal images, from t = 0 to 1.

    Args:
        model: The torch model of a fitted WtFlow.
        picture: The image, as :func:`pictures_of` prepares it for the model.
        normal: Normal images, prepared likewise, at least one.
        steps: Number of Euler steps; more than for the scores, so that the trajectories are visible.

    Returns:
        The trajectories in each layer.

    Raises:
        ValueError: If there are no normal images or no steps.
        RuntimeError: If the model is not fitted.
    """
    if not normal:
        msg = "the flow of an image is drawn among that of normal images, but there are none; give one or more"
        raise ValueError(msg)
    own = model.trajectories(picture.prepared[None], steps)
    others = model.trajectories(stack(normal), steps)
    ends = model.trajectories(picture.prepared[None], model.settings.euler_steps)
    times = torch.linspace(0, 1, steps + 1)
    return [
        Ways(
            layer,
            times,
            own[layer][:, 0],
            others[layer].permute(0, 1, 3, 4, 2).flatten(1, 3),
            ends[layer][-1, 0].square().mean(0) / 2,
        )
        for layer in model.layers
    ]


def draw_flow(ways: Sequence[Ways], picture: Picture) -> Figure:
    """Draw positions and trajectories of cells of an image, one row for each layer.

    From left to right: the image with its most anomalous cells and some usual ones; the density map; the trajectories
    of these cells in the first two principal components of normal features; and the root mean square of the features
    over time, for normal images, for this image and for its most anomalous cells. For normal cells, whitened features
    start at about one.

    Args:
        ways: From :func:`ways_of`.
        picture: The same image.

    Returns:
        The figure.
    """
    title = f"{picture.name}: how the flow carries cells from features (t = 0, dots) to noise (t = 1)"
    figure, panels = new_figure(len(ways), 4, title, 3.4)
    for row, each in zip(panels, ways, strict=True):
        odd, usual = _choose(each.minus_log_density)
        show_image(row[0], picture.image, f"{each.layer}: cells of the trajectories", picture.mask)
        for cells, colour in ((odd, ORANGE), (usual, BLUE)):
            _mark(row[0], cells, each.minus_log_density.shape, picture, colour)
        show_map(row[1], each.minus_log_density, "minus log density of each cell, per channel")
        _draw_ways(row[2], each, odd, usual)
        _draw_norms(row[3], each, odd)
    return figure


def _choose(minus_log_density: Tensor) -> tuple[Tensor, Tensor]:
    """The cells with the lowest density, without neighbours, and cells with about the median density."""
    left = minus_log_density.clone()
    odd = []
    for _ in range(_WAYS):
        row, column = divmod(int(left.argmax()), left.shape[1])
        odd.append(row * left.shape[1] + column)
        left[max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2] = -torch.inf
    order = minus_log_density.flatten().argsort()
    middle = len(order) // 2
    return torch.tensor(odd), order[[middle - len(order) // 8, middle, middle + len(order) // 8]].cpu()


def _mark(panel: Axes, cells: Tensor, grid: torch.Size, picture: Picture, colour: str) -> None:
    height, width = picture.image.shape[-2:]
    y = (cells // grid[1] + 0.5) * height / grid[0] - 0.5
    x = (cells % grid[1] + 0.5) * width / grid[1] - 0.5
    panel.plot(x, y, "o", markersize=9, markerfacecolor="none", markeredgewidth=2, color=colour)


def _draw_ways(panel: Axes, ways: Ways, odd: Tensor, usual: Tensor) -> None:
    """Draw trajectories in the principal components of the normal features, above these features."""
    start = ways.normal[0]
    mean = start.mean(0)
    values, vectors = torch.linalg.eigh((start - mean).mT @ (start - mean) / len(start))
    axes = vectors[:, -2:].flip(-1)
    shares = (values / values.sum()).flip(-1)
    cloud = ((start[:: max(1, len(start) // _CLOUD)] - mean) @ axes).cpu().numpy()
    panel.plot(*cloud.T, ".", markersize=2, color="lightgrey", label="normal features")
    own = ways.picture.flatten(2).permute(0, 2, 1)
    for cells, colour, name in ((usual, BLUE, "usual cells"), (odd, ORANGE, "most anomalous cells")):
        for number, cell in enumerate(cells.tolist()):
            way = ((own[:, cell] - mean) @ axes).cpu().numpy()
            panel.plot(*way.T, color=colour, linewidth=1.2, label=None if number else name)
            panel.plot(*way[0], "o", markersize=4, color=colour)
            panel.annotate(
                "", way[-1], way[-2], arrowprops={"arrowstyle": "->", "color": colour, "shrinkA": 0, "shrinkB": 0}
            )
    _with_ticks(panel)
    panel.set_xlabel(f"1st component, {float(shares[0]):.0%} of the variance", fontsize="small")
    panel.set_ylabel(f"2nd component, {float(shares[1]):.0%}", fontsize="small")
    panel.set_title("trajectories among normal features", fontsize="small")
    panel.legend(fontsize="x-small", loc="best")


def _draw_norms(panel: Axes, ways: Ways, odd: Tensor) -> None:
    """Draw the root mean square of the channels over time, as mean and standard deviation over cells."""
    times = ways.times.numpy()
    normal = ways.normal.square().mean(-1).sqrt().cpu()
    own = ways.picture.square().mean(1).sqrt().flatten(1).cpu()
    # A twentieth of the image's cells, as the standard deviation of three would mean little.
    highest = own[:, ways.minus_log_density.flatten().topk(max(len(odd), own.shape[1] // 20)).indices.cpu()]
    for values, colour, name in (
        (normal, BLUE, "normal images"),
        (own, _OTHER, "this image"),
        (highest, ORANGE, "its most anomalous twentieth"),
    ):
        mean, spread = values.mean(1).numpy(), values.std(1).numpy()
        panel.plot(times, mean, color=colour, label=name)
        panel.fill_between(times, mean - spread, mean + spread, color=colour, alpha=0.15, linewidth=0)
    ends = float((2 * ways.minus_log_density.flatten().topk(highest.shape[1]).values.mean()).sqrt())
    panel.plot(1, ends, "D", color=ORANGE, markersize=5, label="where the score's steps end")
    panel.axhline(1, color="black", linewidth=0.7, linestyle=":")
    panel.text(0.5, 1, "Gaussian noise", fontsize="x-small", va="top", ha="center")
    _with_ticks(panel)
    panel.set_xlabel("t", fontsize="small")
    panel.set_title("root mean square of the features, mean ± std", fontsize="small")
    panel.legend(fontsize="x-small", loc="best")


def _with_ticks(panel: Axes) -> None:
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_locator(AutoLocator())
    panel.tick_params(labelsize="x-small")
