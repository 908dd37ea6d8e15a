"""Features of good and of synthetic images, extracted once for all candidates of a backbone and an image size."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from anomalib_ot.comparison.measurement import median_seconds
from anomalib_ot.features.image_extractor import ImageExtractor
from anomalib_ot.features.store import FeatureDataset
from anomalib_ot.images.reading import scaled_bytes
from anomalib_ot.synthetic import synthetic_images
from anomalib_ot.synthetic.images import read_reduced

# Numbers of images with which a trial ends in about a minute on two cores.
MOST_TO_FIT, MOST_HELD_OUT, SYNTHETIC = 60, 40, 168
_HELD_OUT = 0.2
_FEWEST_HELD_OUT = 2
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
        first = read_reduced(held_out[0])
        return cls(
            backbone=extractor.backbone,
            image_size=extractor.image_size,
            to_fit=extractor.of(map(read_reduced, to_fit), len(to_fit)),
            good=extractor.of(map(read_reduced, held_out), len(held_out)),
            synthetic=extractor.of(map(scaled_bytes, synthetic), len(synthetic)),
            labels=labels,
            seconds_per_image=median_seconds(lambda: extractor.of_batch([first]), _REPEATS),
        )
