"""A folder that contains normal images only, at least one."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from anomalib.data import Folder
from torchvision.transforms.v2 import Transform

from anomalib_ot.settings import require

# The share that anomalib's Folder holds out by default.
_SHARE = 0.2


class GoodPictures(Folder):
    """A folder of normal images. Some of them are held out to set the threshold.

    anomalib's ``Folder`` fails without anomalous images if there are fewer than about ten normal ones. This class needs
    one. The held-out images are both the validation set and the test set. The threshold is the highest of their scores.
    Test metrics are meaningless, because there are no anomalous images. A single image cannot be held out: then the
    threshold is the score of the training image itself, and almost all new images score higher.

    Args:
        root: Root folder; ``normal_dir`` is relative to it.
        normal_dir: Folder or folders of the normal images.
        name: Name of the data.
        held_out: Number of images to hold out, drawn at random. By default a fifth, and at least one if there are two
            or more images. 0 trains and validates on all images.
        seed: Seed of the draw.
        extensions: File extensions to include, such as ``.png``; all image files by default.
        train_batch_size: Training batch size.
        eval_batch_size: Validation and test batch size.
        num_workers: Number of workers of each data loader.
        augmentations: Augmentations of all images.
        left_out: Images of the folder that are not used, as paths relative to ``root`` or absolute ones.

    Raises:
        ValueError: If ``held_out`` is negative. On set-up, if it leaves no training image, or if an image of
            ``left_out`` is not in the folder.

    Example:
        >>> data = GoodPictures(root="parts", normal_dir="good")
        >>> data.name
        'good_pictures'
    """

    def __init__(
        self,
        root: str | Path | None = None,
        normal_dir: str | Path | Sequence[str | Path] = ".",
        name: str = "good_pictures",
        held_out: int | None = None,
        seed: int = 0,
        extensions: tuple[str, ...] | None = None,
        train_batch_size: int = 32,
        eval_batch_size: int = 32,
        num_workers: int = 8,
        augmentations: Transform | None = None,
        left_out: Sequence[str] = (),
    ) -> None:
        require(held_out is None or held_out >= 0, "held_out", "at least 0", held_out)
        super().__init__(
            name,
            normal_dir,
            root,
            extensions=extensions,  # type: ignore[arg-type]  # anomalib accepts any number
            train_batch_size=train_batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            augmentations=augmentations,
            seed=seed,
        )
        self.held_out = held_out
        self.left_out = tuple(left_out)

    def _create_test_split(self) -> None:
        """Leave images out, and hold others out."""
        self.train_data = self.train_data.subsample(self._used())
        count = len(self.train_data)
        held_out = max(round(_SHARE * count), min(count - 1, 1)) if self.held_out is None else self.held_out
        require(held_out < count, "held_out", f"below the number of images, {count}", held_out)
        drawn = torch.randperm(count, generator=torch.Generator().manual_seed(self.seed or 0)).tolist()
        self.test_data = self.train_data.subsample(drawn[:held_out] or drawn)
        self.train_data = self.train_data.subsample(drawn[held_out:])

    def _create_val_split(self) -> None:
        """Validate on the held-out images."""
        self.val_data = self.test_data.subsample(range(len(self.test_data)))

    def _used(self) -> list[int]:
        """Indices of the images that are not left out."""
        left_out = {_absolute(Path(self.root or ".") / name) for name in self.left_out}
        paths = [_absolute(path) for path in self.train_data.samples.image_path]
        if missing := sorted(left_out - {*paths}):
            msg = f"left_out must name images of the folder, but {missing[0]} is not one of its {len(paths)} images"
            raise ValueError(msg)
        return [index for index, path in enumerate(paths) if path not in left_out]


def _absolute(path: str | Path) -> str:
    return os.path.abspath(path)  # noqa: PTH100 - a link keeps its own name
