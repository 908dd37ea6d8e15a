"""Contents of Foct's memory, the transport of an image's cells to it, and its growth."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import AutoLocator, MaxNLocator
from torch import Tensor

from anomalib_ot.drawing.figures import BLUE, COLOURS, ORANGE, OUTLINE, new_figure, show_image
from anomalib_ot.drawing.pictures import Picture, stack
from anomalib_ot.models.foct import FoctModel
from anomalib_ot.models.foct.foreground import Foreground
from anomalib_ot.models.foct.torch_model import QueryPlan
from anomalib_ot.settings import require

# Up to this mean distance, in standard deviations of the features, an image counts as the source of features.
_SAME = 0.02
# Largest number of support images, and of names, in a figure.
_MOST = 6
_NAMES = 12
# Images under cells are paler, so that the cells stand out.
_PALE = 0.5
_COLOUR_OF_LABEL = {False: BLUE, True: ORANGE, None: "grey"}
_NAME_OF_LABEL = {False: "normal", True: "anomalous", None: "not known"}


def find_support(model: FoctModel, pictures: Iterable[Picture]) -> list[Picture | None]:
    """Find the support images of a fitted model, which stores their features only.

    Args:
        model: The torch model of a fitted Foct.
        pictures: Training images, as :func:`pictures_of` prepares them for the model, which may include the
            support images.

    Returns:
        The support images in the order of the memory; None for those that are not among the images.
    """
    found: list[Picture | None] = [None] * len(model.semantic.features)
    for picture in pictures:
        _, distances = model.locate(picture.prepared)
        for number, distance in enumerate(distances.mean(-1).tolist()):
            if distance < _SAME and found[number] is None:
                found[number] = picture
        if all(each is not None for each in found):
            break
    return found


@torch.no_grad()
def draw_transport(
    model: FoctModel, picture: Picture, support: Sequence[Picture | None], pixel: tuple[float, float] | None = None
) -> Figure:
    """Draw the cells of the support images to which conditional transport sends one cell of an image (eq. 6).

    Each support image is rotated to its nearest view, with which the image is compared.

    Args:
        model: The torch model of a fitted Foct.
        picture: The image, as :func:`pictures_of` prepares it for the model.
        support: The support images, from :func:`find_support`.
        pixel: A point of the cell, from the left and from the top, in pixels of the pre-processed image; by default the
            pixel with the highest score.

    Returns:
        The figure, with the support images that get the largest shares.

    Raises:
        ValueError: If the pixel is outside the image, or the number of support images is wrong.
        RuntimeError: If the model is not fitted.
    """
    height, width = picture.image.shape[-2:]
    plan = model.plan(picture.prepared)
    require(len(support) == len(plan.views), "the number of support images", len(plan.views), len(support))
    x, y = pixel or _highest_pixel(model, picture)
    require(0 <= x < width and 0 <= y < height, "pixel", f"within {width} x {height}", (x, y))
    rows, columns = plan.grid
    cell = int(y * rows / height), int(x * columns / width)
    masses = plan.forward[cell[0] * columns + cell[1]]
    of_support = masses[: len(support) * plan.of_support].unflatten(0, (len(support), -1))
    shown = of_support.sum(-1).argsort(descending=True)[:_MOST].tolist()
    title = f"Where transport sends the marked cell of {picture.name}{_shares(plan, masses, of_support)}"
    figure, panels = new_figure(1, 1 + len(shown), title)
    show_image(panels[0][0], picture.image, f"{picture.name}, the marked cell")
    _mark_cell(panels[0][0], cell, plan.grid, (height, width))
    highest = float(masses.max())
    for panel, number in zip(panels[0][1:], shown, strict=True):
        places = _places(model, support[number], number, int(plan.views[number]), plan.grid)
        _draw_view(panel, model, support[number], number, int(plan.views[number]))
        _draw_masses(panel, places, of_support[number], highest)
    figure.colorbar(panels[0][-1].collections[-1], ax=panels[0], shrink=0.7, label="share that a feature gets")
    return figure


def _highest_pixel(model: FoctModel, picture: Picture) -> tuple[float, float]:
    parts = model.contributions(picture.prepared[None])
    anomaly_map = torch.stack(list(parts.values())).sum(0)[0, 0]
    row, column = divmod(int(anomaly_map.argmax()), anomaly_map.shape[1])
    return column + 0.5, row + 0.5


def _mark_cell(panel: Axes, cell: tuple[int, int], grid: tuple[int, int], size: tuple[int, int]) -> None:
    down, right = (side / cells for side, cells in zip(size, grid, strict=True))
    x, y = (cell[1] + 0.5) * right - 0.5, (cell[0] + 0.5) * down - 0.5
    # A ring makes a small cell visible.
    panel.plot(x, y, "o", markersize=16, markerfacecolor="none", color=OUTLINE, markeredgewidth=2)
    panel.plot(x, y, "s", markersize=3, color=OUTLINE)


def _places(model: FoctModel, picture: Picture | None, number: int, view: int, grid: tuple[int, int]) -> Tensor | None:
    """Positions of a view's features, rows first, in shares of its sides, (n, 2); None where they are unknown."""
    cells = torch.tensor(grid)
    weight = model.settings.position_weight
    if weight:
        # Positions are a part of the features in the memory.
        coordinates = model.semantic.features[number, view, :, -2:].cpu() / weight
        return (coordinates * (cells - 1) + 0.5) / cells
    if picture is None:
        return None
    found = model.locate(picture.prepared, view)[0][number].cpu()
    return (torch.stack([found // grid[1], found % grid[1]], 1) + 0.5) / cells


def _draw_view(panel: Axes, model: FoctModel, picture: Picture | None, number: int, view: int) -> None:
    """A support image, paler and rotated to the view, with sides from 0 to 1."""
    angle = 360 * view / model.settings.rotations
    title = f"{picture.name if picture else f'support image {number + 1}'}{f', rotated by {angle:g}°' if view else ''}"
    if picture:
        image = model.views(picture.image[None])[0, view].clamp(0, 1)
        show_image(panel, 1 - _PALE * (1 - image), title)
        panel.images[0].set_extent((0, 1, 1, 0))
    else:
        panel.set_title(f"{title},\nnot among the training images", fontsize="small")
    height, width = picture.image.shape[-2:] if picture else (1, 1)
    panel.set(xlim=(0, 1), ylim=(1, 0), aspect="auto", box_aspect=height / width)


def _draw_masses(panel: Axes, places: Tensor | None, masses: Tensor, highest: float) -> None:
    """The features of a view as discs, larger and brighter for larger shares; (n, 2) and (n,)."""
    panel.set_xlabel(f"{float(masses.sum()):.0%} goes here", fontsize="small")
    places = torch.full((len(masses), 2), torch.nan) if places is None else places
    order = masses.argsort().cpu()
    y, x = places[order].T.numpy()
    shares = masses.cpu()[order].numpy()
    panel.scatter(
        x, y, 3 + 250 * shares / highest, shares, cmap=COLOURS, vmin=0, vmax=highest, edgecolors="white", lw=0.4
    )


def _shares(plan: QueryPlan, masses: Tensor, of_support: Tensor) -> str:
    """The shares that go to product and background, unless all is product, and to earlier queries, if any."""
    shares = []
    if not plan.is_foreground.all():
        foreground = float(masses[plan.is_foreground].sum())
        shares = [f"{foreground:.0%} to features of the product", f"{1 - foreground:.0%} to the background"]
    episodic = float(masses.sum() - of_support.sum())
    if episodic > 0:
        shares.append(f"{episodic:.0%} to what earlier images taught")
    return f": {', '.join(shares)}" if shares else ""


@torch.no_grad()
def draw_foreground(model: FoctModel, support: Sequence[Picture], foreground: Foreground) -> Figure:
    """Draw the foreground that was found in the support images, and the cells that the memory keeps.

    Args:
        model: The torch model of a fitted Foct.
        support: All support images in the order of the memory.
        foreground: The foreground finder of the fit.

    Returns:
        The figure, with at most the first six images.
    """
    masks = foreground(torch.stack([each.image for each in support]), model.extract(stack(support)))
    semantic = model.semantic
    dots = f"dots are the {semantic.features.shape[2]} cells of each image that the memory keeps"
    title = f"The support set: {dots}" if masks.all() else f"The support set: the product is outlined; {dots}"
    figure, panels = new_figure(1, min(len(support), _MOST), title)
    for number, (panel, picture) in enumerate(zip(panels[0], support, strict=False)):
        height, width = picture.image.shape[-2:]
        mask = masks[number][None, None].float()
        enlarged = torch.nn.functional.interpolate(mask, (height, width))[0, 0] > 0
        show_image(panel, picture.image, f"{picture.name}: {float(mask.mean()):.0%} product", enlarged)
        rows, columns = masks.shape[-2:]
        cells = model.locate(picture.prepared)[0][number].cpu()
        y = (cells // columns + 0.5) * height / rows - 0.5
        x = (cells % columns + 0.5) * width / columns - 0.5
        flags = semantic.is_foreground[number, 0].cpu()
        for is_product, colour in ((True, ORANGE), (False, BLUE)):
            chosen = flags == is_product
            panel.plot(x[chosen], y[chosen], ".", markersize=5, color=colour)
        counts = int(flags.sum()), int((~flags).sum())
        if counts[1]:
            panel.set_xlabel(
                f"{counts[0]} of the product (orange),\n{counts[1]} of the background (blue)", fontsize="small"
            )
    return figure


@dataclass(frozen=True)
class Growth:
    """Growth of the episodic memory over a stream of images.

    Args:
        pictures: The images, in order.
        sizes: Features in the memory after each image.
        added: Features that each image added, without those that compression dropped at once.
        remaining: Features of each image that are in the memory after the last one.
    """

    pictures: tuple[Picture, ...]
    sizes: tuple[int, ...]
    added: tuple[int, ...]
    remaining: tuple[int, ...]


def memory_growth(model: FoctModel, pictures: Iterable[Picture]) -> Growth:
    """Score images with an online model, one after another, from an empty episodic memory, which is then restored.

    Args:
        model: The torch model of a fitted Foct with ``online=True``.
        pictures: The images, as :func:`pictures_of` prepares them for the model.

    Returns:
        Growth of the memory over these images.

    Raises:
        ValueError: If the model is not online.
    """
    if not model.settings.online:
        msg = "this Foct does not learn from the images that it scores; train one with --model.online true"
        raise ValueError(msg)
    # Number of the image that a feature comes from, by the feature's bytes.
    origin: dict[bytes, int] = {}
    shown, sizes, added = [], [], []
    with model.forgetting():
        for number, picture in enumerate(pictures):
            with torch.no_grad():
                model(picture.prepared[None])
            rows = [row.tobytes() for row in model.episodic.features.cpu().numpy()]
            fresh = [row for row in rows if row not in origin]
            origin.update(dict.fromkeys(fresh, number))
            shown.append(picture)
            sizes.append(len(rows))
            added.append(len(fresh))
    left = Counter(origin[row] for row in (rows if shown else ()))
    return Growth(tuple(shown), tuple(sizes), tuple(added), tuple(left[number] for number in range(len(shown))))


def draw_growth(growth: Growth) -> Figure:
    """Draw the size of the episodic memory after each image, and the sources of its features at the end.

    Args:
        growth: From :func:`memory_growth`.

    Returns:
        The figure.
    """
    title = "Growth of the episodic memory over a stream of images; only normal-looking cells of anomalous images enter"
    figure, ((sizes, remaining),) = new_figure(1, 2, title, 4.2)
    for panel in (sizes, remaining):
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.tick_params(labelsize="small")
    sizes.yaxis.set_major_locator(AutoLocator())
    numbers = np.arange(1, len(growth.pictures) + 1)
    sizes.step(numbers, growth.sizes, where="post", color="grey")
    labels = [picture.label for picture in growth.pictures]
    for label in dict.fromkeys(labels):
        chosen = np.array([each == label for each in labels])
        colour, name = _COLOUR_OF_LABEL[label], _NAME_OF_LABEL[label]
        teaches = f"{name}: {sum(np.array(growth.added)[chosen] > 0)} of {chosen.sum()} images add features"
        sizes.scatter(numbers[chosen], np.array(growth.sizes)[chosen], s=14, color=colour, label=teaches, zorder=3)
    sizes.set_xlabel("picture")
    sizes.set_ylabel("features in the memory")
    sizes.set_ylim(0, 1.3 * max(growth.sizes, default=1) + 1)
    sizes.set_title("size after each image; compression makes it fall", fontsize="small")
    sizes.legend(fontsize="x-small", loc="upper right")
    order = sorted(range(len(labels)), key=lambda number: -growth.remaining[number])
    kept = [number for number in order if growth.remaining[number]][:_NAMES]
    remaining.barh(
        [growth.pictures[number].name for number in kept],
        [growth.remaining[number] for number in kept],
        color=[_COLOUR_OF_LABEL[labels[number]] for number in kept],
    )
    remaining.set_yticks(range(len(kept)), [growth.pictures[number].name for number in kept])
    remaining.invert_yaxis()
    remaining.set_xlabel("features")
    remaining.set_title("whose features are left at the end", fontsize="small")
    return figure
