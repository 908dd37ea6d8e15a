"""Checks of the images that reach a model: blank ones, and ones that were clipped to 8 bits when they were read."""

import logging
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import RunningStage
from torch import Tensor

from anomalib_ot.images.blank import blank_images
from anomalib_ot.images.reading import deep_values

logger = logging.getLogger(__name__)

_STAGES = {
    RunningStage.TRAINING: "training",
    RunningStage.SANITY_CHECKING: "validation",
    RunningStage.VALIDATING: "validation",
    RunningStage.TESTING: "test",
    RunningStage.PREDICTING: "prediction",
}
# Resizing hardly changes the mean of an image.
_SAME_MEAN = 1 / 255
_NAMED = 3


class ImageCheck(Callback):
    """Warns of saturated or blank images, once in each stage of a run."""

    def __init__(self) -> None:
        self._checked: set[RunningStage] = set()
        self._warned_of: set[RunningStage] = set()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Check a batch before the pre-processor changes it."""
        del pl_module, args, kwargs
        assert trainer.state.stage is not None  # noqa: S101 - a running trainer has one
        self.check_batch(batch, trainer.state.stage)

    on_validation_batch_start = on_train_batch_start
    on_test_batch_start = on_train_batch_start
    on_predict_batch_start = on_train_batch_start

    def check_batch(self, batch: Any, stage: RunningStage) -> None:
        """Warn of saturated or blank images, unless the stage has a warning already.

        Args:
            batch: A batch with images (B, 3, H, W) in [0, 1]; a batch of cached features has none.
            stage: Stage of the run.
        """
        images = getattr(batch, "image", None)
        if images is None or stage in self._warned_of:
            return
        paths = [str(path) for path in batch.image_path or [""] * len(images)]
        bad = blank_images(images, lambda part: part.float().cpu().numpy())
        if stage not in self._checked:
            # The files of a folder usually have one format, so the first batch is representative.
            clipped = clipped_images(images, paths)
            bad = dict.fromkeys(clipped, "white wherever its file exceeds 255") | bad
            self._checked.add(stage)
        if bad:
            self._warned_of.add(stage)
            _warn(_STAGES[stage], bad, paths)


class ChecksImages:
    """Part of a Lightning model that checks the images of each run; see :class:`ImageCheck`."""

    def configure_callbacks(self) -> list[Callback]:
        """The callbacks of the host, which change the images, preceded by one that checks them."""
        return [ImageCheck(), *super().configure_callbacks()]  # type: ignore[misc]  # the host's model follows in the order of bases


def clipped_images(images: Tensor, paths: Sequence[str]) -> list[int]:
    """Find grey images of more than 8 bits that anomalib's reader clipped to white at 255.

    Args:
        images: Images (B, 3, H, W) in [0, 1].
        paths: Their B paths.

    Returns:
        The indices of these images.
    """
    found = []
    for index, (image, path) in enumerate(zip(images, paths, strict=True)):
        try:
            values, _ = deep_values(path) or (None, None)
        except (FileNotFoundError, ValueError):
            # The image may not come from a file.
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
        "%d of %d images of a %s batch show little or nothing: %s%s. An image of more than 8 bits needs "
        "anomalib_ot.data.FullRange, or FullRangePredictDataset, with the value_range of the camera; anomalib clips it "
        "to 8 bits. Later batches are not checked.",
        len(bad),
        len(paths),
        stage,
        ", ".join(named),
        more,
    )
