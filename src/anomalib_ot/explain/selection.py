"""Which pictures to explain: those that are asked for, or some that tell most."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from statistics import median

from anomalib.data import ImageItem
from anomalib.models.components import AnomalibModule
from PIL import Image

from anomalib_ot.data.reading import naming_unreadable
from anomalib_ot.drawing.data import Data, Items, labels_of, paths_of
from anomalib_ot.drawing.pictures import name_of
from anomalib_ot.host.scale import scale_of

REASONS = ("highest score", "nearest to the threshold", "a usual normal one")


@dataclass(frozen=True)
class Chosen:
    """A picture to explain.

    Args:
        items: The pictures that it is one of.
        index: Its number among them.
        reason: Why it was chosen.
    """

    items: Items
    index: int
    reason: str

    def read(self) -> ImageItem:
        """The picture, with what is known of it."""
        return self.items[self.index]


def asked_for(data: Data, names: Sequence[str]) -> list[Chosen]:
    """Find pictures by name.

    Args:
        data: The pictures that a name is first looked for among.
        names: Names of pictures to choose from, as ``scratch/003`` or ``003``; or files and folders of pictures, which
            need not be part of the data.

    Returns:
        The pictures, each once. A file that is part of the data is taken with what they know of it.

    Raises:
        ValueError: If a name is of no picture or of several, or a file cannot be read.
    """
    found: dict[str, Chosen] = {}
    for name in names:
        for path, chosen in _by_name(data, name) or _by_path(data, name):
            found.setdefault(path, chosen)
    return [*found.values()]


def _by_name(data: Data, name: str) -> list[tuple[str, Chosen]]:
    """The picture of this name among those to choose from, with its path, if there is one."""
    paths = paths_of(data.shown)
    hits = [index for index, path in enumerate(paths) if name in {path, name_of(path), Path(path).stem}]
    if len(hits) > 1:
        msg = f"{name!r} may be any of {', '.join(name_of(paths[index]) for index in hits)}; say which"
        raise ValueError(msg)
    return [(paths[index], Chosen(data.shown, index, "asked for")) for index in hits]


def _by_path(data: Data, name: str) -> Iterator[tuple[str, Chosen]]:
    """The pictures of a file or a folder, with their paths."""
    if not Path(name).expanduser().exists():
        known = [name_of(path) for path in paths_of(data.shown)]
        near = get_close_matches(name, known) or known[:3]
        msg = f"{name!r} is none of the pictures, which are named like {', '.join(near)}, nor a file or a folder"
        raise ValueError(msg)
    known_files = _files(data)
    items = data.outside(Path(name).expanduser())
    for index, path in enumerate(paths_of(items)):
        own = known_files.get(Path(path).resolve())
        if own is None:
            # Now, before a model is loaded and others are drawn.
            with naming_unreadable(path), Image.open(path) as image:
                image.load()
        yield own or (path, Chosen(items, index, "asked for"))


def _files(data: Data) -> dict[Path, tuple[str, Chosen]]:
    """All files of the data, those to choose from last, which are taken first."""
    parts = (
        (data.training, "asked for, one of the training pictures"),
        (data.held_out, "asked for, one of the held-out normal pictures"),
        (data.shown, "asked for"),
    )
    return {
        Path(path).resolve(): (path, Chosen(items, index, reason))
        for items, reason in parts
        for index, path in enumerate(paths_of(items))
    }


def telling(model: AnomalibModule, data: Data, scores: Mapping[str, float], count: int) -> list[Chosen]:
    """Choose telling pictures: by turns of the highest score, nearest to the threshold, and usual normal.

    Args:
        model: A fitted model of ours.
        data: The pictures.
        scores: Raw scores of all that can be chosen, by path.
        count: How many.

    Returns:
        The pictures, fewer where there are not so many.
    """
    values = [scores[path] for path in paths_of(data.shown)]
    labels = labels_of(data.shown)
    threshold = scale_of(model, "image").raw_threshold
    border = median(values) if threshold is None else threshold
    # What nobody has labelled is taken for what the model takes it for.
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
