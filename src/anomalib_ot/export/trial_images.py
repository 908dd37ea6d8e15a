"""Images to run an exported model on."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from anomalib.data import AnomalibDataModule, ImageItem
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as transforms

from anomalib_ot.data.reading import resized

# Cells of the noise along each side, from coarse to fine. The amplitude falls as the number rises.
_OCTAVES = (3, 12, 48)


@dataclass(frozen=True)
class TrialBatch:
    """A batch of images at the size of a model's input.

    Attributes:
        images: Images (B, 3, h, w).
        labels: Whether each image is anomalous, None if unknown.
        masks: Anomalous pixels (h, w) of each image, None if unknown.
    """

    images: Tensor
    labels: list[bool | None]
    masks: list[Tensor | None]


@dataclass(frozen=True)
class TrialImages:
    """Images in [0, 1] at the size of a model's input, resized as users of the exported model should resize them.

    Args:
        source: Description of their source.
        size: Height and width.
        items: The images before they are resized, with labels and masks if these are known.
    """

    source: str
    size: tuple[int, int]
    items: Sequence[ImageItem] | Dataset

    def __len__(self) -> int:
        return len(self.items)  # type: ignore[arg-type]  # a torch dataset has a length, if not by its type

    def read(self, indices: Iterable[int]) -> TrialBatch:
        """Read images by their indices, each once."""
        items = [self.items[index] for index in indices]
        return TrialBatch(
            torch.stack([resized(torch.as_tensor(item.image), self.size) for item in items]),
            [None if item.gt_label is None else bool(item.gt_label) for item in items],
            [
                None if item.gt_mask is None else transforms.resize(item.gt_mask[None].float(), list(self.size))[0] > 0
                for item in items
            ],
        )

    def batches(self, size: int) -> Iterator[tuple[int, ...]]:
        """Yield the indices of all images, ``size`` at a time; the last batch may be smaller."""
        for start in range(0, len(self), size):
            yield tuple(range(start, min(start + size, len(self))))


def synthetic_images(size: tuple[int, int], count: int = 6, seed: int = 0) -> TrialImages:
    """Make noise of three scales, for an export without a data module.

    Args:
        size: Height and width.
        count: Number of images.
        seed: Seed of the noise.

    Returns:
        The images, without labels and masks.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = sum(
        F.interpolate(torch.rand(count, 3, cells, cells, generator=generator), size, mode="bicubic") / (1 + index)
        for index, cells in enumerate(_OCTAVES)
    )
    images = (torch.as_tensor(noise) / sum(1 / (1 + index) for index in range(len(_OCTAVES)))).clamp(0, 1)
    return TrialImages(f"synthetic noise, seed {seed}", size, [ImageItem(image=image) for image in images])


def validation_images(datamodule: AnomalibDataModule, size: tuple[int, int]) -> TrialImages:
    """Return the validation set of a data module, which is set up if necessary.

    Args:
        datamodule: The data module.
        size: Height and width to resize to.

    Returns:
        The images.

    Raises:
        ValueError: If the validation set is empty.
    """
    # A second setup could change the random split.
    if not hasattr(datamodule, "val_data"):
        datamodule.prepare_data()
        datamodule.setup("fit")
    items = getattr(datamodule, "val_data", None)
    if not items:
        msg = (
            f"the export is checked on validation images, and {datamodule.name} has none; set "
            "val_split_mode=same_as_test"
        )
        raise ValueError(msg)
    return TrialImages(f"validation set of {datamodule.name}", size, items)
