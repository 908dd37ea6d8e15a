"""Pictures from which nothing is learned, as they arrive at a model: blank, or cut off by who read them."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import RunningStage
from torch import Tensor

from anomalib_ot.data.reading import deep_values

logger = logging.getLogger(__name__)

_STAGES = {
    RunningStage.TRAINING: "training",
    RunningStage.SANITY_CHECKING: "validation",
    RunningStage.VALIDATING: "validation",
    RunningStage.TESTING: "test",
    RunningStage.PREDICTING: "prediction",
}
# White to within half a level of eight bits.
_WHITE = 1 - 0.5 / 255
# Share of the pixels; of the pictures that were measured, bottles on a lit ground have a third.
_ALL_OVER = 0.99
# Twelve bits in a file of 16 come to a sixteenth; the brightest pixel of the darkest picture measured, to a quarter.
_DARK = 1 / 8
# Levels of eight bits; of the pictures that were measured, the most even one has 74, and 25 at 64 px.
_ONE_COLOUR = 2 / 255
# The mean of a picture hardly changes as it is resized.
_SAME_MEAN = 1 / 255
# Of the pixels along each side every so many are looked at first.
_STRIDE = 4
_NAMED = 3


class PictureCheck(Callback):
    """Warns of pictures that are saturated or blank, once in each stage of a run."""

    def __init__(self) -> None:
        self._looked_at: set[RunningStage] = set()
        self._warned_of: set[RunningStage] = set()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Look at a batch, before the pre-processor gets it."""
        del pl_module, args, kwargs
        assert trainer.state.stage is not None  # noqa: S101 - a run has one
        self.look(batch, trainer.state.stage)

    on_validation_batch_start = on_train_batch_start
    on_test_batch_start = on_train_batch_start
    on_predict_batch_start = on_train_batch_start

    def look(self, batch: Any, stage: RunningStage) -> None:
        """Warn of pictures that are saturated or blank, unless that was done.

        Args:
            batch: Its images (B, 3, H, W) are in [0, 1]; cached features have none.
            stage: Stage of the run.
        """
        images = getattr(batch, "image", None)
        if images is None or stage in self._warned_of:
            return
        paths = [str(path) for path in batch.image_path or [""] * len(images)]
        bad = blank_pictures(images)
        if stage not in self._looked_at:
            # The files of a folder are of one kind as a rule: those of the first batch tell.
            cut_off = cut_off_pictures(images, paths)
            bad = dict.fromkeys(cut_off, "white wherever its file exceeds 255") | bad
            self._looked_at.add(stage)
        if bad:
            self._warned_of.add(stage)
            _warn(_STAGES[stage], bad, paths)


class ChecksPictures:
    """Part of a Lightning model that looks at the pictures of each run; see :class:`PictureCheck`."""

    def configure_callbacks(self) -> list[Callback]:
        """The host's, and before them, as they change the pictures, one that looks at these."""
        return [PictureCheck(), *super().configure_callbacks()]  # type: ignore[misc]  # the host's model comes after this part


def blank_pictures(images: Tensor) -> dict[int, str]:
    """Find pictures that show nothing.

    Args:
        images: Images (B, 3, H, W) in [0, 1].

    Returns:
        What is wrong with a picture, by its number.
    """
    # A few pixels tell of most pictures that nothing is wrong.
    suspects = _judge(images[..., ::_STRIDE, ::_STRIDE])
    return {index: what for index in suspects for what in _judge(images[index : index + 1]).values()}


def _judge(images: Tensor) -> dict[int, str]:
    verdicts = {
        "white all over": (images.amin(1) >= _WHITE).float().mean((1, 2)) >= _ALL_OVER,
        "of one colour": (images.amax((2, 3)) - images.amin((2, 3))).amax(1) < _ONE_COLOUR,
        "darker than an eighth of white all over": images.amax((1, 2, 3)) < _DARK,
    }
    return {
        index: next(what for what, bad in verdicts.items() if bad[index])
        for index in torch.stack([*verdicts.values()]).any(0).nonzero().flatten().tolist()
    }


def cut_off_pictures(images: Tensor, paths: Sequence[str]) -> list[int]:
    """Find grey pictures of more than eight bits that were read as anomalib reads them, with all above 255 as white.

    Args:
        images: Images (B, 3, H, W) in [0, 1].
        paths: Their B files.

    Returns:
        The numbers of the pictures.
    """
    found = []
    for index, (image, path) in enumerate(zip(images, paths, strict=True)):
        try:
            values, _ = deep_values(path) or (None, None)
        except (FileNotFoundError, ValueError):
            # The picture is here, wherever it is from.
            continue
        if values is not None and values.ndim == 2 and values.max() > 255:  # noqa: PLR2004 - rows and columns, and a byte
            read_by_host = values.clip(0, 255).mean() / 255
            if abs(read_by_host - float(image.mean())) < _SAME_MEAN:
                found.append(index)
    return found


def _warn(stage: str, bad: dict[int, str], paths: Sequence[str]) -> None:
    named = [f"{paths[index]} ({what})" for index, what in list(bad.items())[:_NAMED]]
    more = f" and {len(bad) - _NAMED} more" if len(bad) > _NAMED else ""
    logger.warning(
        "%d of %d pictures of a %s batch show little or nothing: %s%s. A picture of more than eight bits needs "
        "anomalib_ot.data.FullRange, or FullRangePredictDataset, and the value_range of the camera; anomalib reads it "
        "as if it had eight. Later batches are not looked at.",
        len(bad),
        len(paths),
        stage,
        ", ".join(named),
        more,
    )
