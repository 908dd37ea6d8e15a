"""Features of good and of synthetic images, extracted once for all candidates of a backbone and an image size."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anomalib_ot.comparison.measurement import median_seconds
from anomalib_ot.features.backbones import create_extractor
from anomalib_ot.features.extraction import FastExtractor
from anomalib_ot.features.preprocessing import resize_and_normalize
from anomalib_ot.features.store import FeatureDataset, allocate
from anomalib_ot.images.reading import scaled_bytes
from anomalib_ot.synthetic import synthetic_images
from anomalib_ot.synthetic.images import read_reduced

# Numbers of images with which a trial ends in about a minute on two cores.
MOST_TO_FIT, MOST_HELD_OUT, SYNTHETIC = 60, 40, 168
_HELD_OUT = 0.2
_FEWEST_HELD_OUT = 2
_BATCH = 16
_BUDGET = 0.5
_REPEATS = 5

Label = tuple[str, float, float]
"""Kind, area and contrast of a synthetic defect."""


class Division(NamedTuple):
    """Good images to fit on, and others to score."""

    to_fit: list[Path]
    held_out: list[Path]


class TrialImages(NamedTuple):
    """The images of all trials.

    Attributes:
        division: The good images.
        synthetic: uint8 images (H, W, 3) with defects, made from those held out.
        labels: Kind, area and contrast of each of these.
    """

    division: Division
    synthetic: list[NDArray[np.uint8]]
    labels: list[Label]


def divide(paths: Sequence[Path], seed: int) -> Division:
    """Divide good images at random: a fifth of them, at most 40, is held out, and at most 60 of the others are fitted.

    Args:
        paths: The images, in any order.
        seed: Seed of the draw.
    """
    ordered = sorted(paths)
    drawn = [ordered[index] for index in np.random.default_rng(seed).permutation(len(ordered))]
    held_out = min(MOST_HELD_OUT, max(_FEWEST_HELD_OUT, round(_HELD_OUT * len(drawn))))
    return Division(drawn[held_out:][:MOST_TO_FIT], drawn[:held_out])


def trial_images(paths: Sequence[Path], seed: int) -> TrialImages:
    """Divide good images, and make the synthetic ones.

    Args:
        paths: The good images, in any order.
        seed: Seed of all draws.

    Raises:
        ValueError: If an image cannot be read, or is too small for a synthetic defect.
    """
    images = TrialImages(divide(paths, seed), [], [])
    for each in synthetic_images(images.division.held_out, SYNTHETIC, seed):
        # A quarter of the memory.
        images.synthetic.append(np.rint(255 * each.image).astype(np.uint8))
        images.labels.append((each.kind, each.area, each.contrast))
    return images


class ImageExtractor:
    """Extracts the features of images as the models of a backbone and an image size do.

    Args:
        backbone: Name of the backbone.
        image_size: Height and width in pixels.
        layers: Layers of all candidates.
    """

    def __init__(self, backbone: str, image_size: tuple[int, int], layers: Iterable[str]) -> None:
        self.backbone, self.image_size = backbone, image_size
        self._extract = FastExtractor(create_extractor(backbone, [*layers]), "auto", SYNTHETIC)
        self._transform: Any = resize_and_normalize(image_size, backbone).transform

    def of(self, images: Iterable[NDArray[np.float32]], count: int) -> FeatureDataset:
        """Features of images (H, W, 3) in [0, 1].

        Args:
            images: The images; each may have its own size.
            count: Their number.
        """
        dataset: FeatureDataset | None = None
        batch: list[NDArray[np.float32]] = []
        done = 0
        for image in images:
            batch.append(image)
            if len(batch) < _BATCH and done + len(batch) < count:
                continue
            features = self._extract(self._prepared(batch))
            dataset = dataset or allocate(features, count, "auto", _BUDGET, torch.device("cpu"))
            for layer, maps in features.items():
                dataset.features[layer][done : done + len(maps)] = maps
            done += len(batch)
            batch = []
        assert dataset is not None  # noqa: S101 - there is at least one image
        return dataset

    def seconds(self, image: NDArray[np.float32]) -> float:
        """Median time of the pre-processing and the backbone on one image."""
        return median_seconds(lambda: self._extract(self._prepared([image])), _REPEATS)

    def _prepared(self, images: Sequence[NDArray[np.float32]]) -> Tensor:
        return torch.stack([self._transform(torch.from_numpy(image).permute(2, 0, 1)) for image in images])


@dataclass(frozen=True)
class TrialFeatures:
    """Features of the images of all trials with a backbone and an image size.

    Attributes:
        backbone: Name of the backbone.
        image_size: Height and width in pixels.
        to_fit: Features of the images to fit on.
        good: Features of the held-out good images.
        synthetic: Features of the synthetic images.
        labels: Kind, area and contrast of each of these.
        seconds_per_image: Median time of the pre-processing and the backbone on a single image.
    """

    backbone: str
    image_size: tuple[int, int]
    to_fit: FeatureDataset
    good: FeatureDataset
    synthetic: FeatureDataset
    labels: list[Label]
    seconds_per_image: float

    @classmethod
    def extracted(cls, images: TrialImages, extractor: ImageExtractor) -> "TrialFeatures":
        """Extract the features of images.

        Raises:
            ValueError: If an image cannot be read.
        """
        (to_fit, held_out), synthetic, labels = images
        return cls(
            backbone=extractor.backbone,
            image_size=extractor.image_size,
            to_fit=extractor.of(map(read_reduced, to_fit), len(to_fit)),
            good=extractor.of(map(read_reduced, held_out), len(held_out)),
            synthetic=extractor.of(map(scaled_bytes, synthetic), len(synthetic)),
            labels=labels,
            seconds_per_image=extractor.seconds(read_reduced(held_out[0])),
        )
