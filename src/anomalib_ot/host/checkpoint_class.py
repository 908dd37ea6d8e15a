"""The class of the model in a checkpoint."""

from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from anomalib.models.components import AnomalibModule

from anomalib_ot import MODELS

from .checkpoint_record import recorded_model

if TYPE_CHECKING:
    from .checkpoints import SafeCheckpoints


def recorded_name(content: Mapping[str, Any], path: Path) -> str:
    """Name of the class that a checkpoint records, or, in the first format, that the names of its tensors imply.

    Args:
        content: The checkpoint.
        path: Its file, for the error message.

    Raises:
        ValueError: If it is not a model of this package.
    """
    name = recorded_model(content)
    if name is None:
        name = _name_by_tensors(content["state_dict"])
    if name not in MODELS:
        msg = f"{path} is a checkpoint of {name or 'an unknown model'}; only {', '.join(MODELS)} can be loaded"
        raise ValueError(msg)
    return name


def class_of(name: str) -> type[AnomalibModule]:
    """The class of a model with this name."""
    return cast("type[AnomalibModule]", getattr(import_module(MODELS[name]), name))


def _name_by_tensors(tensors: Iterable[str]) -> str | None:
    """Name of the class that the names of tensors imply, in a checkpoint of the first format."""
    names = tuple(tensors)
    for model in MODELS:
        marks = cast("type[SafeCheckpoints]", class_of(model)).checkpoint_rules.marks
        if any(name.startswith(marks) for name in names):
            return model
    return None
