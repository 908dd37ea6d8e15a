"""Features of image files, each extracted once."""

import json
import logging
from collections.abc import Callable, Iterable, Sequence
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track

from anomalib_ot.files import claim, delete_ours, write_text

from .extraction import FeatureMaps
from .image_extractor import BATCH, BUDGET, ImageExtractor
from .store import FeatureDataset, allocate, map_file

logger = logging.getLogger(__name__)

_INDEX = "index.json"

_Shapes = dict[str, tuple[int, ...]]


class FileFeatures:
    """Extracts features of image files, and remembers those of some of them.

    Args:
        extractor: Extracts the features.
        read: Reads a file as an image (h, w, 3) in [0, 1].

    Attributes:
        extractor: The extractor.
    """

    def __init__(self, extractor: ImageExtractor, read: Callable[[Path], NDArray[np.float32]]) -> None:
        self.extractor, self.read = extractor, read
        self._places: dict[Path, int] = {}
        self._known = FeatureDataset({})

    def suits(self, backbone: str, image_size: tuple[int, int], layers: Iterable[str]) -> bool:
        """Whether these are features of a backbone at an image size, of some layers and maybe others."""
        own = self.extractor
        return (own.backbone, own.image_size) == (backbone, image_size) and {*layers} <= {*own.layers}

    def of(self, paths: Sequence[Path]) -> FeatureDataset:
        """Features of files, at least one; those that are remembered are not extracted again."""
        if {*paths} <= self._places.keys():
            return FeatureDataset(self._known[[self._places[path] for path in paths]])
        return self.extractor.of(map(self.read, paths), len(paths))

    def remember(self, paths: Sequence[Path], folder: Path, seen: Any) -> FeatureDataset:
        """Extract the features of files, at least one, and keep them in a folder until it is deleted.

        An interrupted call keeps what it has extracted, and the next one continues.

        Args:
            paths: The files.
            folder: The folder; features of other files that were kept in it are deleted.
            seen: What tells whether the files and the weights are the same as before, as plain values.

        Returns:
            The features, in the order of the files.

        Raises:
            FileExistsError: If the folder has files of these names that anomalib-ot did not write.
        """
        own = self.extractor
        what = [seen, own.backbone, own.image_size, own.layers, [*map(str, paths)]]
        kept = _Kept(folder, sha256(json.dumps(what).encode()).hexdigest(), len(paths))
        if kept.done:
            logger.info("The features of %d of %d images were extracted before.", kept.done, len(paths))
        images = map(self.read, track(paths[kept.done :], "Extracting features", transient=True))
        for features in own.batches(images):
            kept.add(features)
        self._places, self._known = {path: index for index, path in enumerate(paths)}, kept.dataset
        return kept.dataset


class _Kept:
    """Features in a folder.

    Args:
        folder: The folder.
        key: What the features depend on; those with another key are deleted.
        count: Number of images.

    Attributes:
        dataset: The features; without layers before the first batch.
        done: Number of images whose features are there.
    """

    def __init__(self, folder: Path, key: str, count: int) -> None:
        self._folder, self._key, self._count = folder, key, count
        self.dataset, self.done, self._is_kept = FeatureDataset({}), 0, False
        shapes, done = self._read()
        # Whole batches alone, so that a continued extraction equals one that was not interrupted.
        if done == count or (done and done % BATCH == 0):
            self.dataset, self.done, self._is_kept = self._mapped(shapes), done, True
        else:
            delete_ours(folder)

    def add(self, features: FeatureMaps) -> None:
        """Store the next batch."""
        if not self.done:
            self.dataset = self._allocated(features)
        self.done = self.dataset.put(self.done, features)
        if self._is_kept:
            shapes = {layer: tuple(maps.shape) for layer, maps in self.dataset.features.items()}
            content = {"key": self._key, "done": self.done, "shapes": shapes}
            write_text(self._folder / _INDEX, json.dumps(content))

    def _allocated(self, features: FeatureMaps) -> FeatureDataset:
        """Storage in the folder, or elsewhere if its disk is full."""
        shapes = {layer: (self._count, *maps.shape[1:]) for layer, maps in features.items()}
        claim(self._folder, _INDEX, *(path.name for path in self._files(shapes).values()))
        try:
            dataset = self._mapped(shapes)
        except OSError:
            delete_ours(self._folder)
            logger.warning("There is no space for features in %s; an interruption would lose them.", self._folder)
            return allocate(features, self._count, "auto", BUDGET, torch.device("cpu"))
        self._is_kept = True
        return dataset

    def _files(self, shapes: _Shapes) -> dict[str, Path]:
        return {layer: self._folder / f"{index}.features" for index, layer in enumerate(shapes)}

    def _mapped(self, shapes: _Shapes) -> FeatureDataset:
        return FeatureDataset({layer: map_file(path, shapes[layer]) for layer, path in self._files(shapes).items()})

    def _read(self) -> tuple[_Shapes, int]:
        """Shape of the maps of each layer, and the number of images that are done; none with another key."""
        try:
            content = json.loads((self._folder / _INDEX).read_text(encoding="utf-8"))
            shapes = {layer: tuple(map(int, shape)) for layer, shape in content["shapes"].items()}
            files = self._files(shapes).items()
            # A file that is missing would be made, full of zeros.
            if content["key"] == self._key and all(
                path.stat().st_size == 4 * prod(shapes[name]) for name, path in files
            ):
                return shapes, int(content["done"])
        except (AttributeError, KeyError, OSError, TypeError, ValueError):
            pass
        return {}, 0
