"""Few training images of any data module."""

from typing import Any

import torch
from anomalib.data import AnomalibDataModule
from anomalib.data.utils import read_image
from torch.utils.data import DataLoader

from anomalib_ot.settings import require

from .wrapped import WrappedDataModule


class FewShot(WrappedDataModule):
    """Keeps ``shots`` random training images of another data module; validation and test images do not change.

    With the same seed, a larger ``shots`` keeps all images of a smaller one and adds others.

    Args:
        datamodule: Data module to draw from.
        shots: Number of training images to keep, at least 1.
        seed: Seed of the draw, at least 0.

    Raises:
        ValueError: If ``shots`` is below 1 or ``seed`` is negative. On set-up, if the data module has fewer training
            images, or a drawn image cannot be read.

    Example:
        >>> from anomalib.data import MVTecAD
        >>> data = FewShot(MVTecAD(category="bottle"), shots=4, seed=3)
        >>> data.shots
        4
    """

    def __init__(self, datamodule: AnomalibDataModule, shots: int = 4, seed: int = 0) -> None:
        require(shots >= 1, "shots", "at least 1", shots)
        require(seed >= 0, "seed", "at least 0", seed)
        super().__init__(datamodule, seed)
        self.shots = shots

    @property
    def name(self) -> str:  # type: ignore[override]  # as in the base class
        """Name of the inner data module, with the number of shots and the seed."""
        return f"{self.datamodule.name}_{self.shots}shot_{self.seed}"

    def derive(self) -> None:
        """Draw from the training images of the inner data module."""
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

    def predict_dataloader(self) -> DataLoader[Any]:
        """Data loader of the inner data module for prediction."""
        return self.datamodule.predict_dataloader()


def _check_readable(path: str) -> None:
    try:
        read_image(path)
    except Exception as error:
        msg = f"the support image {path} cannot be read: {error}"
        raise ValueError(msg) from error
