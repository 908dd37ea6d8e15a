"""Data modules: logical and structural anomalies, few shots."""

from .assembly import Assembly
from .few_shot import FewShot
from .loco import LOCODataset, MVTecLOCOAD

__all__ = ["Assembly", "FewShot", "LOCODataset", "MVTecLOCOAD"]
