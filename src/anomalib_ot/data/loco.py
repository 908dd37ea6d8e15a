"""Categories in the layout of MVTec LOCO AD (Bergmann et al., 2022, https://doi.org/10.1007/s11263-022-01578-9).

A category is a folder::

    breakfast_box/
    ├── train/good/000.png
    ├── validation/good/000.png
    ├── test/{good,logical_anomalies,structural_anomalies}/000.png
    ├── ground_truth/{logical_anomalies,structural_anomalies}/000/000.png   one mask per defect
    └── defects_config.json                                                 what the masks' pixel values mean

``gt_mask`` of an item is the union of its defects. :class:`~anomalib_ot.data.defects.Defects` holds them one by one:
they may overlap, and each saturates at its own area. Get them from an item with :meth:`LOCODataset.defects`, from an
image file with :func:`~anomalib_ot.data.defects.image_defects`, and from a folder in ``ground_truth`` with
:func:`~anomalib_ot.data.defects.read_defects`.
"""

from pathlib import Path

import pandas as pd
import torch
from anomalib.data import AnomalibDataModule, AnomalibDataset
from anomalib.data.dataclasses.torch import ImageItem
from anomalib.data.utils import Split, TestSplitMode, ValSplitMode
from anomalib.utils.path import resolve_dataset_root
from torchvision.transforms.v2 import Transform
from torchvision.tv_tensors import Mask

from anomalib_ot.images.reading import ValueRange, check_value_range

from .defects import Defects, image_defects, mask_folder, read_defect_masks
from .reading import read_picture

SPLIT_FOLDERS = {Split.TRAIN: "train", Split.VAL: "validation", Split.TEST: "test"}


class LOCODataset(AnomalibDataset):
    """One split of a category in the layout of MVTec LOCO AD.

    An item's ``gt_mask`` is the union of its defect masks. Its ``mask_path`` is the folder of these masks.

    Args:
        root: Folder of the category.
        split: ``train``, ``val`` or ``test``.
        augmentations: Applied to the image and the mask together.
        value_range: Values that map to black and white in images with more than 8 bits per channel; the full 16-bit
            range by default. See :func:`~anomalib_ot.data.reading.read_picture`.

    Raises:
        FileNotFoundError: If the folder, the images of the split, or the masks of an anomalous image are missing.
        ValueError: If ``value_range`` is invalid.

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
        """Read an image and the union of its masks.

        Raises:
            ValueError: If a file is not an image, or the masks and the image differ in size. The message names the
                file.
        """
        sample = self.samples.iloc[index]
        image = read_picture(sample.image_path, self.value_range)
        mask = Mask(torch.zeros(image.shape[-2:], dtype=torch.uint8))
        if sample.mask_path:
            mask = Mask(read_defect_masks(sample.mask_path).amax(0))
            if mask.shape != image.shape[-2:]:
                msg = f"the masks in {sample.mask_path} and the image {sample.image_path} differ in size"
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
        """Defects of an image, one by one, at the size of the file; augmentations are not applied.

        Raises:
            FileNotFoundError: If the category has no ``defects_config.json``.
            ValueError: In the cases of :func:`~anomalib_ot.data.defects.image_defects`.
        """
        return image_defects(self.samples.iloc[index].image_path)


def make_dataset(root: Path | str, split: Split | str) -> pd.DataFrame:
    """List the images of one split.

    Args:
        root: Folder of the category.
        split: ``train``, ``val`` or ``test``.

    Returns:
        One row per image, in the order of the file names, with the columns ``path`` (the category), ``split``,
        ``label`` (the image's folder), ``image_path``, ``mask_path`` (the folder of its masks, empty for a normal
        image) and ``label_index`` (0 normal, 1 anomalous).

    Raises:
        FileNotFoundError: If the folder, the images of the split, or the masks of an anomalous image are missing.
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
            "mask_path": [mask_folder(image) for image in images],
            "label_index": [int(image.parent.name != "good") for image in images],
        }
    )
    samples.attrs["task"] = "segmentation"
    return samples


class MVTecLOCOAD(AnomalibDataModule):
    """A category in the layout of MVTec LOCO AD.

    Unlike anomalib's ``MVTecLOCO``, it works with pandas 3 and with any category.

    Args:
        root: Folder of the categories.
        category: Name of the category's folder.
        train_batch_size: Training batch size.
        eval_batch_size: Validation and test batch size.
        num_workers: Number of workers of each data loader.
        train_augmentations: Augmentations of the training images.
        val_augmentations: Augmentations of the validation images.
        test_augmentations: Augmentations of the test images.
        augmentations: Augmentations of all images for which none of the above is given.
        test_split_mode: How the test set is created.
        val_split_mode: How the validation set is created. ``from_dir`` uses the validation folder. This folder contains
            normal images only, so the threshold is the highest of their scores, and anomalib clips much higher scores
            to 1. ``same_as_test`` adapts the threshold to the anomalies, but uses the labels of the test set.
        test_split_ratio: Share of the images in the test set, if it is split off.
        val_split_ratio: Share of the images in the validation set, if it is split off.
        seed: Seed of random splits.
        value_range: Values that map to black and white in images with more than 8 bits per channel; the full 16-bit
            range by default. See :func:`~anomalib_ot.data.reading.read_picture`.

    Raises:
        ValueError: If ``value_range`` is invalid.

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
