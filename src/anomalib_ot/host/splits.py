"""The split of images that a model was trained with: recorded, and restored if a data module draws another."""

import os
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypedDict, cast

import pandas as pd
import torch
from anomalib.data import AnomalibDataModule
from torch import Tensor

from anomalib_ot.data.wrapped import WrappedDataModule

_TRAINING, *_HELD_OUT = _PARTS = ("train_data", "val_data", "test_data")
# Endings of the settings that decide which images a data module has and how it splits them, besides its seed.
_DECIDE = ("_dir", "_split_mode", "_split_ratio", "held_out")


class Split(TypedDict):
    """The images that a model was trained on and those that were held out, as stored in a checkpoint.

    An image is identified by an 8-byte hash of its path, relative to the root of the data module, and the size of its
    file. The folder may be moved.

    Attributes:
        settings: The settings of the data module that decide the split, except its seed.
        trained: The images (n,) that the model was trained on, in int64.
        parts: The images (n,) of each part of the data module that draws the split.
    """

    settings: str
    trained: Tensor
    parts: dict[str, Tensor]


def split_of(data: AnomalibDataModule) -> Split | None:
    """The split of a data module.

    Args:
        data: The data module, which is set up.

    Returns:
        The split; None if the data module has no list of image files.
    """
    *_, inner = _chain(data)
    parts = {part: known for part in _PARTS if (known := _images(inner, part, inner)) is not None}
    trained = _images(data, _TRAINING, inner)
    if trained is None or _TRAINING not in parts:
        return None
    return {"settings": _settings(inner), "trained": trained, "parts": parts}


def use_split(data: AnomalibDataModule, split: Split) -> int:
    """Restore the split of the training in a data module, if only its random draw differs.

    Images that did not exist in training stay in their part.

    Args:
        data: The data module, which is set up.
        split: The split of the training.

    Returns:
        The number of images that the model was trained on and that are no longer held out.
    """
    chain = [*_chain(data)]
    inner = chain[-1]
    now = split_of(data)
    if now is None or now["settings"] != split["settings"] or not _differ(now["parts"], split["parts"]):
        return 0
    before = trained_but_held_out(data, split)
    _sort(inner, now["parts"], split["parts"])
    for wrapper in reversed(chain[:-1]):
        cast("WrappedDataModule", wrapper).derive()
    return max(0, before - trained_but_held_out(data, split))


def trained_but_held_out(data: AnomalibDataModule, split: Split) -> int:
    """Number of held-out images of a data module, which is set up, that a model was trained on."""
    return int(torch.isin(_held_out(data), split["trained"]).sum())


def count_held_out(data: AnomalibDataModule) -> int:
    """Number of images in the validation and test sets of a data module, which is set up."""
    return len(_held_out(data))


def overlaps(split: Split) -> bool:
    """Whether the held-out images of a training include images that it was trained on."""
    held_out = [split["parts"][part] for part in _HELD_OUT if part in split["parts"]]
    return bool(held_out) and bool(torch.isin(torch.cat(held_out), split["trained"]).any())


def joined(split: Split | None, earlier: Split | None) -> Split | None:
    """The split of a training that continued an earlier one, with the training images of both."""
    if split is None or earlier is None:
        return split or earlier
    return {**split, "trained": torch.cat([split["trained"], earlier["trained"]]).unique()}


def _chain(data: AnomalibDataModule) -> Iterator[AnomalibDataModule]:
    """A data module, the one that it wraps, and so on inwards."""
    yield data
    if isinstance(data, WrappedDataModule):
        yield from _chain(data.datamodule)


def _held_out(data: AnomalibDataModule) -> Tensor:
    """The distinct images (n,) in the validation and test sets of a data module."""
    *_, inner = _chain(data)
    parts = [known for part in _HELD_OUT if (known := _images(data, part, inner)) is not None]
    return torch.cat(parts).unique() if parts else torch.empty(0, dtype=torch.int64)


def _images(data: AnomalibDataModule, part: str, inner: AnomalibDataModule) -> Tensor | None:
    """Hashes (n,) of the images in a part of a data module, in int64; None if its files are not known."""
    samples = getattr(getattr(data, part, None), "samples", None)
    if samples is None or "image_path" not in samples:
        return None
    root = getattr(inner, "root", None)
    folder = Path(root).resolve() if root else None
    paths = [_name(path, folder) for path in samples.image_path]
    digests = [int.from_bytes(blake2b(each, digest_size=8).digest(), "big", signed=True) for each in paths]
    return torch.tensor(digests, dtype=torch.int64)


def _name(path: str, folder: Path | None) -> bytes:
    whole = Path(path).resolve()
    name = (whole.relative_to(folder) if folder and whole.is_relative_to(folder) else whole).as_posix()
    size = whole.stat().st_size if whole.is_file() else 0
    # A file name may contain bytes that are not UTF-8.
    return os.fsencode(f"{name} {size}")


def _settings(data: AnomalibDataModule) -> str:
    decisive = {name: _plain(value) for name, value in vars(data).items() if name.endswith(_DECIDE)}
    return f"{type(data).__name__} {sorted(decisive.items())}"


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if value is None else str(getattr(value, "value", value))


def _differ(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() != theirs.keys() or any(
        not torch.equal(ours[part].sort().values, theirs[part].sort().values) for part in ours
    )


def _sort(data: AnomalibDataModule, now: dict[str, Tensor], recorded: dict[str, Tensor]) -> None:
    """Give each part of a data module its recorded images, and keep the images without a record."""
    samples = {part: getattr(data, part).samples for part in now}
    pool = pd.concat([*samples.values()], ignore_index=True)
    # One row of each image; it has several if the validation set is the test set.
    rows = {image: row for row, image in enumerate(torch.cat([*now.values()]).tolist())}
    known = set(torch.cat([*recorded.values()]).tolist())
    for part, images in now.items():
        theirs = [image for image in recorded.get(part, images).tolist() if image in rows]
        fresh = [image for image in images.tolist() if image not in known]
        frame = pool.iloc[[rows[image] for image in dict.fromkeys([*theirs, *fresh])]].reset_index(drop=True)
        frame.attrs = samples[part].attrs
        getattr(data, part).samples = frame
