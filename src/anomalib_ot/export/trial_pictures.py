"""Pictures to try an exported model on."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from anomalib.data import AnomalibDataModule, ImageItem
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as transforms

from anomalib_ot.data.reading import resized

# Cells of the noise along each side, from coarse to fine; the amplitude falls as the number rises.
_OCTAVES = (3, 12, 48)


@dataclass(frozen=True)
class Shown:
    """Some of the pictures, as they are shown to a model.

    Attributes:
        images: Images (B, 3, h, w).
        labels: Whether each shows an anomaly, None where it is not known.
        masks: Where the anomaly is, (h, w), None where it is not known.
    """

    images: Tensor
    labels: list[bool | None]
    masks: list[Tensor | None]


@dataclass(frozen=True)
class TrialPictures:
    """Pictures in [0, 1] at the size of a model's input, as whoever runs the exported model gives them to it.

    Args:
        source: Where they are from, in words.
        size: Height and width.
        items: The pictures before they are resized, with labels and masks where these are known.
    """

    source: str
    size: tuple[int, int]
    items: Sequence[ImageItem] | Dataset

    def __len__(self) -> int:
        return len(self.items)  # type: ignore[arg-type]  # a torch dataset has a length, if not by its type

    def read(self, indices: Iterable[int]) -> Shown:
        """Some of the pictures, each of which is read once."""
        items = [self.items[index] for index in indices]
        return Shown(
            torch.stack([resized(torch.as_tensor(item.image), self.size) for item in items]),
            [None if item.gt_label is None else bool(item.gt_label) for item in items],
            [
                None if item.gt_mask is None else transforms.resize(item.gt_mask[None].float(), list(self.size))[0] > 0
                for item in items
            ],
        )

    def batches(self, size: int) -> Iterator[tuple[int, ...]]:
        """Their numbers, ``size`` at a time; the last batch may be smaller."""
        for start in range(0, len(self), size):
            yield tuple(range(start, min(start + size, len(self))))


def synthetic_pictures(size: tuple[int, int], count: int = 6, seed: int = 0) -> TrialPictures:
    """Noise of three scales, for a model that no pictures come with.

    Args:
        size: Height and width.
        count: Number of pictures.
        seed: Seed of the noise.

    Returns:
        The pictures, without labels or masks.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = sum(
        F.interpolate(torch.rand(count, 3, cells, cells, generator=generator), size, mode="bicubic") / (1 + index)
        for index, cells in enumerate(_OCTAVES)
    )
    images = (torch.as_tensor(noise) / sum(1 / (1 + index) for index in range(len(_OCTAVES)))).clamp(0, 1)
    return TrialPictures(f"synthetic noise, seed {seed}", size, [ImageItem(image=image) for image in images])


def validation_pictures(datamodule: AnomalibDataModule, size: tuple[int, int]) -> TrialPictures:
    """The validation set of a data module, which is set up if it is not yet.

    Args:
        datamodule: The data module.
        size: Height and width to resize to.

    Returns:
        The pictures.

    Raises:
        ValueError: If there are none.
    """
    # A second set-up could split the pictures anew.
    if not hasattr(datamodule, "val_data"):
        datamodule.prepare_data()
        datamodule.setup("fit")
    items = getattr(datamodule, "val_data", None)
    if not items:
        msg = f"{datamodule.name} has no validation pictures to judge the export by; set val_split_mode=same_as_test"
        raise ValueError(msg)
    return TrialPictures(f"validation set of {datamodule.name}", size, items)
