"""Feature maps (B, D, H, W) from all networks of timm, or an error that states the input that a network accepts."""

from collections.abc import Sequence
from contextlib import nullcontext
from threading import Lock
from typing import TYPE_CHECKING, Any, cast

import timm
import torch
from anomalib.models.components import TimmFeatureExtractor
from timm.models import FeatureHookNet
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from .extraction import is_exporting

if TYPE_CHECKING:
    from timm.models import FeatureInfo

# Held while timm's hooks store the maps in their network, where another thread would overwrite them. There is one lock
# for all networks, because a lock of each network could be neither copied nor written to a file.
_hooks_at_work = Lock()


def layers_of(network: nn.Module) -> list[str]:
    """Names of the layers of timm's feature extractor, in the order of the network.

    Args:
        network: Result of ``timm.create_model`` with ``features_only``.

    Returns:
        The names; their positions are timm's indices of the layers.
    """
    return [info["module"] for info in cast("FeatureInfo", network.feature_info).info]


def is_plain_transformer(network: nn.Module) -> bool:
    """Whether anomalib treats a network of timm's registry as a plain vision transformer, which accepts any image size.

    The name of the architecture decides, which is the same in timm's registry, in a folder and in a repository.

    Args:
        network: Result of ``timm.create_model`` with ``features_only``.

    Returns:
        True for timm's classes ``VisionTransformer`` and ``Eva`` with "vit" in the name of the architecture; DeiT and
        EVA-02, for example, accept one size only.
    """
    is_transformer = isinstance(getattr(network, "model", None), VisionTransformer | Eva)
    return is_transformer and "vit" in cast("Any", network).pretrained_cfg["architecture"]


class MapExtractor(TimmFeatureExtractor):
    """anomalib's extractor, extended to maps (B, D, H, W) from all networks of timm.

    anomalib returns the maps of Swin, MambaOut and Sequencer as (B, H, W, D). It treats all backbones with "vit" in
    their name as plain vision transformers, for example MaxViT, or a ResNet in a folder ``invitations``, and no others,
    for example not a DINOv2 in a folder ``weights``.

    Args:
        backbone: timm's name of the network.
        layers: Names of timm's feature modules, in the order of the network.
        network: The same network as timm's feature extractor, with any weights; it identifies the architecture.
        pre_trained: Whether to load the pre-trained weights.
    """

    # Whether the weights must still be downloaded or loaded.
    awaits_weights = False

    def __init__(self, backbone: str, layers: Sequence[str], network: nn.Module, pre_trained: bool) -> None:
        if is_plain_transformer(network):
            # This format makes anomalib create a plain vision transformer, whatever the name.
            super().__init__(backbone, layers, pre_trained=pre_trained, output_fmt="NLC")
            self.output_fmt = "NCHW"
        elif "vit" in backbone.lower():
            super(TimmFeatureExtractor, self).__init__()
            self._create_by_kind(backbone, layers, network, pre_trained)
        else:
            super().__init__(backbone, layers, pre_trained=pre_trained)
        order = "NCHW" if self._uses_intermediates else getattr(self.feature_extractor, "output_fmt", "NCHW")
        self._has_channels_last = order == "NHWC"

    def _create_by_kind(self, backbone: str, layers: Sequence[str], network: nn.Module, pre_trained: bool) -> None:
        """Create the network as anomalib creates one without "vit" in its name."""
        self.backbone, self.layers = backbone, list(layers)
        self.requires_grad, self.output_fmt, self.return_class_token, self.norm = False, "NCHW", False, False
        self._uses_intermediates = False
        self.idx = [layers_of(network).index(layer) for layer in layers]
        self.feature_extractor = timm.create_model(
            backbone, pretrained=pre_trained, features_only=True, exportable=True, out_indices=self.idx
        )
        self.out_dims = self.feature_extractor.feature_info.channels()
        self.reductions = self.feature_extractor.feature_info.reduction()

    def forward(self, inputs: Tensor) -> dict[str | int, Tensor]:
        """Extract the features of images.

        Args:
            inputs: Pre-processed images (B, 3, h, w).

        Returns:
            Feature map (B, D, H, W) of each layer.

        Raises:
            ValueError: If the network does not accept images of this size, or its features are not maps.
        """
        if is_exporting():
            return self._maps(inputs)
        try:
            features = self._maps(inputs)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            size, own = tuple(inputs.shape[-2:]), self.feature_extractor.pretrained_cfg["input_size"][-2:]
            if size == own or not self._takes(inputs.new_zeros(1, inputs.shape[1], *own)):
                raise
            msg = (
                f"{self.backbone} does not accept images of {size} pixels, but accepts {own}; set image_size to "
                f"{own}, or choose another backbone ({str(error) or type(error).__name__})"
            )
            raise ValueError(msg) from error
        for (layer, maps), channels in zip(features.items(), self.out_dims, strict=True):
            if maps.ndim != 4 or maps.shape[1] != channels:  # noqa: PLR2004
                msg = (
                    f"layer {layer} of {self.backbone} returns {tuple(maps.shape)} instead of maps "
                    f"(B, {channels}, H, W); "
                    "choose another layer or backbone"
                )
                raise ValueError(msg)
        return features

    def _run_intermediates(self, inputs: Tensor) -> list[Tensor]:
        """Maps (B, D, H, W) of a plain vision transformer, whose blocks after the last layer are not run."""
        network = cast("VisionTransformer | Eva", self.feature_extractor)
        maps = network.forward_intermediates(
            inputs, indices=self.idx, norm=self.norm, stop_early=True, output_fmt="NCHW", intermediates_only=True
        )
        return cast("list[Tensor]", maps)

    def _maps(self, images: Tensor) -> dict[str | int, Tensor]:
        is_hooked = isinstance(self.feature_extractor, FeatureHookNet) and not is_exporting()
        with _hooks_at_work if is_hooked else nullcontext():
            features = super().forward(images)
        if self._has_channels_last:
            return {layer: maps.permute(0, 3, 1, 2) for layer, maps in features.items()}
        return features

    def _takes(self, images: Tensor) -> bool:
        try:
            self._maps(images)
        except Exception:  # noqa: BLE001 - networks raise errors of any type
            return False
        return True
