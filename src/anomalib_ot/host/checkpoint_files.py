"""Reading of checkpoint files: damaged, unsafe and foreign files are refused before any of their code runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import BadZipFile, ZipFile, is_zipfile

import torch
from packaging.version import InvalidVersion
from torch import Tensor

from anomalib_ot.files import DAMAGED_ARCHIVE

# Errors of torch's reader on damaged content; RuntimeError too, but only before the archive is known to be complete.
_DAMAGED_CONTENT = (
    *(AttributeError, IndexError, InvalidVersion, KeyError, OverflowError, TypeError, UnicodeDecodeError),
    *(EOFError, UnpicklingError),
)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read the checkpoint of a model without running code in it.

    Args:
        path: The file.

    Returns:
        The content. The tensors are mapped from the file, so that only the used ones are read.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it is damaged, is not a checkpoint, or holds more than tensors and settings.
    """
    require_exists(path)
    _require_whole(path)
    with _naming(path, _DAMAGED_CONTENT):
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if not _is_of_a_model(content):
        msg = f"{path} is not a checkpoint of a trained model; give the model.ckpt that anomalib train wrote."
        raise ValueError(msg)
    return content


def require_exists(path: str | Path) -> None:
    """Check that there is a checkpoint.

    Raises:
        FileNotFoundError: If the file does not exist.
    """
    if not Path(path).is_file():
        msg = f"there is no checkpoint {path}"
        raise FileNotFoundError(msg)


def _require_whole(path: str | Path) -> None:
    """Refuse a file that is not a complete archive of tensors and settings."""
    with _naming(path, (*_DAMAGED_CONTENT, *DAMAGED_ARCHIVE)):
        if not is_zipfile(path):
            msg = f"{path} is not a complete checkpoint: it is truncated, or another file. Copy it again, or train."
            raise ValueError(msg)
        # torch does not verify checksums, and would load a tensor with a flipped bit.
        bad = _first_bad_part(path)
        if bad:
            msg = f"the checksum of {bad} does not match"
            raise BadZipFile(msg)
        try:
            unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        except ValueError as error:
            # An archive without the layout of torch.
            raise BadZipFile(str(error)) from error
    if unsafe:
        msg = (
            f"{path} holds more than tensors and settings ({', '.join(unsafe[:3])}), and could run any code when it is "
            "loaded. If you trust its source, load it in Python with load_from_checkpoint(path, "
            "weights_only=False); an exported .pt file is for anomalib's TorchInferencer."
        )
        raise ValueError(msg)


def _first_bad_part(path: str | Path) -> str | None:
    try:
        with ZipFile(path) as archive:
            return archive.testzip()
    except OSError as error:
        # An offset beyond the end of the file.
        raise BadZipFile(str(error)) from error


def _is_of_a_model(content: Any) -> bool:
    if not isinstance(content, dict) or not {"state_dict", "pytorch-lightning_version"} <= content.keys():
        return False
    tensors, settings = content["state_dict"], content.get("hyper_parameters", {})
    return (
        isinstance(tensors, dict)
        and all(isinstance(each, Tensor) for each in tensors.values())
        and isinstance(settings, dict)
        and all(isinstance(name, str) for name in settings)
    )


@contextmanager
def _naming(path: str | Path, damage: tuple[type[Exception], ...]) -> Iterator[None]:
    """Replace the error of damaged content by one that names the file."""
    try:
        yield
    except damage as error:
        msg = f"{path} is damaged, or of another version: it cannot be read ({error!r}). Copy it again, or train."
        raise ValueError(msg) from error
