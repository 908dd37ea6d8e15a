"""Where the features of a training set are kept: on the device, in memory, or in a temporary folder on disk."""

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
        folder: Temporary folder that holds them, removed with the data set.
    """

    def __init__(self, features: FeatureMaps, folder: tempfile.TemporaryDirectory | None = None) -> None:
        self.features = features
        self._folder = folder

    def __len__(self) -> int:
        return len(next(iter(self.features.values())))

    def __getitem__(self, index: int | Sequence[int]) -> FeatureMaps:
        return {layer: maps[index] for layer, maps in self.features.items()}

    def __getitems__(self, indices: Sequence[int]) -> FeatureMaps:
        """Feature maps of a whole batch, (B, C, H, W) for each layer, in one read."""
        return self[indices]


def allocate(
    features: Mapping[str, Tensor],
    count: int,
    place: CachePlace,
    budget: float,
    device: torch.device,
    processes: int = 1,
) -> FeatureDataset:
    """Memory for the features of a training set.

    Args:
        features: Feature map (B, C, H, W) of each layer, of some of the images.
        count: Number of images, N.
        place: Where to keep them, not ``none``; ``auto`` takes the device, the memory or the disk, the first in which
            they need at most ``budget`` of what is free.
        budget: Fraction of the free device or main memory that ``auto`` may use, in (0, 1].
        device: Where the model is.
        processes: Those on this machine that each keep all features in its main memory.

    Returns:
        Maps (N, C, H, W) of each layer, float32, with arbitrary entries.

    Raises:
        OSError: If there is no room on the disk.
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
        layer: _map_file(Path(folder.name) / f"{index}.features", shape)
        for index, (layer, shape) in enumerate(shapes.items())
    }
    return FeatureDataset(mapped, folder)


def _map_file(path: Path, shape: tuple[int, ...]) -> Tensor:
    """A tensor in a file, for which the disk has set space aside: to run out of it later would end the process."""
    size = torch.Size(shape).numel()
    with path.open("wb") as file:
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(file.fileno(), 0, 4 * size)
            except OSError as error:
                msg = (
                    f"no room on disk for {4 * size / 1e6:.1f} MB of features ({error.strerror}); free some, set "
                    "TMPDIR to another disk, or give feature_cache=none"
                )
                raise OSError(error.errno, msg, str(path)) from error
    return torch.from_file(str(path), shared=True, size=size).view(shape)


def _choose_place(size: int, budget: float, device: torch.device, processes: int) -> CachePlace:
    if device.type == "cuda" and size <= budget * torch.cuda.mem_get_info(device)[0]:
        return "device"
    return "cpu" if processes * size <= budget * free_memory() else "disk"
