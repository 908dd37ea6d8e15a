"""Data modules: logical and structural anomalies, few shots, good pictures alone, more than eight bits."""

from .assembly import Assembly
from .few_shot import FewShot
from .full_range import FullRange, FullRangeDataset, FullRangePredictDataset
from .good_pictures import GoodPictures
from .loco import Defects, LOCODataset, MVTecLOCOAD, image_defects, read_defects
from .reading import read_picture

__all__ = [
    "Assembly",
    "Defects",
    "FewShot",
    "FullRange",
    "FullRangeDataset",
    "FullRangePredictDataset",
    "GoodPictures",
    "LOCODataset",
    "MVTecLOCOAD",
    "image_defects",
    "read_defects",
    "read_picture",
]
