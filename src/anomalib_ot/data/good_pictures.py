"""A folder of good pictures alone, be it of one."""

from collections.abc import Sequence
from pathlib import Path

import torch
from anomalib.data import Folder
from torchvision.transforms.v2 import Transform

from anomalib_ot.settings import require

# As the host's Folder holds out by default.
_SHARE = 0.2


class GoodPictures(Folder):
    """A folder of good pictures, some of which are held out to set the threshold.

    anomalib's ``Folder`` fails where there are no anomalous pictures and fewer than about ten good ones. Here one is
    enough. The held-out pictures are both validation and test set: the threshold becomes the highest of their scores,
    and metrics of the test mean nothing, for lack of anomalous pictures. Of one picture alone nothing can be held out:
    then the threshold is the score of the picture that was trained on, below which hardly any new one stays.

    Args:
        root: Folder from which ``normal_dir`` is meant.
        normal_dir: Folder of the good pictures, or several.
        name: Name of the data.
        held_out: Number of pictures to hold out, drawn by the seed; by default a fifth, and at least one of two or
            more. 0 trains on all and validates on the same.
        seed: Seed of the draw.
        extensions: Endings of the files to take, as ``.png``; by default all that are pictures.
        train_batch_size: Pictures in a training batch.
        eval_batch_size: Pictures in a validation or test batch.
        num_workers: Processes that read pictures.
        augmentations: Applied to all pictures.

    Raises:
        ValueError: If ``held_out`` is negative; on set-up, if it leaves no picture to train on.

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
    ) -> None:
        require(held_out is None or held_out >= 0, "held_out", "at least 0", held_out)
        super().__init__(
            name,
            normal_dir,
            root,
            extensions=extensions,  # type: ignore[arg-type]  # the host means any number
            train_batch_size=train_batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            augmentations=augmentations,
            seed=seed,
        )
        self.held_out = held_out

    def _create_test_split(self) -> None:
        """Hold pictures out."""
        count = len(self.train_data)
        held_out = max(round(_SHARE * count), min(count - 1, 1)) if self.held_out is None else self.held_out
        require(held_out < count, "held_out", f"below the number of pictures, {count}", held_out)
        drawn = torch.randperm(count, generator=torch.Generator().manual_seed(self.seed or 0)).tolist()
        self.test_data = self.train_data.subsample(drawn[:held_out] or drawn)
        self.train_data = self.train_data.subsample(drawn[held_out:])

    def _create_val_split(self) -> None:
        """Validate on what is held out."""
        self.val_data = self.test_data.subsample(range(len(self.test_data)))
