"""Torch models that score the feature maps of a frozen extractor."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from anomalib.data import InferenceBatch
from torch import Tensor

from .extraction import FeatureMaps, extract_by_parts, extract_by_tiles
from .single_precision import SinglePrecisionParts

if TYPE_CHECKING:
    from anomalib.data.utils.tiler import Tiler

    from .map_extractor import MapExtractor


class FeatureScorer(SinglePrecisionParts):
    """Base of the models that train on features and score features.

    A model sets the attributes and implements :meth:`score`.

    Attributes:
        feature_extractor: Maps images to the feature map of each layer.
        tiler: The tiles of images that are larger than memory; None for whole images.
    """

    feature_extractor: "MapExtractor"
    tiler: "Tiler | None"

    def extract(self, images: Tensor) -> FeatureMaps:
        """Feature map (B, D, H, W) of each layer for pre-processed images (B, 3, h, w)."""
        return extract_by_tiles(partial(extract_by_parts, self.feature_extractor), images, self.tiler)

    def forward(self, images: Tensor) -> FeatureMaps | InferenceBatch:
        """Return features while training, and scores otherwise.

        Args:
            images: (B, 3, h, w), pre-processed.

        Returns:
            While training, the feature map of each layer. Otherwise as :meth:`score`.

        Raises:
            RuntimeError: If the model is not fitted.
        """
        features = self.extract(images)
        if self.training:
            return features
        return self.score(features, images.shape[-2:])

    def score(self, features: FeatureMaps, size: Sequence[int]) -> InferenceBatch:
        """Score feature maps.

        Args:
            features: Feature map (B, D, H, W) of each layer.
            size: Height and width of the images, in pixels.

        Returns:
            The anomaly map (B, 1, h, w) and the image score (B,).

        Raises:
            RuntimeError: If the model is not fitted.
        """
        raise NotImplementedError
