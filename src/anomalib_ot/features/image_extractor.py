"""Features of images outside a training."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .backbones import create_extractor
from .extraction import FastExtractor, FeatureMaps
from .preprocessing import resize_and_normalize
from .store import FeatureDataset, allocate

_BATCH = 16
# Share of the free memory that features may take; others are kept on disk.
_BUDGET = 0.5


class ImageExtractor:
    """Extracts the features of images with a backbone at an image size.

    Args:
        backbone: Name from :func:`~anomalib_ot.features.backbones.backbone_name`.
        image_size: Height and width that images are resized to, in pixels.
        layers: Layers of the backbone.
        count: Number of images that will be extracted; many are worth a faster extractor.
    """

    def __init__(self, backbone: str, image_size: tuple[int, int], layers: Iterable[str], count: int) -> None:
        self.backbone, self.image_size = backbone, image_size
        self._extract = FastExtractor(create_extractor(backbone, [*layers]), "auto", count)
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
        batch: list[NDArray[np.float32]] = []
        done = 0
        for image in images:
            batch.append(image)
            if len(batch) < _BATCH and done + len(batch) < count:
                continue
            features = self.of_batch(batch)
            dataset = dataset or allocate(features, count, "auto", _BUDGET, torch.device("cpu"))
            for layer, maps in features.items():
                dataset.features[layer][done : done + len(maps)] = maps
            done += len(batch)
            batch = []
        assert dataset is not None  # noqa: S101 - there is at least one image
        return dataset

    def _prepared(self, image: NDArray[np.float32]) -> Tensor:
        prepared: Tensor = self._transform(torch.from_numpy(image).permute(2, 0, 1))
        return prepared
