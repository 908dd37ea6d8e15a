"""The features that Pradot trains on, without the model."""

from collections.abc import Iterable

import torch
from anomalib.data import ImageItem
from torch import Tensor

from anomalib_ot.features.backbones import create_extractor
from anomalib_ot.features.extraction import extract_by_parts
from anomalib_ot.features.whitening import LocalWhitening
from anomalib_ot.models.pradot import Pradot
from anomalib_ot.offline import offline_backbone


@torch.no_grad()
def layer_features(items: Iterable[ImageItem], layer: str, size: tuple[int, int]) -> Tensor:
    """Feature maps (B, D, H, W) of EfficientNet-Lite0 for images at a size in pixels."""
    backbone = offline_backbone()
    transform = Pradot.configure_pre_processor(size, backbone).transform
    images = torch.stack([transform(item.image) for item in items])
    return extract_by_parts(create_extractor(backbone, [layer]), images)[layer]


def whitening_of(maps: Tensor) -> LocalWhitening:
    """Whitening fitted to the feature maps (B, D, H, W) of training images."""
    whitening = LocalWhitening()
    whitening.update(maps)
    whitening.compute()
    return whitening
