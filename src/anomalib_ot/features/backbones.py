"""Feature extractors from timm's backbones. A wrong name or missing weights raise an error instead of a warning."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, cast

import timm
import torch
from timm.models import parse_model_name
from torch import nn

from anomalib_ot.settings import require

from .backbone_sources import check_name, check_weights, is_remote, no_weights
from .map_extractor import MapExtractor, layers_of

_CHANNELS = 3


class Layer(NamedTuple):
    """A feature module of a network: name, number of channels, and stride of its map in pixels."""

    name: str
    channels: int
    stride: int


def backbone_name(backbone: str | Path) -> str:
    """Name of a backbone in timm, valid in other processes and in checkpoints.

    Args:
        backbone: timm's name of the network, ``hf-hub:REPOSITORY``, or ``local-dir:PATH`` for a folder written by
            ``timm.models.save_for_hf`` or by :func:`~anomalib_ot.offline.offline_backbone`. A ``Path`` is such a folder
            too. A path may start with ``~``.

    Returns:
        The name, with ``~`` expanded.

    Raises:
        TypeError: If it is neither a name nor a path. A network is refused too: a checkpoint cannot name it.
        ValueError: If it is empty, is a path without ``local-dir:``, or has another unknown prefix.

    Example:
        >>> backbone_name(Path("weights/resnet18"))
        'local-dir:weights/resnet18'
    """
    if isinstance(backbone, Path):
        return f"local-dir:{backbone.expanduser()}"
    if not isinstance(backbone, str):
        msg = (
            f"backbone must be timm's name of a network or the path of a folder, not {type(backbone).__name__}; "
            "to use a network, write it to a folder with timm.models.save_for_hf, and set backbone to local-dir:PATH"
        )
        raise TypeError(msg)
    if not backbone.strip():
        msg = 'backbone is empty; if it is "$(anomalib-ot weights …)", that command failed: run it alone to see why'
        raise ValueError(msg)
    source, name = parse_model_name(backbone)
    return f"local-dir:{Path(name).expanduser()}" if source == "local-dir" and name.startswith("~") else backbone


def create_extractor(
    backbone: str | Path,
    layers: Sequence[str],
    pre_trained: bool = True,
) -> MapExtractor:
    """Create a frozen feature extractor in evaluation mode.

    It differs from anomalib's ``TimmFeatureExtractor`` as follows. Unknown layers raise an error. Layers may be given
    in any order. With ``pre_trained``, no weight is left random. The maps of all networks have the same order of axes.

    Args:
        backbone: As in :func:`backbone_name`.
        layers: Names of timm's feature modules, such as ``layer2`` or ``blocks.4``, in any order.
        pre_trained: Whether to load the pre-trained weights.

    Returns:
        The extractor. It maps images (B, 3, H, W) to a dictionary of features (B, D, H', W') by layer, in the order of
        the network. Its ``layers`` and ``out_dims`` are in this order too.

    Raises:
        TypeError: If the backbone is neither a name nor a path.
        ValueError: If the backbone or a layer is unknown, if layers are repeated or missing, if the network does not
            accept images with three channels, or if the configuration in a local folder is damaged. The extractor
            itself raises it for images of a size that the network does not accept.
        FileNotFoundError: If a local folder lacks its configuration or its weights.
        BackboneError: If the weights cannot be downloaded, do not exist, or do not fit.

    Example:
        >>> import torch
        >>> extractor = create_extractor("resnet18", ["layer1", "layer2"], pre_trained=False)
        >>> {name: tuple(maps.shape) for name, maps in extractor(torch.zeros(1, 3, 64, 64)).items()}
        {'layer1': (1, 64, 16, 16), 'layer2': (1, 128, 8, 8)}
    """
    extractor = prepare_extractor(backbone, layers, pre_trained)
    fetch_weights(extractor)
    return extractor


def prepare_extractor(
    backbone: str | Path,
    layers: Sequence[str],
    pre_trained: bool = True,
) -> MapExtractor:
    """Create an extractor as :func:`create_extractor` does, but defer the download of its weights.

    The weights are downloaded by the first call of the extractor or by :func:`fetch_weights`. They are not downloaded
    if other weights are loaded before, such as those of a checkpoint.

    Args:
        backbone: As in :func:`create_extractor`.
        layers: As in :func:`create_extractor`.
        pre_trained: As in :func:`create_extractor`.

    Returns:
        The extractor.

    Raises:
        TypeError: As in :func:`create_extractor`.
        ValueError: As in :func:`create_extractor`.
        FileNotFoundError: As in :func:`create_extractor`.
        BackboneError: As in :func:`create_extractor`, except for deferred weights.
    """
    backbone = backbone_name(backbone)
    check_name(backbone, pre_trained=pre_trained)
    require(0 < len({*layers}) == len(layers), "layers", "distinct and at least one", list(layers))
    try:
        network = _create_network(backbone)
        layers = _in_network_order(backbone, layers, network)
        is_deferred = pre_trained and is_remote(backbone)
        if pre_trained and not is_deferred:
            check_weights(backbone)
        extractor = _extractor(backbone, layers, network, pre_trained=pre_trained and not is_deferred)
    except OSError as error:
        raise no_weights(backbone, error) from error
    return _awaiting_weights(extractor) if is_deferred else extractor


def fetch_weights(extractor: nn.Module) -> None:
    """Download the deferred weights of an extractor; do nothing if it has weights.

    Args:
        extractor: Result of :func:`prepare_extractor`.

    Raises:
        BackboneError: If the weights cannot be downloaded.
    """
    if not isinstance(extractor, MapExtractor) or not extractor.awaits_weights:
        return
    backbone = cast("str", extractor.backbone)
    try:
        check_weights(backbone)
        layers = cast("Sequence[str]", extractor.layers)
        weights = _extractor(backbone, layers, _create_network(backbone), pre_trained=True).state_dict()
    except OSError as error:
        raise no_weights(backbone, error) from error
    extractor.load_state_dict(weights)


def _extractor(backbone: str, layers: Sequence[str], network: nn.Module, *, pre_trained: bool) -> MapExtractor:
    with _without_warning_of_head():
        extractor = MapExtractor(backbone, layers, network, pre_trained)
    # Convolutions are fastest in this memory layout, on CPUs and GPUs.
    return extractor.requires_grad_(requires_grad=False).eval().to(memory_format=torch.channels_last)


def _awaiting_weights(extractor: MapExtractor) -> MapExtractor:
    """Let an extractor download its weights before its first use, unless other weights are loaded before."""
    extractor.awaits_weights = True
    extractor.register_forward_pre_hook(_fetch_before_use)
    extractor.register_load_state_dict_post_hook(_has_weights)
    return extractor


def _fetch_before_use(extractor: nn.Module, images: Any) -> None:
    del images
    fetch_weights(extractor)


def _has_weights(extractor: MapExtractor, keys: Any) -> None:
    if not keys.missing_keys:
        extractor.awaits_weights = False


def layers_of_backbone(backbone: str | Path) -> list[Layer]:
    """The layers of a backbone; its weights are not needed.

    Args:
        backbone: As in :func:`backbone_name`.

    Returns:
        The layers, in the order of the network.

    Raises:
        TypeError: As in :func:`create_extractor`.
        ValueError: As in :func:`create_extractor`.
        FileNotFoundError: If a local folder lacks its configuration.
        BackboneError: If the configuration cannot be downloaded.

    Example:
        >>> layers_of_backbone("tf_efficientnet_lite0")[3]
        Layer(name='blocks.4', channels=112, stride=16)
    """
    infos = {info["module"]: info for info in network_of(backbone).feature_info.info}
    # TResNet's first layer has an empty name, and timm cannot return it.
    return [Layer(name, info["num_chs"], info["reduction"]) for name, info in infos.items() if name]


def network_of(backbone: str | Path) -> Any:
    """The feature extractor of timm without weights, to read its properties.

    Args:
        backbone: As in :func:`backbone_name`.

    Returns:
        The network, on the meta device, which must not be changed. Random numbers of the caller do not change.

    Raises:
        TypeError: As in :func:`layers_of_backbone`.
        ValueError: As in :func:`layers_of_backbone`.
        FileNotFoundError: As in :func:`layers_of_backbone`.
        BackboneError: As in :func:`layers_of_backbone`.
    """
    backbone = backbone_name(backbone)
    check_name(backbone, pre_trained=False)
    # The files of a folder or a hub may change. timm's own networks do not.
    create = _create_network if parse_model_name(backbone)[0] else _create_once
    with torch.device("meta"):
        return create(backbone)


def _in_network_order(backbone: str, layers: Sequence[str], network: nn.Module) -> list[str]:
    """Check and sort the layers: anomalib drops unknown layers and names features by position."""
    # TResNet's first layer has an empty name, and timm cannot return it.
    available = [layer for layer in layers_of(network) if layer]
    if unknown := [layer for layer in layers if layer not in available]:
        msg = f"{backbone} has no layers {unknown}; choose from {available}"
        raise ValueError(msg)
    return sorted(layers, key=available.index)


def _create_network(backbone: str) -> nn.Module:
    """The feature extractor of timm without weights, on the meta device, to read its properties."""
    try:
        network: Any = timm.create_model(backbone, features_only=True, exportable=True)
        channels = network.pretrained_cfg["input_size"][0]
    except Exception as error:
        if parse_model_name(backbone)[0] != "local-dir":
            raise
        # A damaged configuration can raise any error in timm.
        msg = f"timm cannot create a network from {backbone}: {error!r}; check its config.json"
        raise ValueError(msg) from error
    if channels != _CHANNELS:
        msg = f"{backbone} expects images with {channels} channels, not {_CHANNELS}; choose another backbone"
        raise ValueError(msg)
    return network.to("meta")


# Settings read the properties of a network several times, and creating a large one takes a second.
_create_once = lru_cache(8)(_create_network)


@contextmanager
def _without_warning_of_head() -> Iterator[None]:
    """Silence timm's warning about unused weights of the classifier: a feature extractor has no classifier."""

    def is_other(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("Unexpected keys")

    logger = logging.getLogger("timm.models._builder")
    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)
