"""Images with more than 8 bits per channel, from any data module or folder."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from anomalib import TaskType
from anomalib.data import AnomalibDataModule, AnomalibDataset, PredictDataset
from anomalib.data.dataclasses.torch import ImageItem
from pandas import DataFrame
from torchvision.transforms.v2 import Transform
from torchvision.tv_tensors import Mask

from anomalib_ot.images.reading import Reading, ValueRange, check_value_range, deep_values

from .reading import read_deep_picture, read_picture
from .wrapped import WrappedDataModule


class FullRange(WrappedDataModule):
    """Reads images with more than 8 bits per channel of another data module at their full range.

    anomalib's data modules read all images as 8-bit images: in a 16-bit grey image, values above 255 become white.
    Images with up to 8 bits per channel do not change.

    Args:
        datamodule: The data module, such as anomalib's ``Folder``.
        value_range: Values that map to black and white, such as ``(0, 4095)`` for a 12-bit camera; see
            :func:`~anomalib_ot.data.reading.read_picture`.

    Raises:
        ValueError: If ``value_range`` is invalid, or the data module creates synthetic anomalies: anomalib draws them
            on images that it reads as 8-bit images.

    Example:
        >>> from anomalib.data import Folder
        >>> data = FullRange(Folder("parts", normal_dir="good", root="parts"), value_range=(0, 4095))
        >>> data.value_range
        (0, 4095)
    """

    def __init__(self, datamodule: AnomalibDataModule, value_range: ValueRange | None = None) -> None:
        check_value_range(value_range)
        if "synthetic" in {datamodule.val_split_mode, datamodule.test_split_mode}:
            msg = "anomalib draws synthetic anomalies on images that it reads as 8-bit images: choose other split modes"
            raise ValueError(msg)
        super().__init__(datamodule)
        self.value_range = value_range

    @property
    def name(self) -> str:  # type: ignore[override]  # as in the base class
        """Name of the inner data module."""
        return self.datamodule.name

    def derive(self) -> None:
        """Read the images of the inner data module at their full range."""
        for part in ("train_data", "val_data", "test_data"):
            if hasattr(self.datamodule, part):
                setattr(self, part, FullRangeDataset(getattr(self.datamodule, part), self.value_range))


class FullRangeDataset(AnomalibDataset):
    """Reads images with more than 8 bits per channel of another dataset at their full range.

    Args:
        dataset: The dataset. Its augmentations move to this one.
        value_range: See :func:`~anomalib_ot.data.reading.read_picture`.
    """

    def __init__(self, dataset: AnomalibDataset, value_range: ValueRange | None = None) -> None:
        super().__init__(dataset.augmentations)
        self.dataset = dataset
        self.dataset.augmentations = None
        self.value_range = value_range

    @property
    def name(self) -> str:
        """Name of the inner dataset."""
        return self.dataset.name

    @property
    def samples(self) -> DataFrame:
        """Samples of the inner dataset."""
        return self.dataset.samples

    @samples.setter
    def samples(self, samples: DataFrame) -> None:
        self.dataset.samples = samples

    @property
    def category(self) -> str | None:
        """Category of the inner dataset."""
        return self.dataset.category

    @category.setter
    def category(self, category: str) -> None:
        self.dataset.category = category

    def __getitem__(self, index: int) -> ImageItem:
        """Read an item, and read its image again if it has more than 8 bits per channel.

        Raises:
            ValueError: In the cases of :func:`~anomalib_ot.data.reading.read_picture`.
        """
        item: Any = self.dataset[index]
        picture = read_deep_picture(item.image_path, self.value_range)
        item.image = item.image if picture is None else picture
        if self.augmentations and self.task == TaskType.CLASSIFICATION:
            item.image = self.augmentations(item.image)
        elif self.augmentations:
            # As in anomalib, a missing mask must not change the random numbers that are drawn.
            blank = Mask(torch.zeros(item.image.shape[-2:], dtype=torch.uint8))
            item.image, mask = self.augmentations(item.image, blank if item.gt_mask is None else Mask(item.gt_mask))
            item.gt_mask = item.gt_mask if item.gt_mask is None else mask
        return item


class FullRangePredictDataset(PredictDataset):
    """Images to predict, read at their full range if they have more than 8 bits per channel.

    Args:
        path: An image or a folder of images.
        transform: Applied to each image.
        value_range: The range that the model was trained with; see
            :func:`~anomalib_ot.data.reading.read_picture`.

    Raises:
        ValueError: If ``value_range`` is invalid.

    Example:
        >>> images = FullRangePredictDataset("new_parts", value_range=(0, 4095))  # doctest: +SKIP
        >>> engine.predict(model, dataset=images)  # doctest: +SKIP
    """

    def __init__(
        self, path: Path | str, transform: Transform | None = None, value_range: ValueRange | None = None
    ) -> None:
        check_value_range(value_range)
        super().__init__(path, transform)
        self.value_range = value_range

    def __getitem__(self, index: int) -> ImageItem:
        """Read an image.

        Raises:
            ValueError: In the cases of :func:`~anomalib_ot.data.reading.read_picture`.
        """
        path = self.image_filenames[index]
        image = read_picture(path, self.value_range)
        return ImageItem(image=self.transform(image) if self.transform else image, image_path=str(path))


def reading_of(dataset: Any) -> Reading:
    """How a dataset, or the one that it wraps, reads images with more than 8 bits per channel."""
    while not hasattr(dataset, "value_range") and (inner := _wrapped(dataset)) is not None:
        dataset = inner
    if not hasattr(dataset, "value_range"):
        return Reading()
    return Reading(is_full_range=True, value_range=dataset.value_range)


def reading_of_images(dataset: Any) -> Reading:
    """How a dataset reads its images, and whether its first one has more than 8 bits per channel."""
    paths = getattr(getattr(dataset, "samples", None), "image_path", ())
    return replace(reading_of(dataset), is_deep=len(paths) > 0 and is_deep(next(iter(paths))))


def is_deep(path: Path | str) -> bool:
    """Whether a file is an image with more than 8 bits per channel; a file that cannot be read is none."""
    try:
        return deep_values(path) is not None
    except (FileNotFoundError, ValueError):
        return False


def _wrapped(dataset: Any) -> Any:
    """The data set that another one wraps, or the first of several; None if it wraps none."""
    return getattr(dataset, "dataset", None) or next(iter(getattr(dataset, "datasets", ())), None)


def images_read(path: Path | str, reading: Reading, transform: Transform | None = None) -> PredictDataset:
    """An image, or the images of a folder, with a reading.

    Args:
        path: The image or the folder.
        reading: How images with more than 8 bits per channel are read.
        transform: Applied to each image.
    """
    if reading.is_full_range:
        return FullRangePredictDataset(path, transform, reading.value_range)
    return PredictDataset(path, transform)
