"""Base class of data modules that wrap another data module."""

from abc import abstractmethod
from copy import deepcopy

from anomalib.data import AnomalibDataModule


class WrappedDataModule(AnomalibDataModule):
    """A data module that derives its sets from another one and keeps its batch sizes, augmentations and splits.

    Args:
        datamodule: The inner data module. A copy of it is kept.
        seed: Random seed; the inner data module's seed by default.
    """

    def __init__(self, datamodule: AnomalibDataModule, seed: int | None = None) -> None:
        # Set-up changes the data module, and others may wrap it too.
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
        """Category of the inner data module."""
        return self.datamodule.category

    @category.setter
    def category(self, category: str) -> None:
        self.datamodule.category = category

    @abstractmethod
    def derive(self) -> None:
        """Create the training, validation and test sets from the current ones of the inner data module."""

    def prepare_data(self) -> None:
        """Prepare the data of the inner data module."""
        self.datamodule.prepare_data()

    def _setup(self, _stage: str | None = None) -> None:
        """Set up the inner data module and derive from it."""
        self.datamodule.setup(_stage)
        self.derive()

    def _create_test_split(self) -> None:
        """Do nothing: the inner data module has split its images."""

    def _create_val_split(self) -> None:
        """Do nothing: the inner data module has split its images."""
