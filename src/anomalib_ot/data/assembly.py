"""A small procedural category with logical and structural anomalies, generated locally without a download."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from anomalib.data.utils import TestSplitMode, ValSplitMode
from anomalib.utils.path import resolve_dataset_root
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms.v2 import Transform

from anomalib_ot.settings import require

from .loco import MVTecLOCOAD
from .tray import LOGICAL_ANOMALIES, STRUCTURAL_ANOMALIES, Tray

DEFECTS_CONFIG: list[dict[str, Any]] = [
    {"defect_name": "swapped_part", "pixel_value": 255, "saturation_threshold": 1.0, "relative_saturation": True},
    # The area of the smallest part, a coin: an empty place of this size is enough to find a missing part.
    {"defect_name": "missing_part", "pixel_value": 254, "saturation_threshold": 1900, "relative_saturation": False},
    {"defect_name": "duplicated_part", "pixel_value": 253, "saturation_threshold": 1.0, "relative_saturation": True},
    {"defect_name": "scratch", "pixel_value": 252, "saturation_threshold": 1.0, "relative_saturation": True},
    {"defect_name": "stain", "pixel_value": 251, "saturation_threshold": 1.0, "relative_saturation": True},
    {"defect_name": "chip", "pixel_value": 250, "saturation_threshold": 1.0, "relative_saturation": True},
]
"""Content of ``defects_config.json``, in the format of MVTec LOCO AD."""

# Increase with every change to the images, so that older folders are not reused.
_VERSION = 1
_SETTINGS_FILE = "assembly.json"
_DEFECTS = {
    "test/logical_anomalies": list(LOGICAL_ANOMALIES),
    "test/structural_anomalies": list(STRUCTURAL_ANOMALIES),
}


class Assembly(MVTecLOCOAD):
    """A tray with nine parts, composed from photographs, in the layout of MVTec LOCO AD.

    The parts are cut from the photographs in scikit-image's wheel. Normal images differ in the crop that shows a part,
    its pose, the light and the noise. Logical anomalies are swapped, missing and duplicated parts. Structural anomalies
    are scratches, stains and chips. ``prepare_data`` writes RGB images of 256 x 256 pixels to ``root/category``, which
    takes a few seconds, and reuses them later. The same settings give the same bytes.

    Args:
        root: Folder of the categories.
        category: Name of the category's folder.
        train_batch_size: Training batch size.
        eval_batch_size: Validation and test batch size.
        num_workers: Number of workers of each data loader. 0 by default: reading a few small images takes less time
            than starting a worker.
        train_augmentations: Augmentations of the training images.
        val_augmentations: Augmentations of the validation images.
        test_augmentations: Augmentations of the test images.
        augmentations: Augmentations of all images for which none of the above is given.
        test_split_mode: How the test set is created.
        val_split_mode: How the validation set is created. ``same_as_test``, as in anomalib's ``MVTecAD``, adapts the
            threshold and the range of the scores to the anomalies. It uses the labels of the test set, which inflates
            F1 scores. ``from_dir`` uses the validation folder. This folder contains normal images only, so the
            threshold is the highest of their scores, and anomalib clips much higher scores to 1.
        test_split_ratio: Share of the images in the test set, if it is split off.
        val_split_ratio: Share of the images in the validation set, if it is split off.
        n_train: Number of normal training images.
        n_validation: Number of normal validation images.
        n_test: Number of test images of each kind: normal, logical and structural.
        seed: Seed of the images and of random splits.

    Raises:
        ValueError: If a number of images is below 1 or the seed is negative.

    Example:
        >>> datamodule = Assembly(n_train=8)  # doctest: +SKIP
        >>> datamodule.prepare_data()  # doctest: +SKIP
        >>> datamodule.setup()  # doctest: +SKIP
        >>> next(iter(datamodule.train_dataloader())).image.shape  # doctest: +SKIP
        torch.Size([8, 3, 256, 256])
    """

    def __init__(
        self,
        root: Path | str | None = "./datasets/Assembly",
        category: str = "tray",
        train_batch_size: int = 32,
        eval_batch_size: int = 32,
        num_workers: int = 0,
        train_augmentations: Transform | None = None,
        val_augmentations: Transform | None = None,
        test_augmentations: Transform | None = None,
        augmentations: Transform | None = None,
        test_split_mode: TestSplitMode | str = TestSplitMode.FROM_DIR,
        val_split_mode: ValSplitMode | str = ValSplitMode.SAME_AS_TEST,
        test_split_ratio: float | None = None,
        val_split_ratio: float | None = None,
        n_train: int = 64,
        n_validation: int = 12,
        n_test: int = 20,
        seed: int = 0,
    ) -> None:
        super().__init__(
            root=resolve_dataset_root(root, "Assembly"),
            category=category,
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
        self._settings = {"n_train": n_train, "n_validation": n_validation, "n_test": n_test, "seed": seed}
        for name, value in self._settings.items():
            least = 0 if name == "seed" else 1
            require(value >= least, name, f"at least {least}", value)

    def prepare_data(self) -> None:
        """Write the category, or reuse an existing one.

        Raises:
            FileExistsError: If this class did not write the existing folder with these settings.
        """
        folder = self.root / self.category
        settings = json.dumps({"version": _VERSION, **self._settings})
        if folder.exists():
            path = folder / _SETTINGS_FILE
            found = path.read_text() if path.exists() else None
            if found != settings:
                origin = f"was written with {found}, not {settings}" if found else "was not written by Assembly"
                msg = f"{folder} {origin}: remove it or choose another root"
                raise FileExistsError(msg)
            return
        self.root.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{self.category}-", dir=self.root) as scratch:
            unfinished = Path(scratch) / self.category
            write_category(unfinished, **self._settings)
            (unfinished / _SETTINGS_FILE).write_text(settings)
            # Rename only a complete folder. Another process may have written the category first.
            if not folder.exists():
                unfinished.rename(folder)


def write_category(folder: Path, n_train: int, n_validation: int, n_test: int, seed: int) -> None:
    """Write a category to a new folder, with the settings of :class:`Assembly`."""
    tray = Tray(seed)
    counts = {
        "train/good": n_train,
        "validation/good": n_validation,
        "test/good": n_test,
        "test/logical_anomalies": n_test,
        "test/structural_anomalies": n_test,
    }
    for group, (images, count) in enumerate(counts.items()):
        (folder / images).mkdir(parents=True)
        for index in range(count):
            defects = _DEFECTS.get(images, [None])
            defect = defects[index % len(defects)]
            image, masks = tray.picture((group, index), defect)
            # Sensor noise hardly compresses, so the fastest level costs little space.
            Image.fromarray(image).save(folder / images / f"{index:03d}.png", compress_level=1)
            if defect is not None:
                _write_masks(folder / "ground_truth" / Path(images).name / f"{index:03d}", masks, defect)
    (folder / "defects_config.json").write_text(json.dumps(DEFECTS_CONFIG, indent=1))


def _write_masks(folder: Path, masks: list[NDArray[np.bool_]], defect: str) -> None:
    pixel_value = next(entry["pixel_value"] for entry in DEFECTS_CONFIG if entry["defect_name"] == defect)
    folder.mkdir(parents=True)
    for number, mask in enumerate(masks):
        Image.fromarray(np.where(mask, pixel_value, 0).astype(np.uint8)).save(folder / f"{number:03d}.png")
