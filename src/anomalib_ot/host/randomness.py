"""Whether training images are the same each time they are read."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Subset
from torchvision import transforms as v1
from torchvision.transforms import v2

# Transforms that return the same image each time.
_DETERMINISTIC = (
    v2.CenterCrop,
    v2.ConvertImageDtype,
    v2.Grayscale,
    v2.Identity,
    v2.LinearTransformation,
    v2.Normalize,
    v2.Pad,
    v2.PILToTensor,
    v2.Resize,
    v2.RGB,
    v2.ToDtype,
    v2.ToImage,
    v2.ToPILImage,
    v2.ToPureTensor,
    v2.ToTensor,
    v1.CenterCrop,
    v1.ConvertImageDtype,
    v1.Grayscale,
    v1.LinearTransformation,
    v1.Normalize,
    v1.Pad,
    v1.PILToTensor,
    v1.Resize,
    v1.ToPILImage,
    v1.ToTensor,
)
# Transforms of torchvision whose effect is unknown.
_UNKNOWN = (v2.Transform, v2.Lambda, v1.Lambda)
# Images that are read twice; a flip with probability 1/2 then goes unnoticed once in 256 times.
_PROBES = 8


def why_random(images: DataLoader, transform: Callable[[Tensor], Tensor] | None) -> str | None:
    """Find out whether training images may change from epoch to epoch.

    The transforms of torchvision are known. Other randomness is detected by reading some images twice.

    Args:
        images: Loader of the images.
        transform: Transform of the pre-processor for a batch (B, 3, h, w), or None.

    Returns:
        The reason why they may change; None if there is none.
    """
    for dataset in _parts(images.dataset):
        augmentations = getattr(dataset, "augmentations", None)
        if not _is_deterministic(augmentations):
            return f"training images are augmented ({augmentations})"
        for name in ("transform", "transforms"):
            for each in _flat(getattr(dataset, name, None)):
                if _is_random(each):
                    return f"the data set has a random transform ({each})"
    for each in _flat(transform):
        if _is_random(each):
            return f"the pre-processor has a random transform ({each})"
    if _changes(images, transform):
        return "training images are not the same when they are read again"
    return None


def _parts(dataset: Any) -> Iterator[Any]:
    """A data set and the data sets within it."""
    yield dataset
    inner = [dataset.dataset] if isinstance(dataset, Subset) else []
    inner += dataset.datasets if isinstance(dataset, ConcatDataset) else []
    for each in inner:
        yield from _parts(each)


def _flat(transform: Any) -> Iterator[Any]:
    """The transforms in a composition, in order."""
    if isinstance(transform, v1.Compose | v2.Compose):
        for each in transform.transforms:
            yield from _flat(each)
    elif transform is not None:
        yield transform


def _is_deterministic(transform: Any) -> bool:
    """Whether a transform is known to be deterministic; anything else counts as augmentation."""
    return all(isinstance(each, _DETERMINISTIC) for each in _flat(transform))


def _is_random(transform: Any) -> bool:
    """Whether a transform is known not to be deterministic."""
    known = [each for each in type(transform).__mro__ if each.__module__.startswith("torchvision.transforms")]
    if not known or known[0] in _UNKNOWN or isinstance(transform, _DETERMINISTIC):
        return False
    is_fixed_blur = isinstance(transform, v1.GaussianBlur | v2.GaussianBlur) and len(set(transform.sigma)) == 1
    return not is_fixed_blur


def _changes(images: DataLoader, transform: Callable[[Tensor], Tensor] | None) -> bool:
    dataset: Any = images.dataset

    def read(index: int) -> Tensor:
        image = images.collate_fn([dataset[index]]).image
        return transform(image) if transform else image

    return any(not torch.equal(read(index), read(index)) for index in range(min(_PROBES, len(dataset))))
