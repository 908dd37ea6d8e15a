"""Data modules: logical and structural anomalies, few shots."""

from .assembly import Assembly
from .few_shot import FewShot
from .loco import Defects, LOCODataset, MVTecLOCOAD, image_defects, read_defects

__all__ = ["Assembly", "Defects", "FewShot", "LOCODataset", "MVTecLOCOAD", "image_defects", "read_defects"]
