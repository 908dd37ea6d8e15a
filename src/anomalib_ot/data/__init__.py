"""Data modules for images with logical and structural anomalies."""

from .assembly import Assembly
from .loco import LOCODataset, MVTecLOCOAD

__all__ = ["Assembly", "LOCODataset", "MVTecLOCOAD"]
