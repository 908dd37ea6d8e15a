"""What data modules that are made from another one have in common."""

from abc import abstractmethod
from copy import deepcopy

from anomalib.data import AnomalibDataModule


class WrappedDataModule(AnomalibDataModule):
    """A data module that changes what another one gives, with its batches, augmentations and splits.

    Args:
        datamodule: The other one, of which a copy is kept.
        seed: Seed of what is drawn from it; its own by default.
    """

    def __init__(self, datamodule: AnomalibDataModule, seed: int | None = None) -> None:
        # A set-up of its own, so that others made from the same data module find it as it was.
        self.datamodule = deepcopy(datamodule)
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
            seed=datamodule.seed if seed is None else seed,
        )

    @property
    def category(self) -> str:
        """Category of the other data module."""
        return self.datamodule.category

    @category.setter
    def category(self, category: str) -> None:
        self.datamodule.category = category

    @abstractmethod
    def derive(self) -> None:
        """Make the training, validation and test sets from those that the other data module has now."""

    def prepare_data(self) -> None:
        """Let the other data module prepare its data."""
        self.datamodule.prepare_data()

    def _create_test_split(self) -> None:
        """Nothing: the other data module has split its images."""

    def _create_val_split(self) -> None:
        """Nothing: the other data module has split its images."""
