"""Categories in the layout of MVTec LOCO AD (Bergmann et al., 2022, https://doi.org/10.1007/s11263-022-01578-9).

A category is a folder::

    breakfast_box/
    ├── train/good/000.png
    ├── validation/good/000.png
    ├── test/{good,logical_anomalies,structural_anomalies}/000.png
    ├── ground_truth/{logical_anomalies,structural_anomalies}/000/000.png   one mask per defect
    └── defects_config.json                                                 what the masks' pixel values mean

``gt_mask`` of an item is the union of its defects. The defects one by one, which overlap and of which each saturates at
an area of its own, are in :class:`Defects`: of an item from :meth:`LOCODataset.defects`, of an image file from
:func:`image_defects`, of a folder in ``ground_truth`` from :func:`read_defects`.
"""

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from anomalib.data import AnomalibDataModule, AnomalibDataset
from anomalib.data.dataclasses.torch import ImageItem
from anomalib.data.utils import Split, TestSplitMode, ValSplitMode, read_mask
from anomalib.utils.path import resolve_dataset_root
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import Transform
from torchvision.tv_tensors import Mask

from .reading import (
    ValueRange,
    check_value_range,
    deep_values,
    naming_unreadable,
    read_picture,
)

SPLIT_FOLDERS = {Split.TRAIN: "train", Split.VAL: "validation", Split.TEST: "test"}
_HIGHEST_PIXEL_VALUE = 255


@dataclass(frozen=True)
class Defects:
    """The defects of one image, none of a normal one.

    Attributes:
        masks: uint8 (defects, H, W) at the size of the image file, 1 on the defect and 0 elsewhere. They may overlap.
        saturation: float64 (defects,), the area in pixels from which on an overlap with the defect counts as full: a
            share of its area, rounded down, or a number of pixels, at most its area.
    """

    masks: Tensor
    saturation: Tensor


class LOCODataset(AnomalibDataset):
    """One split of a category in the layout of MVTec LOCO AD.

    An item's ``gt_mask`` is the union of its defect masks, and its ``mask_path`` the folder that holds them.

    Args:
        root: Folder of the category.
        split: ``train``, ``val`` or ``test``.
        augmentations: Applied to the image and the mask together.
        value_range: Values that become black and white in images of more than eight bits, by default all that 16 bits
            can hold; see :func:`~anomalib_ot.data.reading.read_picture`.

    Raises:
        FileNotFoundError: If there is no such folder, no image of the split, or no mask of an anomalous image.
        ValueError: If the range is none.

    Example:
        >>> dataset = LOCODataset("./datasets/MVTec_LOCO/breakfast_box", split="test")  # doctest: +SKIP
        >>> item = dataset[0]  # doctest: +SKIP
        >>> item.image.shape, item.gt_mask.shape  # doctest: +SKIP
        (torch.Size([3, 1280, 1600]), torch.Size([1280, 1600]))
    """

    def __init__(
        self,
        root: Path | str,
        split: Split | str,
        augmentations: Transform | None = None,
        value_range: ValueRange | None = None,
    ) -> None:
        check_value_range(value_range)
        super().__init__(augmentations)
        self.value_range = value_range
        self.split = Split(split)
        self.samples = make_dataset(root, self.split)
        self.category = Path(root).name

    def __getitem__(self, index: int) -> ImageItem:
        """Read an image and its merged mask.

        Raises:
            ValueError: If a file is no image, or the mask is of another size than the image; the file is named.
        """
        sample = self.samples.iloc[index]
        image = read_picture(sample.image_path, self.value_range)
        mask = Mask(torch.zeros(image.shape[-2:], dtype=torch.uint8))
        if sample.mask_path:
            mask = Mask(read_defect_masks(sample.mask_path).amax(0))
            if mask.shape != image.shape[-2:]:
                msg = f"the masks in {sample.mask_path} are not of the size of {sample.image_path}"
                raise ValueError(msg)
        if self.augmentations:
            image, mask = self.augmentations(image, mask)
        return ImageItem(
            image=image,
            gt_mask=mask,
            gt_label=torch.tensor(sample.label_index),
            image_path=sample.image_path,
            mask_path=sample.mask_path,
        )

    def defects(self, index: int) -> Defects:
        """Defects of an image, one by one; at the size of the file, whatever the augmentations.

        Raises:
            FileNotFoundError: If the category has no ``defects_config.json``.
            ValueError: As from :func:`image_defects`.
        """
        return image_defects(self.samples.iloc[index].image_path)


def make_dataset(root: Path | str, split: Split | str) -> pd.DataFrame:
    """List the images of one split.

    Args:
        root: Folder of the category.
        split: ``train``, ``val`` or ``test``.

    Returns:
        A row for each image, in the order of the file names, with the columns ``path`` (the category), ``split``,
        ``label`` (the image's folder), ``image_path``, ``mask_path`` (the folder of its masks, empty for a normal
        image) and ``label_index`` (0 normal, 1 anomalous).

    Raises:
        FileNotFoundError: If there is no such folder, no image of the split, or no mask of an anomalous image.
    """
    root, split = Path(root), Split(split)
    if not root.is_dir():
        msg = f"there is no category folder {root}"
        raise FileNotFoundError(msg)
    images = sorted((root / SPLIT_FOLDERS[split]).glob("*/*.png"))
    if not images:
        msg = f"there are no images {root / SPLIT_FOLDERS[split]}/*/*.png"
        raise FileNotFoundError(msg)
    samples = pd.DataFrame(
        {
            "path": str(root),
            "split": split.value,
            "label": [image.parent.name for image in images],
            "image_path": [str(image) for image in images],
            "mask_path": [_mask_folder(image) for image in images],
            "label_index": [int(image.parent.name != "good") for image in images],
        }
    )
    samples.attrs["task"] = "segmentation"
    return samples


def image_defects(image: Path | str) -> Defects:
    """Read the defects of an image, found by its place in the category.

    Args:
        image: The image's file.

    Returns:
        Its defects; those of a normal image have masks (0, H, W).

    Raises:
        FileNotFoundError: If an anomalous image has no masks, or the category no ``defects_config.json``.
        ValueError: If a normal image cannot be read, or as from :func:`read_defects`.
    """
    folder = _mask_folder(Path(image))
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
        One defect for each file. What its pixel value means is in the category's
        ``defects_config.json``.

    Raises:
        FileNotFoundError: If there is no such configuration, or no mask in the folder.
        ValueError: If the configuration is not as expected, a file is no image, the masks differ in size, or a mask
            has no defect, several pixel values or one that the configuration does not know.
    """
    config = defects_config(folder)
    if not config.is_file():
        msg = f"there is no {config}, which says at what area each defect saturates"
        raise FileNotFoundError(msg)
    saturations = _read_saturations(config, config.stat().st_mtime_ns)
    areas = []
    levels = _read_levels(folder)
    for path, mask in zip(_mask_files(folder), levels, strict=True):
        values = _pixel_values(path, mask)
        if len(values) != 1 or values[0] not in saturations:
            msg = f"{path} must hold one of the pixel values {sorted(saturations)} of {config} beside 0, not {values}"
            raise ValueError(msg)
        areas.append(saturations[values[0]].area(int(mask.count_nonzero())))
    return Defects((levels > 0).byte(), torch.tensor(areas, dtype=torch.float64))


def defects_config(path: Path | str) -> Path:
    """Where a category says what its masks mean, for one of its images or folders of masks; it may not be there."""
    return Path(path).parent.parent.parent / "defects_config.json"


def read_defect_masks(folder: Path | str) -> Tensor:
    """Read the masks of one anomalous image, for which no ``defects_config.json`` is needed.

    Args:
        folder: The image's folder in ``ground_truth``.

    Returns:
        uint8 tensor (defects, H, W), 1 on the defect and 0 elsewhere.

    Raises:
        FileNotFoundError: If there is no mask in the folder.
        ValueError: If a file is no image, or the masks differ in size.
    """
    return (_read_levels(folder) > 0).byte()


def _mask_files(folder: Path | str) -> list[Path]:
    return sorted(Path(folder).glob("*.png"))


def _mask_folder(image: Path) -> str:
    if image.parent.name == "good":
        return ""
    # Not parents[2], which a path of fewer folders lacks.
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
    """Values of a mask but 0, as they are in the file: as it is read, those above 255 have become 255."""
    deep = deep_values(path)
    values = levels if deep is None else torch.from_numpy(deep[0].astype(np.int64))
    return values[values > 0].unique().tolist()


@dataclass(frozen=True)
class _Saturation:
    """When an overlap with a kind of defect is enough: a share of its area, or a number of pixels."""

    threshold: float
    is_relative: bool

    def __post_init__(self) -> None:
        if not isinstance(self.is_relative, bool) or not 0 < self.threshold <= (
            1 if self.is_relative else float("inf")
        ):
            msg = f"saturation_threshold {self.threshold!r} with relative_saturation {self.is_relative!r}"
            raise ValueError(msg)

    def area(self, defect: int) -> float:
        """Saturation area in pixels of a defect of so many pixels."""
        # Rounded down as in MVTec's evaluation, where a share below a pixel would divide by zero.
        return max(1, int(self.threshold * defect)) if self.is_relative else min(self.threshold, defect)


@lru_cache
def _read_saturations(config: Path, _modified: int) -> dict[int, _Saturation]:
    """Saturation by pixel value; cached until the file is modified."""
    try:
        return _saturations(json.loads(config.read_text(encoding="utf-8")))
    except (KeyError, TypeError, ValueError) as error:
        msg = (
            f"{config} must list defects by a pixel_value from 1 to {_HIGHEST_PIXEL_VALUE} each, with a positive "
            f"saturation_threshold, at most 1 where relative_saturation is true, but holds: {error!r}"
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


class MVTecLOCOAD(AnomalibDataModule):
    """A category in the layout of MVTec LOCO AD.

    Unlike anomalib's ``MVTecLOCO`` it works with pandas 3 and with any category.

    Args:
        root: Folder of the categories.
        category: Name of the category's folder.
        train_batch_size: Training batch size.
        eval_batch_size: Validation and test batch size.
        num_workers: Workers of each data loader.
        train_augmentations: Augmentations of the training images.
        val_augmentations: Augmentations of the validation images.
        test_augmentations: Augmentations of the test images.
        augmentations: Augmentations of the images for which no others are given.
        test_split_mode: How the test set is made.
        val_split_mode: How the validation set is made. ``from_dir`` takes the validation folder. As it holds normal
            images only, the threshold becomes the highest of their scores, and anomalib clips scores far above to 1.
            ``same_as_test`` adapts the threshold to the anomalies, but by the labels of the test set.
        test_split_ratio: Share of the images that go into the test set, where it is split off.
        val_split_ratio: Share of the images that go into the validation set, where it is split off.
        seed: Seed of random splits.
        value_range: Values that become black and white in images of more than eight bits, by default all that 16 bits
            can hold; see :func:`~anomalib_ot.data.reading.read_picture`.

    Raises:
        ValueError: If the range is none.

    Example:
        >>> datamodule = MVTecLOCOAD(root="./datasets/MVTec_LOCO", category="breakfast_box")  # doctest: +SKIP
        >>> datamodule.setup()  # doctest: +SKIP
        >>> next(iter(datamodule.train_dataloader())).image.shape  # doctest: +SKIP
        torch.Size([32, 3, 1280, 1600])
    """

    def __init__(
        self,
        root: Path | str | None = "./datasets/MVTec_LOCO",
        category: str = "breakfast_box",
        train_batch_size: int = 32,
        eval_batch_size: int = 32,
        num_workers: int = 8,
        train_augmentations: Transform | None = None,
        val_augmentations: Transform | None = None,
        test_augmentations: Transform | None = None,
        augmentations: Transform | None = None,
        test_split_mode: TestSplitMode | str = TestSplitMode.FROM_DIR,
        val_split_mode: ValSplitMode | str = ValSplitMode.FROM_DIR,
        test_split_ratio: float | None = None,
        val_split_ratio: float | None = None,
        seed: int | None = None,
        value_range: ValueRange | None = None,
    ) -> None:
        check_value_range(value_range)
        super().__init__(
            train_batch_size=train_batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            train_augmentations=train_augmentations,
            val_augmentations=val_augmentations,
            test_augmentations=test_augmentations,
            augmentations=augmentations,
            test_split_mode=test_split_mode,
            val_split_mode=val_split_mode,
            test_split_ratio=test_split_ratio,
            val_split_ratio=val_split_ratio,
            seed=seed,
        )
        self.root = resolve_dataset_root(root, "MVTec_LOCO")
        self.category = category
        self.value_range = value_range

    def _setup(self, _stage: str | None = None) -> None:
        folder = self.root / self.category
        self.train_data, self.val_data, self.test_data = (
            LOCODataset(folder, split, value_range=self.value_range) for split in (Split.TRAIN, Split.VAL, Split.TEST)
        )
