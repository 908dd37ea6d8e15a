"""Defects made from good images, to compare models without labelled anomalies, with NumPy, SciPy and Pillow alone."""

from .defects import KINDS, synthetic_defect
from .images import AREAS, CONTRASTS, SyntheticImage, synthetic_images, synthetic_set

__all__ = [
    "AREAS",
    "CONTRASTS",
    "KINDS",
    "SyntheticImage",
    "synthetic_defect",
    "synthetic_images",
    "synthetic_set",
]
