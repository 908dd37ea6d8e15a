"""Models called with features instead of images."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .extraction import FeatureMaps

# From the feature map (1, D, H, W) of each layer to the image score and the anomaly map (1, 1, h, w).
Scorer = Callable[[FeatureMaps], tuple[Tensor, Tensor]]


class GivenFeatures(nn.Module):
    """A feature extractor that returns given features instead of those of the images.

    Attributes:
        features: Feature map (B, D, H, W) of each layer.
    """

    features: FeatureMaps

    def forward(self, images: Tensor) -> FeatureMaps:
        """The given features, whatever the images."""
        del images
        return self.features


def on_features(network: Any, image_size: tuple[int, int]) -> Scorer:
    """A fitted network, called with features instead of images.

    Args:
        network: The torch model of a Lightning model, whose ``feature_extractor`` has ``layers``. It is replaced.
        image_size: Height and width of the images, in pixels.

    Returns:
        Maps the features (1, D, H, W) of one image by layer, of the network's layers and maybe others, to its score and
        its map.
    """
    layers = network.feature_extractor.layers
    network.feature_extractor = given = GivenFeatures()
    blank = torch.empty(1, 3, *image_size)

    @torch.inference_mode()
    def score(features: FeatureMaps) -> tuple[Tensor, Tensor]:
        given.features = {layer: features[layer] for layer in layers}
        result = network(blank)
        return result.pred_score.flatten()[0], result.anomaly_map

    return score
