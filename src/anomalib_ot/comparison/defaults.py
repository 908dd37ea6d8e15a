"""Default settings of a model for a given backbone.

By default, anomalib's models use the layers of a ResNet. On other networks they use the last layer of the same stride.
On EfficientNet-Lite0 these are the layers of the shipped plans: ``blocks.2`` for ``layer2``, ``blocks.4`` for
``layer3``. The models of this package choose their layers themselves, see
:mod:`anomalib_ot.features.backbone_defaults`; the plan names them for the report.
"""

from collections.abc import Sequence
from inspect import signature
from typing import Any, NamedTuple

from anomalib.models import Fre, Padim

from anomalib_ot.features.backbone_defaults import default_layers, last_by_stride
from anomalib_ot.features.backbones import Layer, layers_of_backbone
from anomalib_ot.host.checkpoints import SafeCheckpoints

_RESNET_STRIDES = {"layer1": 4, "layer2": 8, "layer3": 16, "layer4": 32}
# Backbones for which PaDiM has a default number of features.
_KNOWN_TO_PADIM = ("resnet18", "wide_resnet50_2")
# PaDiM's own number for ResNet-18; the shipped plans use it for EfficientNet-Lite0.
_PADIM_FEATURES = 100
_WHY = "default on this backbone"


class Default(NamedTuple):
    """The value of a setting, and the reason that the report gives for it."""

    value: Any
    why: str


def defaults_for(kind: type, given: dict[str, Any], image_size: Sequence[int]) -> dict[str, Default]:
    """Settings that a class needs in addition to the given arguments.

    Args:
        kind: Class of the model.
        given: Arguments that are already set.
        image_size: Height and width in pixels.

    Returns:
        The settings by name; empty if the defaults of the class are valid.
    """
    own = {name: each.default for name, each in signature(kind).parameters.items()}
    backbone = given.get("backbone", own.get("backbone"))
    try:
        network = {layer.name: layer for layer in layers_of_backbone(backbone)} if isinstance(backbone, str) else {}
    except (OSError, RuntimeError, ValueError):
        # The run will fail and report this error.
        return {}
    if issubclass(kind, SafeCheckpoints):
        return _layers_of_ours(kind, given, network)
    found = _default_layers(own, given, network)
    settings = {**own, **given, **{name: default.value for name, default in found.items()}}
    names = [settings["layer"]] if "layer" in settings else settings.get("layers") or ()
    if not names or not {*names} <= network.keys():
        return found
    layers = [network[name] for name in names]
    if issubclass(kind, Padim) and not settings["n_features"] and backbone not in _KNOWN_TO_PADIM:
        features = min(_PADIM_FEATURES, sum(layer.channels for layer in layers))
        found["n_features"] = Default(features, "required with this backbone")
    if issubclass(kind, Fre) and "input_dim" not in given:
        found |= _fre_input(settings, layers[0], image_size)
    return found


def _layers_of_ours(
    kind: type[SafeCheckpoints], given: dict[str, Any], network: dict[str, Layer]
) -> dict[str, Default]:
    """Layers that a model of this package uses, unless they are those of a ResNet."""
    layers = default_layers(network.values(), kind.checkpoint_rules.settings.strides)
    if "layers" in given or {*layers} <= _RESNET_STRIDES.keys():
        return {}
    return {"layers": Default([*layers], _WHY)}


def _default_layers(own: dict[str, Any], given: dict[str, Any], network: dict[str, Layer]) -> dict[str, Default]:
    """Layers that replace the default layers of a class, if the network does not have these."""
    last = last_by_stride(network.values())
    for name in {name for name in ("layer", "layers") if isinstance(own.get(name), str | Sequence)} - given.keys():
        wanted = [own[name]] if name == "layer" else list(own[name])
        layers = [last.get(_RESNET_STRIDES.get(each, 0), "") for each in wanted]
        if all(layers) and not {*wanted} <= network.keys():
            return {name: Default(layers[0] if name == "layer" else layers, _WHY)}
    return {}


def _fre_input(settings: dict[str, Any], layer: Layer, image_size: Sequence[int]) -> dict[str, Default]:
    """Number of pooled features of an image, which FRE does not compute itself."""
    cells = [-(-side // layer.stride) // settings["pooling_kernel_size"] for side in image_size]
    inputs = layer.channels * cells[0] * cells[1]
    if inputs == settings["input_dim"]:
        return {}
    return {"input_dim": Default(inputs, "required with this backbone and image size")}
