"""Features of good and of synthetic images, extracted once for all candidates of a backbone and an image size."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from anomalib_ot.comparison.measurement import median_seconds
from anomalib_ot.features.file_features import FileFeatures
from anomalib_ot.features.store import FeatureDataset
from anomalib_ot.images.reading import ValueRange, scaled_bytes
from anomalib_ot.synthetic import AREAS, possible_areas, synthetic_images

logger = logging.getLogger(__name__)

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


class TrialSet(NamedTuple):
    """The images of all trials.

    Attributes:
        division: The good images.
        synthetic: uint8 images (H, W, 3) with defects, made from those held out; none if these are too small.
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


def trial_set(paths: Sequence[Path], seed: int, value_range: ValueRange | None = None) -> TrialSet:
    """Divide good images, and make the synthetic ones. Areas that a small image cannot have are left out.

    Args:
        paths: The good images, in any order.
        seed: Seed of all draws.
        value_range: Values that map to black and white in images with more than 8 bits per channel.

    Raises:
        ValueError: If an image cannot be read.
    """
    images = TrialSet(divide(paths, seed), [], [])
    held_out = images.division.held_out
    areas = possible_areas(held_out)
    if left_out := [f"{100 * area:g} %" for area in AREAS if area not in areas]:
        logger.warning(
            "The images are too small for defects of %s of the image, which are left out.", " and ".join(left_out)
        )
    made = synthetic_images(held_out, SYNTHETIC, seed, areas=areas, value_range=value_range)
    for each in made if areas else ():
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
        synthetic: Features of the synthetic images; None if there are none.
        labels: Kind, area and contrast of each of these.
        seconds_per_image: Median time of the pre-processing and the backbone on a single image.
    """

    backbone: str
    image_size: tuple[int, int]
    to_fit: FeatureDataset
    good: FeatureDataset
    synthetic: FeatureDataset | None
    labels: list[Label]
    seconds_per_image: float

    @classmethod
    def extracted(cls, images: TrialSet, files: FileFeatures) -> "TrialFeatures":
        """Extract the features of images; those of the good ones may be known.

        Raises:
            ValueError: If an image cannot be read.
        """
        (to_fit, held_out), synthetic, labels = images
        extractor, first = files.extractor, files.read(held_out[0])
        return cls(
            backbone=extractor.backbone,
            image_size=extractor.image_size,
            to_fit=files.of(to_fit),
            good=files.of(held_out),
            synthetic=extractor.of(map(scaled_bytes, synthetic), len(synthetic)) if synthetic else None,
            labels=labels,
            seconds_per_image=median_seconds(lambda: extractor.of_batch([first]), _REPEATS),
        )
