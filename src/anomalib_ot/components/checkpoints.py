"""Checkpoints that do not fit a model are refused in words."""

from collections.abc import Mapping, Sequence
from typing import Any

from anomalib.models.components import AnomalibModule
from torch import Tensor


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
