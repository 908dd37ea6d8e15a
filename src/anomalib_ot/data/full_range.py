"""Pictures of more than eight bits a channel, from any data module or folder."""

from pathlib import Path
from typing import Any

import torch
from anomalib import TaskType
from anomalib.data import AnomalibDataModule, AnomalibDataset, PredictDataset
from anomalib.data.dataclasses.torch import ImageItem
from pandas import DataFrame
from torchvision.transforms.v2 import Transform
from torchvision.tv_tensors import Mask

from .reading import ValueRange, check_value_range, read_deep_picture, read_picture
from .wrapped import WrappedDataModule


class FullRange(WrappedDataModule):
    """Reads the pictures of another data module that have more than eight bits a channel as they are.

    anomalib's data modules read all pictures as if they had eight bits: values above 255 of a grey picture of 16 bits
    become white. Of pictures of up to eight bits nothing changes.

    Args:
        datamodule: The data module, such as anomalib's ``Folder``.
        value_range: Values that become black and white, such as ``(0, 4095)`` for a camera of 12 bits; see
            :func:`~anomalib_ot.data.reading.read_picture`.

    Raises:
        ValueError: If the range is none, or the data module makes synthetic anomalies, which anomalib draws on
            pictures as it reads them itself.

    Example:
        >>> from anomalib.data import Folder
        >>> data = FullRange(Folder("parts", normal_dir="good", root="parts"), value_range=(0, 4095))
        >>> data.value_range
        (0, 4095)
    """

    def __init__(self, datamodule: AnomalibDataModule, value_range: ValueRange | None = None) -> None:
        check_value_range(value_range)
        if "synthetic" in {datamodule.val_split_mode, datamodule.test_split_mode}:
            msg = "anomalib draws synthetic anomalies on pictures as it reads them itself: take other split modes"
            raise ValueError(msg)
        super().__init__(datamodule)
        self.value_range = value_range

    @property
    def name(self) -> str:  # type: ignore[override]  # as in the base class
        """Name of the data module."""
        return self.datamodule.name

    def _setup(self, _stage: str | None = None) -> None:
        """Set up the data module, and read its pictures in another way."""
        self.datamodule.setup(_stage)
        self.derive()

    def derive(self) -> None:
        """Read the pictures that the data module has in another way."""
        for part in ("train_data", "val_data", "test_data"):
            if hasattr(self.datamodule, part):
                setattr(self, part, FullRangeDataset(getattr(self.datamodule, part), self.value_range))


class FullRangeDataset(AnomalibDataset):
    """A dataset whose pictures of more than eight bits a channel are read as they are.

    Args:
        dataset: The dataset. Its augmentations become this one's.
        value_range: See :func:`~anomalib_ot.data.reading.read_picture`.
    """

    def __init__(self, dataset: AnomalibDataset, value_range: ValueRange | None = None) -> None:
        super().__init__(dataset.augmentations)
        self.dataset = dataset
        self.dataset.augmentations = None
        self.value_range = value_range

    @property
    def name(self) -> str:
        """Name of the dataset."""
        return self.dataset.name

    @property
    def samples(self) -> DataFrame:
        """Samples of the dataset."""
        return self.dataset.samples

    @samples.setter
    def samples(self, samples: DataFrame) -> None:
        self.dataset.samples = samples

    @property
    def category(self) -> str | None:
        """Category of the dataset."""
        return self.dataset.category

    @category.setter
    def category(self, category: str) -> None:
        self.dataset.category = category

    def __getitem__(self, index: int) -> ImageItem:
        """Read an item, and its picture anew if it has more than eight bits.

        Raises:
            ValueError: As :func:`~anomalib_ot.data.reading.read_picture`.
        """
        item: Any = self.dataset[index]
        picture = read_deep_picture(item.image_path, self.value_range)
        item.image = item.image if picture is None else picture
        if self.augmentations and self.task == TaskType.CLASSIFICATION:
            item.image = self.augmentations(item.image)
        elif self.augmentations:
            # As the host, which lets none of the random numbers depend on whether there is a mask.
            blank = Mask(torch.zeros(item.image.shape[-2:], dtype=torch.uint8))
            item.image, mask = self.augmentations(item.image, blank if item.gt_mask is None else Mask(item.gt_mask))
            item.gt_mask = item.gt_mask if item.gt_mask is None else mask
        return item


class FullRangePredictDataset(PredictDataset):
    """Pictures to predict, of which those of more than eight bits a channel are read as they are.

    Args:
        path: A picture, or a folder of them.
        transform: Applied to each picture.
        value_range: The one that the model was trained with; see
            :func:`~anomalib_ot.data.reading.read_picture`.

    Raises:
        ValueError: If the range is none.

    Example:
        >>> pictures = FullRangePredictDataset("new_parts", value_range=(0, 4095))  # doctest: +SKIP
        >>> engine.predict(model, dataset=pictures)  # doctest: +SKIP
    """

    def __init__(
        self, path: Path | str, transform: Transform | None = None, value_range: ValueRange | None = None
    ) -> None:
        check_value_range(value_range)
        super().__init__(path, transform)
        self.value_range = value_range

    def __getitem__(self, index: int) -> ImageItem:
        """Read a picture.

        Raises:
            ValueError: As :func:`~anomalib_ot.data.reading.read_picture`.
        """
        path = self.image_filenames[index]
        image = read_picture(path, self.value_range)
        return ImageItem(image=self.transform(image) if self.transform else image, image_path=str(path))
