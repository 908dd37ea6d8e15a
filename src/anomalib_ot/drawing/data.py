"""The pictures that views are drawn from, by what the model may have seen of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anomalib.data import ImageItem, PredictDataset
from anomalib.data.utils import LabelName

Items = Sequence[ImageItem]


@dataclass(frozen=True)
class Data:
    """Pictures to explain, and those that the model may have seen.

    Args:
        name: What they are called.
        shown: The pictures to choose from.
        training: The training set, empty where it is not known.
        held_out: Normal pictures of the validation set.
        why_none: Why there are none, if there are none.
        outside: Reads a file or a folder of others, as these are read.
    """

    name: str
    shown: Items
    training: Items = ()
    held_out: Items = ()
    why_none: str = ""
    outside: Callable[[Path], Any] = PredictDataset


def paths_of(items: Items) -> list[str]:
    """Files of the pictures of a data set, which need not be read for that."""
    if isinstance(items, PredictDataset):
        return [str(path) for path in items.image_filenames]
    return [str(path) for path in items.samples.image_path] if hasattr(items, "samples") else []


def labels_of(items: Items) -> list[bool | None]:
    """Whether the pictures of a data set show anomalies, None where that is not known, likewise."""
    if not hasattr(items, "samples"):
        return [None] * len(items)
    known = {LabelName.NORMAL: False, LabelName.ABNORMAL: True}
    return [known.get(label) for label in items.samples.label_index]
