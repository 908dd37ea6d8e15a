"""Pre-processing of images for a backbone."""

from pathlib import Path

import torch
from anomalib.data.transforms.utils import extract_transforms_by_type
from anomalib.pre_processing import PreProcessor
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import load_model_config_from_hf, parse_model_name
from torch import Tensor, nn
from torchvision.transforms.v2 import Compose, Normalize, Resize

from anomalib_ot.settings import require_image_size

from .backbone_sources import check_hub, local_config, registered_config
from .backbones import backbone_name


def normalization(backbone: str | Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation that normalised the images in the training of a backbone's weights.

    Args:
        backbone: As in :func:`~anomalib_ot.features.backbones.backbone_name`. Only ``hf-hub:`` may need a connection.

    Returns:
        Mean and standard deviation by channel, for pixels in [0, 1]; ImageNet's if the backbone does not define them.

    Raises:
        TypeError: If the backbone is neither a name nor a path.
        FileNotFoundError: If a local folder lacks its configuration.
        ValueError: If the configuration is damaged.
        BackboneError: If the configuration cannot be downloaded.

    Example:
        >>> normalization("tf_efficientnet_lite0")
        ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    """
    source, name = parse_model_name(backbone_name(backbone))
    if source == "local-dir":
        config = local_config(Path(name) / "config.json")
    elif source == "hf-hub":
        check_hub(name)
        config = load_model_config_from_hf(name)[0]
    else:
        config = vars(registered_config(name))
    return tuple(config.get("mean") or IMAGENET_DEFAULT_MEAN), tuple(config.get("std") or IMAGENET_DEFAULT_STD)


def resize_and_normalize(image_size: tuple[int, int], backbone: str | Path) -> PreProcessor:
    """The models' pre-processor: resize, then normalise with the mean and standard deviation of the backbone.

    Args:
        image_size: Height and width, in pixels.
        backbone: As in :func:`~anomalib_ot.features.backbones.backbone_name`.

    Returns:
        The pre-processor.

    Raises:
        ValueError: If ``image_size`` is not two positive whole numbers; also as in :func:`normalization`.
        TypeError: As in :func:`normalization`.
        FileNotFoundError: As in :func:`normalization`.
        BackboneError: As in :func:`normalization`.
    """
    require_image_size(image_size)
    mean, std = normalization(backbone)
    return PreProcessor(Compose([Resize(image_size, antialias=True), Normalize(mean=mean, std=std)]))


def denormalize(images: Tensor, pre_processor: nn.Module | None) -> Tensor:
    """Undo the normalisation of a pre-processor.

    Args:
        images: Pre-processed images (..., 3, h, w).
        pre_processor: The pre-processor, or None.

    Returns:
        RGB images (..., 3, h, w) in [0, 1]. Resizing may exceed this range slightly.
    """
    for each in extract_transforms_by_type(getattr(pre_processor, "transform", None), Normalize):
        mean, std = (torch.tensor(value, device=images.device).view(-1, 1, 1) for value in (each.mean, each.std))
        images = images * std + mean
    return images
