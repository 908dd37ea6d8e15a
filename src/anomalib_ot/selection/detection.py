"""Which synthetic defects a model detects, by area and contrast."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anomalib_ot.synthetic import AREAS, CONTRASTS, KINDS, synthetic_images


@dataclass(frozen=True)
class Detected:
    """The share of some synthetic defects that a model detects.

    Attributes:
        kind: Kind of the defects, None for all kinds.
        area: Share of the image that each covers.
        contrast: Share of the change that is made.
        share: Share of the images whose score is above the threshold.
        count: Number of images.
    """

    kind: str | None
    area: float
    contrast: float
    share: float
    count: int


def detection_curve(
    score: Callable[[Tensor], Any],
    threshold: float,
    paths: Sequence[Path],
    *,
    images: int = 8,
    kinds: Sequence[str] = KINDS,
    areas: Sequence[float] = AREAS,
    contrasts: Sequence[float] = CONTRASTS,
    seed: int = 0,
) -> list[Detected]:
    """Measure which synthetic defects a model detects.

    Args:
        score: Maps an image (3, H, W) in [0, 1] to its score, or to an anomaly map whose maximum is the score. The
            longest side of the image has at most 512 pixels.
        threshold: The image is anomalous if its score is above it.
        paths: Files of good images that the model was not fitted on.
        images: Number of images of each combination of kind, area and contrast.
        kinds: Kinds of defects.
        areas: Shares of the image.
        contrasts: Shares of the change.
        seed: Seed of the synthetic images.

    Returns:
        A row for each combination, in the order of the arguments.

    Raises:
        ValueError: If an image cannot be read or is too small for an area, or there are none.
    """
    count = images * len(kinds) * len(areas) * len(contrasts)
    found: dict[tuple[str | None, float, float], list[bool]] = {
        (kind, area, contrast): [] for kind in kinds for area in areas for contrast in contrasts
    }
    for each in synthetic_images(paths, count, seed, kinds, areas, contrasts):
        value = float(torch.as_tensor(score(torch.from_numpy(each.image).permute(2, 0, 1))).max())
        found[each.kind, each.area, each.contrast].append(value > threshold)
    return [Detected(*key, float(np.mean(values)), len(values)) for key, values in found.items()]


def detected_shares(labels: Iterable[tuple[str, float, float]], detected: Iterable[bool]) -> list[Detected]:
    """Shares by area and contrast, over all kinds.

    Args:
        labels: Kind, area and contrast of each synthetic image.
        detected: Whether its score is above the threshold.
    """
    rows = sorted(
        (area, contrast, bool(is_found)) for (_, area, contrast), is_found in zip(labels, detected, strict=True)
    )
    shares = []
    for (area, contrast), group in groupby(rows, key=lambda row: row[:2]):
        values = [is_found for *_, is_found in group]
        shares.append(Detected(None, area, contrast, float(np.mean(values)), len(values)))
    return shares
