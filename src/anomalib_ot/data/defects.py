"""The defects of images in the layout of MVTec LOCO AD: their masks, and the area at which each saturates.

The masks of an image are in ``ground_truth``, one file per defect. ``defects_config.json`` maps their pixel value to a
kind of defect, and each kind to a saturation area.
"""

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from anomalib.data.utils import read_mask
from PIL import Image
from torch import Tensor

from anomalib_ot.images.reading import deep_values, naming_unreadable

_HIGHEST_PIXEL_VALUE = 255


@dataclass(frozen=True)
class Defects:
    """The defects of one image; a normal image has none.

    Attributes:
        masks: uint8 (defects, H, W) at the size of the image file, 1 on the defect and 0 elsewhere. They may overlap.
        saturation: float64 (defects,), the saturation area in pixels. An overlap of at least this area counts as full.
            It is a share of the defect's area, rounded down, or a number of pixels, at most the defect's area.
    """

    masks: Tensor
    saturation: Tensor


def image_defects(image: Path | str) -> Defects:
    """Read the defects of an image. The image's path in the category locates its masks.

    Args:
        image: Path of the image file.

    Returns:
        The defects; for a normal image, masks of shape (0, H, W).

    Raises:
        FileNotFoundError: If an anomalous image has no masks, or the category has no ``defects_config.json``.
        ValueError: If a normal image cannot be read, or in the cases of :func:`read_defects`.
    """
    folder = mask_folder(Path(image))
    if folder:
        return read_defects(folder)
    with naming_unreadable(image), Image.open(image) as opened:
        width, height = opened.size
    return Defects(torch.zeros(0, height, width, dtype=torch.uint8), torch.zeros(0, dtype=torch.float64))


def read_defects(folder: Path | str) -> Defects:
    """Read the defects of one anomalous image.

    Args:
        folder: The image's folder in ``ground_truth``.

    Returns:
        One defect per file. The category's ``defects_config.json`` gives the meaning of its pixel value.

    Raises:
        FileNotFoundError: If the configuration is missing, or the folder contains no mask.
        ValueError: If the configuration is invalid, a file is not an image, the masks differ in size, or a mask has no
            defect, several pixel values or a pixel value that the configuration does not list.
    """
    config = defects_config(folder)
    if not config.is_file():
        msg = f"{config} is missing: it gives the area at which each defect saturates"
        raise FileNotFoundError(msg)
    saturations = _read_saturations(config, config.stat().st_mtime_ns)
    areas = []
    levels = _read_levels(folder)
    for path, mask in zip(_mask_files(folder), levels, strict=True):
        values = _pixel_values(path, mask)
        if len(values) != 1 or values[0] not in saturations:
            msg = (
                f"{path} must contain exactly one pixel value besides 0, from {sorted(saturations)} of {config}, "
                f"not {values}"
            )
            raise ValueError(msg)
        areas.append(saturations[values[0]].area(int(mask.count_nonzero())))
    return Defects((levels > 0).byte(), torch.tensor(areas, dtype=torch.float64))


def defects_config(path: Path | str) -> Path:
    """Path of the category's ``defects_config.json``, given one of its images or mask folders; it may not exist."""
    return Path(path).parent.parent.parent / "defects_config.json"


def read_defect_masks(folder: Path | str) -> Tensor:
    """Read the masks of one anomalous image, without ``defects_config.json``.

    Args:
        folder: The image's folder in ``ground_truth``.

    Returns:
        uint8 tensor (defects, H, W), 1 on the defect and 0 elsewhere.

    Raises:
        FileNotFoundError: If the folder contains no mask.
        ValueError: If a file is not an image, or the masks differ in size.
    """
    return (_read_levels(folder) > 0).byte()


def _mask_files(folder: Path | str) -> list[Path]:
    return sorted(Path(folder).glob("*.png"))


def mask_folder(image: Path) -> str:
    """Path of the folder with the masks of an image, empty for a normal image.

    Raises:
        FileNotFoundError: If an anomalous image has no masks.
    """
    if image.parent.name == "good":
        return ""
    # parents[2] raises an error for a path with fewer folders.
    folder = image.parent.parent.parent / "ground_truth" / image.parent.name / image.stem
    if not _mask_files(folder):
        msg = f"the anomalous image {image} has no masks {folder}/*.png"
        raise FileNotFoundError(msg)
    return str(folder)


def _read_levels(folder: Path | str) -> Tensor:
    """Pixel values uint8 (defects, H, W) of the masks in a folder."""
    masks = [_read_mask(path) for path in _mask_files(folder)]
    if not masks:
        msg = f"there are no masks {folder}/*.png"
        raise FileNotFoundError(msg)
    if len({mask.shape for mask in masks}) > 1:
        msg = f"the masks in {folder} differ in size"
        raise ValueError(msg)
    return torch.stack([torch.from_numpy(mask) for mask in masks])


def _read_mask(path: Path) -> Any:
    with naming_unreadable(path):
        return read_mask(path, as_tensor=False)


def _pixel_values(path: Path, levels: Tensor) -> list[int]:
    """Values of a mask other than 0, as stored in the file: ``levels`` has 255 in place of larger values."""
    deep = deep_values(path)
    values = levels if deep is None else torch.from_numpy(deep[0].astype(np.int64))
    return values[values > 0].unique().tolist()


@dataclass(frozen=True)
class _Saturation:
    """Overlap at which a kind of defect saturates: a share of its area, or a number of pixels."""

    threshold: float
    is_relative: bool

    def __post_init__(self) -> None:
        if not isinstance(self.is_relative, bool) or not 0 < self.threshold <= (
            1 if self.is_relative else float("inf")
        ):
            msg = f"saturation_threshold {self.threshold!r} with relative_saturation {self.is_relative!r}"
            raise ValueError(msg)

    def area(self, defect: int) -> float:
        """Saturation area, in pixels, of a defect whose area is ``defect`` pixels."""
        # Rounded down as in MVTec's evaluation. At least 1, where MVTec's evaluation would divide by zero.
        return max(1, int(self.threshold * defect)) if self.is_relative else min(self.threshold, defect)


@lru_cache
def _read_saturations(config: Path, _modified: int) -> dict[int, _Saturation]:
    """Saturation by pixel value, cached until the file changes."""
    try:
        return _saturations(json.loads(config.read_text(encoding="utf-8")))
    except (KeyError, TypeError, ValueError) as error:
        msg = (
            f"{config} must list defects, each with its own pixel_value from 1 to {_HIGHEST_PIXEL_VALUE} and a "
            f"positive saturation_threshold, at most 1 if relative_saturation is true; it is invalid: {error!r}"
        )
        raise ValueError(msg) from error


def _saturations(entries: list[dict[str, Any]]) -> dict[int, _Saturation]:
    saturations: dict[int, _Saturation] = {}
    for entry in entries:
        value = entry["pixel_value"]
        if value in saturations or value not in range(1, _HIGHEST_PIXEL_VALUE + 1):
            msg = f"pixel_value {value!r}"
            raise ValueError(msg)
        saturations[value] = _Saturation(entry["saturation_threshold"], entry["relative_saturation"])
    return saturations
