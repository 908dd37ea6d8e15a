"""Select the images to explain: the requested ones, or informative ones."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from statistics import median

from anomalib.data import ImageItem
from anomalib.models.components import AnomalibModule
from PIL import Image

from anomalib_ot.drawing.data import Data, Items, labels_of, paths_of
from anomalib_ot.drawing.pictures import name_of
from anomalib_ot.host.scale import scale_of
from anomalib_ot.images.reading import naming_unreadable

REASONS = ("highest score", "nearest to the threshold", "a typical normal image")


@dataclass(frozen=True)
class Chosen:
    """An image to explain.

    Args:
        items: The data set that contains it.
        index: Its index in the data set.
        reason: Why it was chosen.
    """

    items: Items
    index: int
    reason: str

    def read(self) -> ImageItem:
        """The image, with its label and mask if they are known."""
        return self.items[self.index]


def requested(data: Data, names: Sequence[str]) -> list[Chosen]:
    """Find images by name.

    Args:
        data: The images of the data. Names are searched there first.
        names: Names of images such as ``scratch/003`` or ``003``, or files and folders of images, which need not be
            part of the data.

    Returns:
        The images, each once. A file that is part of the data keeps its label and mask.

    Raises:
        ValueError: If a name matches no image or several, or a file cannot be read.
    """
    found: dict[str, Chosen] = {}
    for name in names:
        for path, chosen in _by_name(data, name) or _by_path(data, name):
            found.setdefault(path, chosen)
    return [*found.values()]


def _by_name(data: Data, name: str) -> list[tuple[str, Chosen]]:
    """The image with this name and its path, if there is one."""
    paths = paths_of(data.shown)
    hits = [index for index, path in enumerate(paths) if name in {path, name_of(path), Path(path).stem}]
    if len(hits) > 1:
        msg = f"{name!r} matches {', '.join(name_of(paths[index]) for index in hits)}; give one of these names"
        raise ValueError(msg)
    return [(paths[index], Chosen(data.shown, index, "requested")) for index in hits]


def _by_path(data: Data, name: str) -> Iterator[tuple[str, Chosen]]:
    """The images of a file or a folder, with their paths."""
    if not Path(name).expanduser().exists():
        known = [name_of(path) for path in paths_of(data.shown)]
        near = get_close_matches(name, known) or known[:3]
        msg = f"{name!r} is neither an image of the data, such as {', '.join(near)}, nor a file or a folder"
        raise ValueError(msg)
    known_files = _files(data)
    items = data.outside(Path(name).expanduser())
    for index, path in enumerate(paths_of(items)):
        own = known_files.get(Path(path).resolve())
        if own is None:
            # Before the model is loaded and other images are drawn.
            with naming_unreadable(path), Image.open(path) as image:
                image.load()
        yield own or (path, Chosen(items, index, "requested"))


def _files(data: Data) -> dict[Path, tuple[str, Chosen]]:
    """All files of the data. The images to choose from come last, so that they take precedence."""
    parts = (
        (data.training, "requested, a training image"),
        (data.held_out, "requested, a held-out normal image"),
        (data.shown, "requested"),
    )
    return {
        Path(path).resolve(): (path, Chosen(items, index, reason))
        for items, reason in parts
        for index, path in enumerate(paths_of(items))
    }


def informative(model: AnomalibModule, data: Data, scores: Mapping[str, float], count: int) -> list[Chosen]:
    """Choose informative images, alternately with the highest score, nearest to the threshold, and typical normal.

    Args:
        model: A fitted model of this package.
        data: The images.
        scores: Raw scores of all images to choose from, by path.
        count: Number of images.

    Returns:
        The images; fewer if there are fewer.
    """
    values = [scores[path] for path in paths_of(data.shown)]
    labels = labels_of(data.shown)
    threshold = scale_of(model, "image").raw_threshold
    border = median(values) if threshold is None else threshold
    # Unlabelled images count as predicted.
    normal = [
        index
        for index, (value, label) in enumerate(zip(values, labels, strict=True))
        if (value <= border if label is None else not label)
    ]
    middle = median(values[index] for index in normal) if normal else 0.0
    orders = (
        sorted(range(len(values)), key=lambda index: -values[index]),
        sorted(range(len(values)), key=lambda index: abs(values[index] - border)),
        sorted(normal, key=lambda index: abs(values[index] - middle)),
    )
    chosen: dict[int, str] = {}
    queues = [iter(order) for order in orders]
    while len(chosen) < min(count, len(values)):
        for reason, queue in zip(REASONS, queues, strict=True):
            fresh = next((index for index in queue if index not in chosen), None)
            if fresh is not None and len(chosen) < count:
                chosen[fresh] = reason
    return [Chosen(data.shown, index, reason) for index, reason in chosen.items()]
