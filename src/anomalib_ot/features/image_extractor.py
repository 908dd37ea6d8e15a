"""Features of images outside a training."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .backbones import create_extractor
from .extraction import FastExtractor, FeatureMaps
from .preprocessing import resize_and_normalize
from .store import FeatureDataset, allocate

BATCH = 16
"""Number of images whose features are extracted at a time."""
# Share of the free memory that features may take; others are kept on disk.
BUDGET = 0.5


class ImageExtractor:
    """Extracts the features of images with a backbone at an image size.

    Args:
        backbone: Name from :func:`~anomalib_ot.features.backbones.backbone_name`.
        image_size: Height and width that images are resized to, in pixels.
        layers: Layers of the backbone.
        count: Number of images that will be extracted; many are worth a faster extractor.
    """

    def __init__(self, backbone: str, image_size: tuple[int, int], layers: Iterable[str], count: int) -> None:
        self.backbone, self.image_size, self.layers = backbone, image_size, [*layers]
        self._extract = FastExtractor(create_extractor(backbone, self.layers), "auto", count)
        self._transform: Any = resize_and_normalize(image_size, backbone).transform

    def of_batch(self, images: Sequence[NDArray[np.float32]]) -> FeatureMaps:
        """Feature map (B, D, H, W) of each layer for images (h, w, 3) in [0, 1]; each may have its own size."""
        return self._extract(torch.stack([self._prepared(image) for image in images]))

    def of(self, images: Iterable[NDArray[np.float32]], count: int) -> FeatureDataset:
        """Features of many images, in memory or on disk.

        Args:
            images: Images (h, w, 3) in [0, 1], as an iterator that reads each when it is needed.
            count: Their number, at least 1.
        """
        dataset: FeatureDataset | None = None
        done = 0
        for features in self.batches(images):
            dataset = dataset or allocate(features, count, "auto", BUDGET, torch.device("cpu"))
            done = dataset.put(done, features)
        assert dataset is not None  # noqa: S101 - there is at least one image
        return dataset

    def batches(self, images: Iterable[NDArray[np.float32]]) -> Iterator[FeatureMaps]:
        """Features of images (h, w, 3) in [0, 1], ``BATCH`` at a time."""
        batch: list[NDArray[np.float32]] = []
        for image in images:
            batch.append(image)
            if len(batch) == BATCH:
                yield self.of_batch(batch)
                batch = []
        if batch:
            yield self.of_batch(batch)

    def _prepared(self, image: NDArray[np.float32]) -> Tensor:
        prepared: Tensor = self._transform(torch.from_numpy(image).permute(2, 0, 1))
        return prepared
