"""Whether the settings and tensors of a checkpoint fit a model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anomalib.models.components import AnomalibModule
from torch import Tensor

from .checkpoint_rules import CheckpointRules


def is_same(ours: Any, theirs: Any) -> bool:
    """Whether two values of a setting are equal; a checkpoint stores tuples as lists and paths as strings."""
    return _plain(ours) == _plain(theirs)


def require_fit(model: AnomalibModule, checkpoint: Mapping[str, Any], rules: CheckpointRules) -> None:
    """Refuse a checkpoint whose tensors do not fit a model.

    Args:
        model: The Lightning model.
        checkpoint: Content of the checkpoint.
        rules: Rules of the model's class.

    Raises:
        ValueError: If a tensor is missing, unknown or of another shape.
    """
    difference = _difference(model, checkpoint["state_dict"], rules)
    if difference:
        settings = sorted(rules.score)
        theirs = {key: checkpoint.get("hyper_parameters", {}).get(key) for key in settings}
        ours = {key: model.hparams.get(key) for key in settings}
        differing = [key for key in settings if not is_same(theirs[key], ours[key])]
        msg = (
            f"the checkpoint is of another architecture: {difference}. The checkpoint has "
            f"{ {key: theirs[key] for key in differing} }, this model has { {key: ours[key] for key in differing} }."
        )
        raise ValueError(msg)


def _difference(model: AnomalibModule, theirs: Mapping[str, Tensor], rules: CheckpointRules) -> str | None:
    """The first difference between a state dict and that of a model, in words."""
    parts = tuple(f"{part}." for part in rules.parts)
    ours = model.state_dict()
    # Components of the host may differ.
    of_model, in_theirs = ({name for name in state if name.startswith(parts)} for state in (ours, theirs))
    if missing := sorted(of_model - in_theirs):
        return f"it lacks {missing[0]}"
    if unknown := sorted(in_theirs - of_model):
        return f"it has {unknown[0]}, which this model lacks"
    # Their length follows from a validation.
    counted = {f"post_processor.{name}" for name in getattr(model.post_processor, "counted_buffers", ())}
    for name, value in ours.items():
        # Learned tensors have no shape before the model is fitted.
        is_learned = name in counted or any(part in name for part in rules.learned)
        if name in theirs and value.numel() and not is_learned and theirs[name].shape != value.shape:
            return f"{name} is of shape {tuple(theirs[name].shape)}, not {tuple(value.shape)}"
    return None


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value
