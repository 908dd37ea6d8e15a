"""A few training images of any data module."""

from copy import deepcopy
from typing import Any

import torch
from anomalib.data import AnomalibDataModule
from anomalib.data.utils import read_image
from torch.utils.data import DataLoader


class FewShot(AnomalibDataModule):
    """Keeps ``shots`` training images of another data module, chosen by a seed; its other images are untouched.

    The images of fewer shots are among those of more, for the same seed.

    Args:
        datamodule: Data module to draw from.
        shots: Number of training images to keep.
        seed: Seed of the choice.

    Raises:
        ValueError: If ``shots`` is below 1 or the seed negative; on set-up, if there are fewer training images or one
            that was drawn cannot be read.

    Example:
        >>> from anomalib.data import MVTecAD
        >>> data = FewShot(MVTecAD(category="bottle"), shots=4, seed=3)
        >>> data.shots
        4
    """

    def __init__(self, datamodule: AnomalibDataModule, shots: int = 4, seed: int = 0) -> None:
        if shots < 1:
            msg = f"shots must be at least 1, not {shots}"
            raise ValueError(msg)
        if seed < 0:
            msg = f"seed must be at least 0, not {seed}"
            raise ValueError(msg)
        # A set-up of its own, so that other draws from the same data module find it as it was.
        self.datamodule = deepcopy(datamodule)
        self.shots = shots
        super().__init__(
            train_batch_size=datamodule.train_batch_size,
            eval_batch_size=datamodule.eval_batch_size,
            num_workers=datamodule.num_workers,
            train_augmentations=datamodule.train_augmentations,
            val_augmentations=datamodule.val_augmentations,
            test_augmentations=datamodule.test_augmentations,
            val_split_mode=datamodule.val_split_mode,
            val_split_ratio=datamodule.val_split_ratio,
            test_split_mode=datamodule.test_split_mode,
            test_split_ratio=datamodule.test_split_ratio,
            seed=seed,
        )

    @property
    def name(self) -> str:  # type: ignore[override]  # as in the base class
        """Name of the data module drawn from, with the number of shots and the seed."""
        return f"{self.datamodule.name}_{self.shots}shot_{self.seed}"

    @property
    def category(self) -> str:
        """Category of the data module drawn from."""
        return self.datamodule.category

    @category.setter
    def category(self, category: str) -> None:
        self.datamodule.category = category

    def prepare_data(self) -> None:
        """Let the data module prepare its data."""
        self.datamodule.prepare_data()

    def _setup(self, _stage: str | None = None) -> None:
        """Set up the data module and draw from its training images."""
        self.datamodule.setup(_stage)
        train = self.datamodule.train_data
        if len(train) < self.shots:
            msg = f"shots is {self.shots}, but {self.datamodule.name} has {len(train)} training images"
            raise ValueError(msg)
        generator = torch.Generator().manual_seed(self.seed or 0)
        drawn = torch.randperm(len(train), generator=generator)[: self.shots].tolist()
        self.train_data = train.subsample(sorted(drawn))
        for path in self.train_data.samples.image_path:
            _check_readable(path)
        for part in ("val_data", "test_data"):
            if hasattr(self.datamodule, part):
                setattr(self, part, getattr(self.datamodule, part))

    def _create_test_split(self) -> None:
        """Nothing: the data module has split its images."""

    def _create_val_split(self) -> None:
        """Nothing: the data module has split its images."""

    def predict_dataloader(self) -> DataLoader[Any]:
        """What the data module predicts."""
        return self.datamodule.predict_dataloader()


def _check_readable(path: str) -> None:
    try:
        read_image(path)
    except Exception as error:
        msg = f"the support image {path} cannot be read: {error}"
        raise ValueError(msg) from error
