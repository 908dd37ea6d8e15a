"""Layers and image size that suit a backbone, for models whose user gives neither.

.. list-table::
   :header-rows: 1

   * - family
     - layers
     - image size
     - reason for the size
   * - ResNet, EfficientNet, ConvNeXt and other hierarchical networks
     - by stride
     - the model's own
     - convolutions accept any size
   * - Swin, MaxViT and other networks of a size that timm declares fixed
     - by stride
     - the network's own
     - their windows or position embeddings fit no other size
   * - plain vision transformer, ``vit_*`` in timm
     - by depth
     - the model's own, rounded to whole patches
     - its position embeddings are resampled
   * - DINOv2 and DINOv3, with and without registers
     - by depth
     - 448 × 448
     - 32 × 32 patches of 14 pixels or 28 × 28 patches of 16 pixels, about as many cells as a ResNet's
   * - DeiT, BEiT, XCiT and other networks of one stride
     - by depth
     - the network's own if timm declares it fixed, otherwise the model's own, rounded to whole patches
     - as above

By stride: a model names the strides of its maps, 8 and 16 pixels for Pradot, Foct and Duo, 16 for WtFlow. The last
layer of each stride is taken. On a ResNet these are ``layer2`` and ``layer3``, as in PatchCore. Maps of lower strides
show edges rather than parts, and those of higher strides have too few cells to locate a defect. If a network has no
layer of a stride, the layer of the nearest stride replaces it.

By depth: all blocks of a plain vision transformer have the same stride. Two layers are the blocks at 1/2 and 5/6 of the
depth, ``blocks.5`` and ``blocks.9`` of 12. One layer is the block at 3/4, ``blocks.8`` of 12. Middle blocks keep
position and texture, and the last ones serve the task of the pre-training. In anomalib, Dinomaly and INP-Former use
blocks 2 to 9 of 12, RAD 3, 6, 9 and 11. This choice follows the literature. It was not measured here, because no
pre-trained weights of such networks were available.

The size that a network was trained with does not replace the model's own if the network accepts both. The models were
measured at their own sizes, and the networks' sizes would change a model's time and memory by more than the choice of
the network does: from 224 to 600 pixels in EfficientNet. EfficientNet-Lite1 and Lite2 therefore use the model's size as
well, not their 240 and 260 pixels; give ``image_size`` to use these.
"""

from collections.abc import Collection, Iterable, Sequence
from math import log2
from pathlib import Path

from .backbones import Layer, network_of
from .map_extractor import is_plain_transformer

# Shares of the depth, by number of layers.
_DEPTHS = {1: (3 / 4,), 2: (1 / 2, 5 / 6)}
_DINO = ("dinov2", "dinov3")
_DINO_SIZE = (448, 448)


def default_layers(layers: Collection[Layer], strides: Sequence[int]) -> tuple[str, ...]:
    """Choose layers for a model that names strides.

    Args:
        layers: All layers of a backbone, in the order of the network.
        strides: Strides of one or two maps, in pixels.

    Returns:
        Names of the chosen layers, one per stride if the network has as many.

    Example:
        >>> from anomalib_ot.features.backbones import layers_of_backbone
        >>> default_layers(layers_of_backbone("tf_efficientnet_lite0"), [8, 16])
        ('blocks.2', 'blocks.4')
        >>> default_layers(layers_of_backbone("vit_tiny_patch16_224"), [8, 16])
        ('blocks.5', 'blocks.9')
    """
    last = last_by_stride(layers)
    if len(last) == 1:
        names = [layer.name for layer in layers]
        chosen = [names[max(round(len(names) * share), 1) - 1] for share in _DEPTHS[len(strides)]]
    else:
        chosen = []
        for stride in strides[: len(last)]:
            nearest = min(last, key=lambda each: abs(log2(each / stride)))
            chosen.append(last.pop(nearest))
    return tuple(dict.fromkeys(chosen))


def last_by_stride(layers: Iterable[Layer]) -> dict[int, str]:
    """Name of the last layer of each stride."""
    return {layer.stride: layer.name for layer in layers}


def default_image_size(backbone: str | Path, usual: tuple[int, int]) -> tuple[int, int]:
    """Image size for a model on a backbone.

    Args:
        backbone: As in :func:`~anomalib_ot.features.backbones.backbone_name`.
        usual: The model's own height and width, in pixels.

    Returns:
        Height and width, in pixels.

    Raises:
        TypeError: As in :func:`~anomalib_ot.features.backbones.layers_of_backbone`.
        ValueError: As in :func:`~anomalib_ot.features.backbones.layers_of_backbone`.
        FileNotFoundError: As in :func:`~anomalib_ot.features.backbones.layers_of_backbone`.
        BackboneError: As in :func:`~anomalib_ot.features.backbones.layers_of_backbone`.

    Example:
        >>> default_image_size("resnet50", (224, 224)), default_image_size("vit_small_patch14_dinov2", (224, 224))
        ((224, 224), (448, 448))
    """
    network = network_of(backbone)
    config, is_plain = network.pretrained_cfg, is_plain_transformer(network)
    if config.get("fixed_input_size") and not is_plain:
        height, width = config["input_size"][-2:]
        return height, width
    height, width = _DINO_SIZE if is_plain and any(name in config["architecture"] for name in _DINO) else usual
    patch, *others = {*network.feature_info.reduction()}
    return (height, width) if others else (_whole(height, patch), _whole(width, patch))


def _whole(pixels: int, patch: int) -> int:
    """The multiple of a patch that is nearest to a number of pixels."""
    return max(round(pixels / patch), 1) * patch
