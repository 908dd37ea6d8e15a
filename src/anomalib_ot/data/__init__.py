"""Data modules: logical and structural anomalies, few shots, normal images only, more than 8 bits per channel."""

from .assembly import Assembly
from .defects import Defects, image_defects, read_defects
from .few_shot import FewShot
from .full_range import FullRange, FullRangeDataset, FullRangePredictDataset
from .good_pictures import GoodPictures
from .loco import LOCODataset, MVTecLOCOAD
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
