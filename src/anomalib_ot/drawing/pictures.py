"""Images as prepared for a model."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from anomalib.data import ImageBatch, ImageItem
from anomalib.models.components import AnomalibModule
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from anomalib_ot.features.preprocessing import denormalize

Extent = tuple[float, float, float, float]


@dataclass(frozen=True)
class Picture:
    """An image as prepared for a model.

    Args:
        name: Folder and file name without suffix, such as ``scratch/003``, or the index if there is no file.
        prepared: Input of the torch model, (3, h, w), resized and normalised.
        image: The same image as RGB in [0, 1], (3, h, w).
        label: Whether the image is anomalous, None if unknown.
        mask: Boolean mask (h, w) of the anomaly, None if unknown.
        path: Path of the file; empty if there is none.
        extent: Left, top, right and bottom edge of the model's input, in pixels of the file; None if unknown.
    """

    name: str
    prepared: Tensor
    image: Tensor
    label: bool | None = None
    mask: Tensor | None = None
    path: str = ""
    extent: Extent | None = None


def pictures_of(model: AnomalibModule, items: Iterable[ImageItem]) -> Iterator[Picture]:
    """Prepare images one by one with the model's pre-processor.

    Args:
        model: The model, on any device.
        items: The images, as a data module's ``test_data`` yields them.

    Yields:
        The images, on the model's device.
    """
    for number, item in enumerate(items):
        assert item.image is not None  # noqa: S101 - items of a data set have images
        image = item.image.to(model.device)
        transform = getattr(model.pre_processor, "transform", None)
        prepared = (transform(image[None]) if transform else image[None])[0]
        mask = item.gt_mask
        if mask is not None:
            size = list(prepared.shape[-2:])
            mask = transforms.resize(mask.squeeze()[None].float(), size, antialias=False)[0] > 0
        yield Picture(
            name_of(item.image_path) if item.image_path else str(number),
            prepared,
            denormalize(prepared, model.pre_processor).clamp(0, 1),
            None if item.gt_label is None else bool(item.gt_label),
            mask,
            str(item.image_path or ""),
            extent_of(model, (image.shape[-2], image.shape[-1])),
        )


def prepared_pictures(model: AnomalibModule, batch: ImageBatch) -> Iterator[Picture]:
    """The images of a batch that the model's pre-processor has already prepared, as in callbacks of the trainer.

    Args:
        model: The model.
        batch: The batch, with the paths of its files.

    Yields:
        The images.
    """
    for item in batch:
        assert item.image is not None  # noqa: S101 - batches of a data loader have images
        assert item.image_path is not None  # noqa: S101 - and their paths
        with Image.open(item.image_path) as file:
            width, height = file.size
        yield Picture(
            name_of(item.image_path),
            item.image,
            denormalize(item.image, model.pre_processor).clamp(0, 1),
            None if item.gt_label is None else bool(item.gt_label),
            None if item.gt_mask is None else item.gt_mask.squeeze() > 0,
            str(item.image_path),
            extent_of(model, (height, width)),
        )


def name_of(path: str) -> str:
    """Name of an image: its folder and its file name without suffix. As a path, it has no ``..`` and is relative.

    Bytes that are no UTF-8 are replaced, because figures and pages cannot show them.
    """
    file = Path(os.path.abspath(path))  # noqa: PTH100 - a link keeps its own name
    # The stem of a file such as "...png" would be empty.
    name = Path(file.parent.name) / (file.stem if file.stem.strip(".") else file.name)
    return os.fsencode(name).decode("utf-8", "replace")


def extent_of(model: AnomalibModule, size: tuple[int, int]) -> Extent:
    """The part of an image that the model's input covers, after the pre-processor has resized and cropped it.

    The pre-processor transforms an image of pixel coordinates, from which the edges are computed.

    Args:
        model: The model.
        size: Height and width of the image.

    Returns:
        Left, top, right and bottom edge, in pixels of the image.
    """
    transform = getattr(model.pre_processor, "transform", None)
    height, width = size
    if transform is None:
        return 0.0, 0.0, float(width), float(height)
    columns = ((torch.arange(width) + 0.5) / width).expand(3, height, width)
    rows = ((torch.arange(height) + 0.5) / height)[:, None].expand(3, height, width)
    prepared = denormalize(transform(torch.stack([columns, rows])), model.pre_processor)[:, 0].double()
    left, right = _edges(prepared[0, prepared.shape[1] // 2])
    top, bottom = _edges(prepared[1, :, prepared.shape[2] // 2])
    return left * width, top * height, right * width, bottom * height


def _edges(coordinates: Tensor) -> tuple[float, float]:
    """Coordinates of the outer edges of a row of pixels, from the coordinates of the centres."""
    count = len(coordinates)
    # Without the border, where resizing averages fewer pixels.
    inner = np.arange(count // 4, count - count // 4)
    step, start = np.polyfit(inner + 0.5, coordinates[inner].numpy(), 1)
    return float(start), float(start + count * step)


def stack(pictures: Iterable[Picture]) -> Tensor:
    """Stack images to a batch for the torch model, (B, 3, h, w)."""
    return torch.stack([picture.prepared for picture in pictures])
