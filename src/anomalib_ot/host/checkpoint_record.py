"""The entry that this package adds to a checkpoint: format, model, backbone, tiles and components."""

from collections.abc import Mapping
from typing import Any, cast

from anomalib.data.utils.tiler import Tiler
from anomalib.models.components import AnomalibModule
from anomalib.pre_processing.utils.spec import transform_to_spec
from torch import nn

from anomalib_ot.features.recorded_backbones import record_backbone

from .checkpoint_rules import CheckpointRules

ENTRY = "anomalib_ot"
"""Key of the entry in a checkpoint."""

COMPONENTS = ("pre_processor", "post_processor")
"""Attributes of a Lightning model whose classes the entry records."""

# The first format had no entry. The others lack settings that came later.
_FORMAT = 5


def new_entry(model: AnomalibModule, backbone: Mapping[str, Any]) -> dict[str, Any]:
    """The entry of a model's checkpoint.

    Args:
        model: The Lightning model.
        backbone: Record of its backbone.

    Returns:
        Plain data.
    """
    return {
        "format": _FORMAT,
        "model": type(model).__name__,
        "backbone": backbone,
        "tiler": tiling(cast("Tiler | None", model.model.tiler)),
        "components": {name: described(getattr(model, name)) for name in COMPONENTS},
    }


def read_entry(checkpoint: Mapping[str, Any], model: str, rules: CheckpointRules) -> dict[str, Any]:
    """Read the entry of a checkpoint, and add the settings that it lacks because of its format.

    Args:
        checkpoint: Content of the checkpoint.
        model: Name of the model's class.
        rules: Rules of that class.

    Returns:
        The entry. For a checkpoint of the first format it has only ``format`` and ``backbone``.

    Raises:
        ValueError: If the checkpoint is of another model or of an unknown format, or lacks settings.
    """
    entry = _entry_of_known_format(checkpoint)
    if entry["format"] > 1 and entry["model"] != model:
        msg = f"the checkpoint is of {entry['model']}, not of {model}; give --model {entry['model']}"
        raise ValueError(msg)
    if entry["format"] < _FORMAT:
        checkpoint["hyper_parameters"].update({**rules.before, **checkpoint["hyper_parameters"]})
    if missing := sorted((rules.score | rules.training) - checkpoint["hyper_parameters"].keys()):
        msg = f"the checkpoint is not of {model}, or is damaged: it lacks the settings {', '.join(missing)}"
        raise ValueError(msg)
    if entry["format"] == 1:
        return {**entry, "backbone": _unrecorded_backbone(checkpoint["hyper_parameters"]["backbone"])}
    return entry


def recorded_model(checkpoint: Mapping[str, Any]) -> str | None:
    """Name of the class of a checkpoint's model.

    Args:
        checkpoint: Content of a checkpoint.

    Returns:
        The name; None if it is not recorded, as in the first format.

    Raises:
        ValueError: If the format of the checkpoint is unknown.
    """
    return _entry_of_known_format(checkpoint).get("model")


def tiling(tiler: Tiler | None) -> dict[str, Any] | None:
    """Arguments of a tiler, as plain data."""
    if tiler is None:
        return None
    return {
        "tile_size": [tiler.tile_size_h, tiler.tile_size_w],
        "stride": [tiler.stride_h, tiler.stride_w],
        "remove_border_count": tiler.remove_border_count,
        "mode": tiler.mode.value,
    }


def described(component: nn.Module | None) -> str | None:
    """Class of a component, with its transform if a checkpoint cannot store that."""
    if component is None:
        return None
    name = f"{type(component).__module__}.{type(component).__qualname__}"
    return name if is_stored(component) else f"{name} with {component.transform!r}"


def is_stored(component: nn.Module) -> bool:
    """Whether a checkpoint stores the transform of a component, if it has one."""
    try:
        transform_to_spec(getattr(component, "transform", None))
    except ValueError:
        return False
    return True


def _entry_of_known_format(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    entry = checkpoint.get(ENTRY, {"format": 1})
    if not isinstance(entry, dict) or entry.get("format") not in range(1, _FORMAT + 1):
        found = entry.get("format") if isinstance(entry, dict) else entry
        msg = (
            f"the checkpoint has the format {found!r}, but this anomalib-ot reads formats up to {_FORMAT}; run: "
            "pip install --upgrade anomalib-ot"
        )
        raise ValueError(msg)
    return entry


def _unrecorded_backbone(backbone: str) -> dict[str, Any]:
    """Record the backbone of a checkpoint of the first format, which holds only its name."""
    try:
        return record_backbone(backbone)
    except OSError as error:
        msg = (
            f"the checkpoint was written before checkpoints recorded their backbone, and {backbone} no longer exists "
            f"({error}). Load it in Python with the same backbone from another folder: "
            'load_from_checkpoint(path, backbone="local-dir:PATH")'
        )
        raise ValueError(msg) from error
