"""Pictures as a model sees them."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from anomalib.data import ImageItem
from anomalib.models.components import AnomalibModule
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from anomalib_ot.components.backbones import denormalize


@dataclass(frozen=True)
class Picture:
    """A picture as a model sees it.

    Args:
        name: Folder and file, such as ``scratch/003``, or its number where it has none.
        prepared: What the torch model takes, (3, h, w), resized and normalised.
        image: The same as RGB in [0, 1], (3, h, w).
        label: Whether it shows an anomaly, None where that is not known.
        mask: Where the anomaly is, Boolean (h, w), None where that is not known.
    """

    name: str
    prepared: Tensor
    image: Tensor
    label: bool | None = None
    mask: Tensor | None = None


def pictures_of(model: AnomalibModule, items: Iterable[ImageItem]) -> Iterator[Picture]:
    """Prepare pictures one by one, as the model's pre-processor does.

    Args:
        model: The model, on any device.
        items: The pictures, as a data module's ``test_data`` yields them.

    Yields:
        The pictures, on the model's device.
    """
    for number, item in enumerate(items):
        assert item.image is not None  # noqa: S101 - a data set's items have images
        image = item.image.to(model.device)
        transform = getattr(model.pre_processor, "transform", None)
        prepared = (transform(image[None]) if transform else image[None])[0]
        mask = item.gt_mask
        if mask is not None:
            size = list(prepared.shape[-2:])
            mask = transforms.resize(mask.squeeze()[None].float(), size, antialias=False)[0] > 0
        yield Picture(
            _name(item.image_path) if item.image_path else str(number),
            prepared,
            denormalize(prepared, model.pre_processor).clamp(0, 1),
            None if item.gt_label is None else bool(item.gt_label),
            mask,
        )


def _name(path: str) -> str:
    return str(Path(Path(path).parent.name) / Path(path).stem)


def stack(pictures: Iterable[Picture]) -> Tensor:
    """The pictures as a batch for the torch model, (B, 3, h, w)."""
    return torch.stack([picture.prepared for picture in pictures])
