"""Defects made from good images, to compare models without labelled anomalies, with NumPy, SciPy and Pillow alone."""

from .defects import KINDS, synthetic_defect
from .images import AREAS, CONTRASTS, SyntheticImage, possible_areas, synthetic_images

__all__ = [
    "AREAS",
    "CONTRASTS",
    "KINDS",
    "SyntheticImage",
    "possible_areas",
    "synthetic_defect",
    "synthetic_images",
]
