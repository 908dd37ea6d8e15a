"""Which synthetic defects a model detects, by area and contrast."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby

import numpy as np


@dataclass(frozen=True)
class Detected:
    """The share of the synthetic defects of an area and a contrast that a model detects.

    Attributes:
        area: Share of the image that each covers.
        contrast: Share of the change that is made.
        share: Share of the images whose score is above the threshold.
        count: Number of images.
    """

    area: float
    contrast: float
    share: float
    count: int


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
        shares.append(Detected(area, contrast, float(np.mean(values)), len(values)))
    return shares
