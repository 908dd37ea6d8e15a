"""Storage for the features of a training set: on the device, in main memory, or in a temporary folder on disk."""

import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .extraction import FeatureMaps
from .free_memory import free_memory

logger = logging.getLogger(__name__)

CachePlace = Literal["auto", "device", "cpu", "disk", "none"]


class FeatureDataset(Dataset):
    """Feature maps of a set of images.

    Args:
        features: Feature map (N, C, H, W) of each layer.
        folder: Temporary folder of the maps, removed with the dataset.
    """

    def __init__(self, features: FeatureMaps, folder: tempfile.TemporaryDirectory | None = None) -> None:
        self.features = features
        self._folder = folder

    def __len__(self) -> int:
        return len(next(iter(self.features.values())))

    def __getitem__(self, index: int | Sequence[int]) -> FeatureMaps:
        return {layer: maps[index] for layer, maps in self.features.items()}

    def __getitems__(self, indices: Sequence[int]) -> FeatureMaps:
        """Feature maps (B, C, H, W) of each layer for a batch, in one read."""
        return self[indices]

    def __reduce__(self) -> tuple[type["FeatureDataset"], tuple[FeatureMaps]]:
        """The maps alone, for another process, which does not have the folder."""
        return FeatureDataset, (self.features,)

    def put(self, start: int, features: FeatureMaps) -> int:
        """Store the features of a batch.

        Args:
            start: Index of its first image.
            features: Feature map (B, C, H, W) of each layer.

        Returns:
            The index after its last image.
        """
        end = start
        for layer, maps in features.items():
            end = start + len(maps)
            self.features[layer][start:end] = maps
        return end


def allocate(
    features: Mapping[str, Tensor],
    count: int,
    place: CachePlace,
    budget: float,
    device: torch.device,
    processes: int = 1,
) -> FeatureDataset:
    """Allocate storage for the features of a training set.

    Args:
        features: Feature map (B, C, H, W) of each layer, for some of the images.
        count: Number of images, N.
        place: Where to store them, not ``none``. ``auto`` selects the first of device, main memory and disk in which
            they need at most ``budget`` of the free memory; the disk has no limit.
        budget: Fraction of the free device or main memory that ``auto`` may use, in (0, 1].
        device: Device of the model.
        processes: Number of processes on this machine that each store all features in main memory.

    Returns:
        Uninitialised maps (N, C, H, W) of each layer, float32.

    Raises:
        OSError: If the disk has too little space.
    """
    shapes = {layer: (count, *maps.shape[1:]) for layer, maps in features.items()}
    size = 4 * sum(torch.Size(shape).numel() for shape in shapes.values())
    if place == "auto":
        place = _choose_place(size, budget, device, processes)
    logger.info("Caching the features of %d images: %.1f MB, place %s.", count, size / 1e6, place)
    if place != "disk":
        where = device if place == "device" else torch.device("cpu")
        return FeatureDataset({layer: torch.empty(shape, device=where) for layer, shape in shapes.items()})
    folder = tempfile.TemporaryDirectory(prefix="anomalib-ot-")
    mapped = {
        layer: map_file(Path(folder.name) / f"{index}.features", shape)
        for index, (layer, shape) in enumerate(shapes.items())
    }
    return FeatureDataset(mapped, folder)


def map_file(path: Path, shape: tuple[int, ...]) -> Tensor:
    """A float32 tensor in a file, which keeps what the file has.

    The disk space is reserved: running out of it later would kill the process.

    Raises:
        OSError: If the disk has too little space.
    """
    size = torch.Size(shape).numel()
    with path.open("ab") as file:
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(file.fileno(), 0, 4 * size)
            except OSError as error:
                msg = (
                    f"no space on disk for {4 * size / 1e6:.1f} MB of features ({error.strerror}); free some space, "
                    "set TMPDIR to a folder on another disk, or set feature_cache=none"
                )
                raise OSError(error.errno, msg, str(path)) from error
    return torch.from_file(str(path), shared=True, size=size).view(shape)


def _choose_place(size: int, budget: float, device: torch.device, processes: int) -> CachePlace:
    if device.type == "cuda" and size <= budget * torch.cuda.mem_get_info(device)[0]:
        return "device"
    return "cpu" if processes * size <= budget * free_memory() else "disk"
