"""Features of training images, from a backbone that runs when they are needed."""

from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from anomalib.data.utils import read_image
from PIL import Image
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Sampler, Subset

from anomalib_ot.features.extraction import FeatureMaps

from .seeding import epoch_order, user_seed

# Errors of Pillow for files that are damaged or too large.
_UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


@dataclass
class FeatureBatch:
    """Batch of cached features, which a training step receives instead of images.

    Attributes:
        features: Feature map (B, C, H, W) of each layer.
        image: None; the pre-processor reads it, and skips a batch without images.
        gt_mask: None, for the same reason.
    """

    features: FeatureMaps
    image: Tensor | None = None
    gt_mask: Tensor | None = None


@dataclass(frozen=True)
class ImageFeatures:
    """Features of images, as batches of :class:`FeatureBatch`; each iteration reads the images and runs the backbone.

    Attributes:
        images: Loader of the images, usually a ``DataLoader``.
        extract: Maps images (B, 3, H, W), before pre-processing, to feature maps.
        check: Checks a batch of images before its features are extracted.
        device: Device of the model.
        shows_progress: Whether to show a progress bar.
        share: Range of the images of a ``DataLoader`` to read; None for all.
        order: Order of the images of a ``DataLoader``; None for that of the data set.
    """

    images: Any
    extract: Callable[[Tensor], FeatureMaps]
    check: Callable[[Any], None]
    device: torch.device
    shows_progress: bool
    share: range | None = None
    order: Sampler | None = None

    def shuffled(self, number: int) -> "ImageFeatures":
        """The same in the random order of an epoch, if the number of images is known."""
        if count_images(self.images) is None:
            return self
        return replace(self, order=epoch_order(self.images.dataset, number, user_seed()))

    def __iter__(self) -> Iterator[FeatureBatch]:
        images = self.images
        if isinstance(images, DataLoader):
            images = DataLoader(
                images.dataset if self.share is None else Subset(images.dataset, self.share),
                batch_size=images.batch_size,
                sampler=self.order,
                num_workers=images.num_workers,
                collate_fn=images.collate_fn,
            )
        with naming_unreadable_images(self.images):
            for batch in track(images, "Extracting features", transient=True, disable=not self.shows_progress):
                self.check(batch)
                features = self.extract(batch.image.to(self.device))
                check_finite(features, getattr(batch, "image_path", None))
                yield FeatureBatch(features)


def count_images(images: Any) -> int | None:
    """Number of images in a loader; None if it is unknown."""
    if not isinstance(images, DataLoader) or isinstance(images.dataset, IterableDataset):
        return None
    return len(cast("Sized", images.dataset))


def check_finite(features: Mapping[str, Tensor], image_paths: Sequence[str] | None) -> None:
    """Refuse NaN or infinite features.

    Args:
        features: Feature map (B, C, H, W) of each layer.
        image_paths: B paths, to name the first bad image.

    Raises:
        ValueError: If a feature is not finite.
    """
    for layer, maps in features.items():
        bad = ~maps.flatten(1).isfinite().all(1)
        if bad.any():
            which = image_paths[int(bad.nonzero()[0])] if image_paths else "an image"
            msg = (
                f"features of layer {layer} have NaN or infinite values for {which}; "
                "check the image, the weights of the backbone and the precision"
            )
            raise ValueError(msg)


@contextmanager
def naming_unreadable_images(images: Any) -> Iterator[None]:
    """Replace an error of the reader, which seldom names the file, by one that does."""
    try:
        yield
    except _UNREADABLE:
        # Only data sets of anomalib list their files; for others, the error of the reader remains.
        samples = getattr(getattr(images, "dataset", None), "samples", None)
        for path in getattr(samples, "image_path", ()):
            _check_readable(path)
        raise


def _check_readable(path: str) -> None:
    try:
        read_image(path)
    except _UNREADABLE as error:
        msg = f"training image {path} cannot be read ({error}); repair or remove it"
        raise ValueError(msg) from error
