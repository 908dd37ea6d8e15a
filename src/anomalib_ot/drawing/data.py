"""The images of the views: images to explain, training images, and held-out normal images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anomalib.data import ImageItem, PredictDataset
from anomalib.data.utils import LabelName

Items = Sequence[ImageItem]


@dataclass(frozen=True)
class Data:
    """Images to explain, with the training and validation images.

    Args:
        name: Name of the data.
        shown: The images to choose from.
        training: The training set, empty if it is unknown.
        held_out: Normal images of the validation set.
        why_none: Reason if there are no held-out images.
        outside: Reads a file or a folder of other images in the same way.
    """

    name: str
    shown: Items
    training: Items = ()
    held_out: Items = ()
    why_none: str = ""
    outside: Callable[[Path], Any] = PredictDataset


def paths_of(items: Items) -> list[str]:
    """Paths of the images of a data set, without reading the images."""
    if isinstance(items, PredictDataset):
        return [str(path) for path in items.image_filenames]
    return [str(path) for path in items.samples.image_path] if hasattr(items, "samples") else []


def labels_of(items: Items) -> list[bool | None]:
    """Labels of the images of a data set, None if unknown, without reading the images."""
    if not hasattr(items, "samples"):
        return [None] * len(items)
    known = {LabelName.NORMAL: False, LabelName.ABNORMAL: True}
    return [known.get(label) for label in items.samples.label_index]
