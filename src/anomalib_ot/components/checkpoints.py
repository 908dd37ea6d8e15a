"""Checkpoints that cannot be loaded, or do not fit a model, are refused in words."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast
from zipfile import BadZipFile, ZipFile, is_zipfile

import torch
from anomalib.engine.plugins.checkpoint_io import AnomalibCheckpointIO
from anomalib.models.components import AnomalibModule
from anomalib.utils.serialization import anomalib_safe_globals
from packaging.version import InvalidVersion
from torch import Tensor

from .backbones import BackboneError
from .files import DAMAGED_ARCHIVE

# What is raised, by torch's reader or whoever takes the content for whole.
_DAMAGE = (
    *(AttributeError, IndexError, InvalidVersion, KeyError, OverflowError, TypeError, UnicodeDecodeError),
    *(UnpicklingError, *DAMAGED_ARCHIVE),
)


def refuse_another_architecture(
    model: AnomalibModule, checkpoint: Mapping[str, Any], settings: Sequence[str], learned: Sequence[str]
) -> None:
    """Refuse the checkpoint of another architecture.

    Args:
        model: Model that the checkpoint is to be loaded into.
        checkpoint: Checkpoint, with its ``state_dict``.
        settings: Hyper-parameters that make the architecture.
        learned: Parts of the names of tensors that training shapes.

    Raises:
        ValueError: If tensors are missing, unknown or of another shape.
    """
    difference = _difference(model.state_dict(), checkpoint["state_dict"], learned)
    if difference:
        theirs = {key: checkpoint.get("hyper_parameters", {}).get(key) for key in settings}
        ours = {key: model.hparams.get(key) for key in settings}
        name = type(model).__name__
        msg = (
            f"the checkpoint is of another architecture: {difference}. It was made with {theirs}, this model has "
            f"{ours}. Give this model the checkpoint's settings, or let {name}.load_from_checkpoint take them."
        )
        raise ValueError(msg)


def _difference(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], learned: Sequence[str]) -> str | None:
    """The first way in which a state dict does not fit the torch model, in words."""
    ours = {name: value for name, value in ours.items() if name.startswith("model.")}
    theirs = {name: value for name, value in theirs.items() if name.startswith("model.")}
    if missing := sorted(ours.keys() - theirs.keys()):
        return f"it lacks {missing[0]}"
    if unknown := sorted(theirs.keys() - ours.keys()):
        return f"it has {unknown[0]}, which this model lacks"
    for name, value in ours.items():
        # What a model learns has no shape before it is fitted.
        is_learned = any(part in name for part in learned)
        if value.numel() and not is_learned and theirs[name].shape != value.shape:
            return f"{name} is of shape {tuple(theirs[name].shape)}, not {tuple(value.shape)}"
    return None


class SafeCheckpoints:
    """Part of a Lightning model that says which checkpoint cannot be loaded, and why.

    Nothing is unpickled but tensors and settings, unless ``weights_only=False`` is given.
    """

    def setup(self, stage: str) -> None:
        """Let the trainer look at checkpoints before it loads them."""
        model = cast("AnomalibModule", super())
        model.setup(stage)
        strategy = cast("AnomalibModule", self).trainer.strategy
        # Whoever brings a plugin of his own keeps it.
        if type(strategy.checkpoint_io) is AnomalibCheckpointIO:
            strategy.checkpoint_io = _CheckingCheckpointIO(model.checkpoint_safe_globals())

    @classmethod
    def load_from_checkpoint(
        cls, checkpoint_path: str | Path, *args: Any, weights_only: bool = True, **kwargs: Any
    ) -> "AnomalibModule":
        """Load a model from a Lightning checkpoint.

        Args:
            checkpoint_path: Path of the file.
            *args: As the host's.
            weights_only: Refuse whatever is neither a tensor nor a setting, which may run code when it is loaded.
            **kwargs: As the host's.

        Returns:
            The model.

        Raises:
            ValueError: If the file is no whole checkpoint of a model, or holds more than tensors and settings.
        """
        model = cast("type[AnomalibModule]", super())
        if weights_only and Path(checkpoint_path).is_file():
            with anomalib_safe_globals(model.checkpoint_safe_globals()):
                refuse_unreadable(checkpoint_path)
        kwargs["weights_only"] = weights_only
        with _naming(checkpoint_path):
            return model.load_from_checkpoint(checkpoint_path, *args, **kwargs)


class _CheckingCheckpointIO(AnomalibCheckpointIO):
    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = True) -> dict[str, Any]:
        # The trainer leaves it open by default, which torch takes for weights alone.
        if weights_only is not False and Path(path).is_file():
            with anomalib_safe_globals(self.extra_safe_globals):
                refuse_unreadable(path)
        with _naming(path):
            return super().load_checkpoint(path, map_location, weights_only=weights_only is not False)


def refuse_unreadable(path: str | Path) -> None:
    """Refuse a file that is no checkpoint of a model, without running anything in it.

    Args:
        path: The file.

    Raises:
        ValueError: If it is truncated or something else, or holds more than tensors and settings.
    """
    with _naming(path):
        if not is_zipfile(path):
            msg = (
                f"{path} is not a whole checkpoint: it was cut off, or is another kind of file. Copy it anew, or train."
            )
            raise ValueError(msg)
        # torch does not look at the checksums: a tensor with another bit would be loaded.
        bad = _first_bad_part(path)
        if bad:
            msg = f"{bad} has another checksum"
            raise BadZipFile(msg)
        try:
            unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        except ValueError as error:
            # An archive that does not begin as those of torch.
            raise BadZipFile(str(error)) from error
        if unsafe:
            msg = (
                f"{path} holds more than tensors and settings ({', '.join(unsafe[:3])}), and could run any code when "
                "it is loaded. If you trust where it is from, load it in Python with load_from_checkpoint(path, "
                "weights_only=False); an exported .pt file is for anomalib's TorchInferencer."
            )
            raise ValueError(msg)
        # Mapped, tensors are not read.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if not _is_of_a_model(content):
        msg = f"{path} is not a checkpoint of a trained model; give the model.ckpt that anomalib train wrote."
        raise ValueError(msg)


def _first_bad_part(path: str | Path) -> str | None:
    try:
        with ZipFile(path) as archive:
            return archive.testzip()
    except OSError as error:
        # An offset that leads out of the file.
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
def _naming(path: str | Path) -> Iterator[None]:
    """Turn what damaged content fails with, in torch, the host or a model, into an error that names the file."""
    try:
        yield
    except BackboneError:
        raise
    except _DAMAGE as error:
        msg = f"{path} is damaged, or of another version: it cannot be loaded ({error!r}). Copy it anew, or train."
        raise ValueError(msg) from error
