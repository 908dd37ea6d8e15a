"""The split of pictures that a model was trained with: recorded, and used again where a data module draws another."""

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
# What decides which pictures a data module has, and which of them go where, beside its seed.
_DECIDE = ("_dir", "_split_mode", "_split_ratio", "held_out")


class Split(TypedDict):
    """Which pictures a model was trained on and which were held out, as a checkpoint holds it.

    A picture is known by eight bytes that are computed from its path, relative to the data module's root, and the size
    of its file. The folder may have moved since.

    Attributes:
        settings: The settings of the data module that decide the split, apart from its seed.
        trained: The pictures (n,) that the model was trained on.
        parts: The pictures of each part of the data module that draws the split.
    """

    settings: str
    trained: Tensor
    parts: dict[str, Tensor]


def split_of(data: AnomalibDataModule) -> Split | None:
    """The split of a data module.

    Args:
        data: The data module, which is set up.

    Returns:
        The split; None where the data module has no list of picture files.
    """
    *_, inner = _chain(data)
    parts = {part: known for part in _PARTS if (known := _pictures(inner, part, inner)) is not None}
    trained = _pictures(data, _TRAINING, inner)
    if trained is None or _TRAINING not in parts:
        return None
    return {"settings": _settings(inner), "trained": trained, "parts": parts}


def use_split(data: AnomalibDataModule, split: Split) -> int:
    """Put the pictures of a data module back where they were in training, if only its draw differs.

    Pictures that were not there in training stay where they are.

    Args:
        data: The data module, which is set up.
        split: The split of the training.

    Returns:
        The number of held-out pictures that had been trained on, and are held out no more.
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
    """Number of held-out pictures of a data module, which is set up, that a model was trained on."""
    return int(torch.isin(_held_out(data), split["trained"]).sum())


def count_held_out(data: AnomalibDataModule) -> int:
    """Number of pictures in the validation and test sets of a data module, which is set up."""
    return len(_held_out(data))


def overlaps(split: Split) -> bool:
    """Whether a training held out pictures that it was trained on too."""
    held_out = [split["parts"][part] for part in _HELD_OUT if part in split["parts"]]
    return bool(held_out) and bool(torch.isin(torch.cat(held_out), split["trained"]).any())


def joined(split: Split | None, earlier: Split | None) -> Split | None:
    """The split of a training that went on from an earlier one, and so knows the pictures of both."""
    if split is None or earlier is None:
        return split or earlier
    return {**split, "trained": torch.cat([split["trained"], earlier["trained"]]).unique()}


def _chain(data: AnomalibDataModule) -> Iterator[AnomalibDataModule]:
    """A data module, the one that it wraps, and so on."""
    yield data
    if isinstance(data, WrappedDataModule):
        yield from _chain(data.datamodule)


def _held_out(data: AnomalibDataModule) -> Tensor:
    """The pictures (n,) in the validation and test sets of a data module, each once."""
    *_, inner = _chain(data)
    parts = [known for part in _HELD_OUT if (known := _pictures(data, part, inner)) is not None]
    return torch.cat(parts).unique() if parts else torch.empty(0, dtype=torch.int64)


def _pictures(data: AnomalibDataModule, part: str, inner: AnomalibDataModule) -> Tensor | None:
    """Eight bytes (n,) for each picture of a part of a data module, None where its files are not known."""
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
    # A name need not be UTF-8.
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
    """Give each part of a data module the pictures that it is recorded with, and keep what is not recorded."""
    samples = {part: getattr(data, part).samples for part in now}
    pool = pd.concat([*samples.values()], ignore_index=True)
    # One of several rows of a picture, as where the validation set is the test set.
    rows = {picture: row for row, picture in enumerate(torch.cat([*now.values()]).tolist())}
    known = set(torch.cat([*recorded.values()]).tolist())
    for part, pictures in now.items():
        theirs = [picture for picture in recorded.get(part, pictures).tolist() if picture in rows]
        fresh = [picture for picture in pictures.tolist() if picture not in known]
        frame = pool.iloc[[rows[picture] for picture in dict.fromkeys([*theirs, *fresh])]].reset_index(drop=True)
        frame.attrs = samples[part].attrs
        getattr(data, part).samples = frame
