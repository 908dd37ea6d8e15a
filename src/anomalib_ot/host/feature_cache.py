"""Frozen features of a training set, extracted once and cached for all epochs."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from anomalib.data import AnomalibDataModule
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, Sampler, Subset

from anomalib_ot.features.extraction import FeatureMaps
from anomalib_ot.features.store import CachePlace, FeatureDataset, allocate
from anomalib_ot.transport import Processes

from .image_features import FeatureBatch, ImageFeatures, count_images, naming_unreadable_images
from .randomness import why_random
from .seeding import epoch_order, user_seed

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingFeatures:
    """Features of the training images for use outside the epochs.

    Attributes:
        trained_on: Features of the training images, in order. Without a cache, each iteration runs the backbone again.
        held_out: Features of the held-out images, or None.
    """

    trained_on: Iterable[FeatureBatch]
    held_out: Iterable[FeatureBatch] | None = None

    def epoch(self, number: int) -> Iterable[FeatureBatch]:
        """Features of the training images in the random order of an epoch, which follows from the user's seed.

        Images that do not come from a ``DataLoader`` of known length keep their order.

        Args:
            number: Number of the epoch, from 0.
        """
        images = self.trained_on
        if isinstance(images, ImageFeatures):
            return images.shuffled(number)
        loader = cast("DataLoader", images)
        return feature_loader(
            loader.dataset, cast("int", loader.batch_size), epoch_order(loader.dataset, number, user_seed())
        )


class _Share(Dataset):
    """A data set whose batches are divided evenly between processes.

    Args:
        dataset: A data set of whole batches.
        rank: Index of this process.
        processes: Number of processes.
    """

    def __init__(self, dataset: Dataset, rank: int, processes: int) -> None:
        self._dataset = cast("Any", dataset)
        self._rank = rank
        self._processes = processes

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitems__(self, indices: Sequence[int]) -> FeatureMaps:
        """The part of a batch for this process, which may be empty."""
        return self._dataset.__getitems__(indices[self._rank :: self._processes])


class _Order(DistributedSampler):
    """Shuffles in each epoch, in an order that depends only on the seed and the epoch.

    The epoch is that of the trainer when the iteration starts. Lightning passes an epoch to ``set_epoch`` that is one
    too high after it resumes from a checkpoint of the end of an epoch.

    Args:
        dataset: Data set to draw from.
        trainer: Trainer that counts the epochs.
        seed: Seed of the order.
    """

    def __init__(self, dataset: Dataset, trainer: Trainer, seed: int) -> None:
        super().__init__(dataset, num_replicas=1, rank=0, shuffle=True, seed=seed)
        self._trainer = trainer

    def __iter__(self) -> Iterator[int]:
        self.epoch = self._trainer.current_epoch
        return super().__iter__()


def shuffled(dataset: Dataset, trainer: Trainer) -> Sampler:
    """Order of a data set that depends only on the user's seed and the trainer's epoch."""
    return _Order(dataset, trainer, user_seed())


def feature_loader(dataset: Dataset, batch_size: int, sampler: Sampler | None = None) -> DataLoader:
    """Loader of :class:`~anomalib_ot.host.image_features.FeatureBatch`.

    Args:
        dataset: A :class:`FeatureDataset` or a subset of one.
        batch_size: Number of images in a batch; the last batch may have fewer.
        sampler: Order of the images; that of the data set if None.
    """
    # The data set returns whole batches.
    collate: Any = FeatureBatch
    return DataLoader(dataset, batch_size=batch_size, sampler=sampler, collate_fn=collate)


def train_on_features(
    trainer: Trainer,
    extract: Callable[[Tensor], FeatureMaps],
    transform: Callable[[Tensor], Tensor] | None,
    check: Callable[[Any], None],
    *,
    place: CachePlace,
    budget: float,
    batch_size: int,
    takes_fewer: bool = False,
    device: torch.device,
    hold_out: float = 0.0,
) -> TrainingFeatures:
    """Let the epochs of a trainer run over cached features instead of images; call it in ``on_fit_start``.

    The cache is off if the training images change from epoch to epoch (by augmentation, or other randomness in the data
    set or the pre-processor), if they do not come from a single ``DataLoader`` of known length, and for
    ``place="none"``. The log gives the reason.

    Args:
        trainer: Trainer whose fit starts.
        extract: Maps images (B, 3, H, W), before pre-processing, to feature maps.
        transform: The pre-processing, which ``extract`` includes, or None.
        check: Checks a batch of images before its features are extracted.
        place: Where to cache the features. ``auto`` takes the first of the device, the main memory and a temporary
            folder on disk in which they need at most ``budget`` of the free space.
        budget: Fraction of the free device or main memory that ``auto`` may use, in (0, 1].
        batch_size: Number of images in a training batch.
        takes_fewer: Whether fewer images than that make one batch.
        device: Device of the model.
        hold_out: Fraction of the images held out of the training, in [0, 1).

    Returns:
        The features, for use outside the epochs.

    Raises:
        ValueError: In all processes, if there are too few images for a batch or for the processes, an image cannot be
            read, or features are not finite.
    """
    # Each ``trainer.fit`` sets the source again, so that there is nothing to restore.
    source = trainer.fit_loop._data_source  # noqa: SLF001
    images = source.dataloader()
    count = count_images(images)
    _check_enough(trainer, count)
    if takes_fewer and count is not None and count < batch_size:
        logger.info("All %d training images make one batch; the usual size is %d.", count, batch_size)
        batch_size = count
    if count is not None and count < batch_size:
        msg = (
            f"{count} training images are fewer than the batch of {batch_size}; set --model.batch_size {count} or less"
        )
        raise ValueError(msg)
    shows_progress = trainer.progress_bar_callback is not None
    reason = _why_not_cached(images, transform, place)
    if reason:
        logger.info("Feature cache off: %s. The backbone runs on each image in each epoch.", reason)
        if hold_out:
            msg = f"images can only be held out with the feature cache, which is off: {reason}"
            raise ValueError(msg)
        if isinstance(images, DataLoader) and images.batch_size != batch_size:
            logger.warning(
                "Without the cache, the data module sets the training batch: %s images rather than %d; "
                "set --data.train_batch_size.",
                images.batch_size,
                batch_size,
            )
        return TrainingFeatures(ImageFeatures(images, extract, check, device, shows_progress))
    rank, processes = trainer.global_rank, trainer.world_size
    total = cast("int", count)
    share = range(total * rank // processes, total * (rank + 1) // processes)
    features = ImageFeatures(images, extract, check, device, shows_progress, share)
    # All processes of a machine cache all features in the same main memory.
    memory = partial(allocate, count=total, place=place, budget=budget, device=device, processes=trainer.num_devices)
    dataset = _keep(features, share, memory, device)
    held_out = round(hold_out * len(dataset))
    left = len(dataset) - held_out
    if left < (1 if takes_fewer else batch_size):
        msg = (
            f"holding out {held_out} of {len(dataset)} images leaves {left}, fewer than the batch of {batch_size}; "
            "set a smaller --model.validation_fraction or --model.batch_size"
        )
        raise ValueError(msg)
    # The split and the order depend only on the user's seed, so that a resumed run equals an uninterrupted one.
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(user_seed())).tolist()
    kept, out = (Subset(dataset, sorted(part)) for part in (order[held_out:], order[:held_out]))
    source.instance = feature_loader(_Share(kept, rank, processes), batch_size, shuffled(kept, trainer))
    return TrainingFeatures(
        feature_loader(kept, batch_size),
        feature_loader(out, batch_size) if held_out else None,
    )


def _check_enough(trainer: Trainer, count: int | None) -> None:
    module = getattr(trainer, "datamodule", None)
    if isinstance(module, AnomalibDataModule) and len(module.train_data) == 0:
        msg = f"the training set of {module.name} is empty; check its root and folder names"
        raise ValueError(msg)
    if count is not None and count < trainer.world_size:
        msg = (
            f"{count} training images are fewer than the {trainer.world_size} processes that share them; set "
            f"--trainer.devices {max(1, count)} or less"
            if count
            else "the training set is empty"
        )
        raise ValueError(msg)


def _why_not_cached(images: Any, transform: Callable[[Tensor], Tensor] | None, place: CachePlace) -> str | None:
    """Why there is no cache, or None: the same in all processes, even if only one detects randomness."""
    if place == "none":
        return "feature_cache is none"
    if not isinstance(images, DataLoader):
        return f"training data come from a {type(images).__name__}, not a DataLoader"
    if isinstance(images.dataset, IterableDataset):
        return f"training data come from a {type(images.dataset).__name__}, whose length is unknown"
    with naming_unreadable_images(images):
        reason = why_random(images, transform)
    return next(filter(None, Processes.all().each(reason)), None)


def _keep(
    features: Iterable[FeatureBatch],
    share: range,
    memory: Callable[[FeatureMaps], FeatureDataset],
    device: torch.device,
) -> FeatureDataset:
    """Features of all images; this process extracts a share, and allocates the memory with the first batch."""
    processes = Processes.all()
    try:
        dataset = _extract_share(features, share, memory)
    except Exception as error:
        processes.each(str(error))
        raise
    # No process waits for the features of one that has failed.
    if failed := [error for error in processes.each(None) if error is not None]:
        raise ValueError(failed[0])
    if len(share) < len(dataset):
        for maps in dataset.features.values():
            maps[: share.start], maps[share.stop :] = 0, 0
            for part in maps.split(64):
                part.copy_(processes.sum(part.to(device, copy=True)))
    return dataset


def _extract_share(
    features: Iterable[FeatureBatch], share: range, memory: Callable[[FeatureMaps], FeatureDataset]
) -> FeatureDataset:
    dataset: FeatureDataset | None = None
    done = share.start
    for batch in features:
        if dataset is None:
            dataset = memory(batch.features)
        done = dataset.put(done, batch.features)
    assert dataset is not None  # noqa: S101 - each process has at least one image
    return dataset
