"""Checks of the images that reach a model: blank ones, clipped ones, and ones that the training read otherwise."""

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from torch import Tensor

from anomalib_ot.data.full_range import is_deep, reading_of, reading_of_images
from anomalib_ot.images.blank import blank_images
from anomalib_ot.images.reading import EIGHT_BITS, Reading, deep_values

if TYPE_CHECKING:
    from anomalib.models.components import AnomalibModule

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
# Of a checkpoint.
_KEY = "reading"


class ImageCheck(Callback):
    """Warns of saturated or blank images, and of images that are not read as in the training, once in each stage."""

    def __init__(self) -> None:
        self._compared: set[tuple[RunningStage, int]] = set()
        self._checked: set[RunningStage] = set()
        self._warned_of: set[RunningStage] = set()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Check a batch before the pre-processor changes it."""
        stage = trainer.state.stage
        assert stage is not None  # noqa: S101 - a running trainer has one
        # After the index of the batch, in all stages but the training.
        number = kwargs.get("dataloader_idx", args[1] if args[1:] else 0)
        if (stage, number) not in self._compared and stage != RunningStage.TRAINING:
            self._compared.add((stage, number))
            self._compare_reading(trainer, pl_module, batch, stage, number)
        self.check_batch(batch, stage)

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

    def _compare_reading(self, trainer: Trainer, pl_module: Any, batch: Any, stage: RunningStage, number: int) -> None:
        """Warn if images with more than 8 bits are not read as those of the training."""
        trained = getattr(pl_module, "reading", EIGHT_BITS)
        if not trained.is_deep or not any(map(is_deep, batch.image_path or ())):
            return
        loaders = getattr(trainer, f"{stage.dataloader_prefix}_dataloaders", None)
        loader = loaders[number] if isinstance(loaders, list) else loaders
        if trained.warn_of(reading_of(getattr(loader, "dataset", None)), f"This {_STAGES[stage]}"):
            # The warning of clipped images would say less.
            self._warned_of.add(stage)


class ChecksImages:
    """Part of a Lightning model that checks the images of each run, and records how the training read them.

    Attributes:
        reading: How the training read images with more than 8 bits, as far as it is known.
    """

    reading: Reading = EIGHT_BITS

    def configure_callbacks(self) -> list[Callback]:
        """The callbacks of the host, which change the images, preceded by one that checks them."""
        return [ImageCheck(), *super().configure_callbacks()]  # type: ignore[misc]  # the host's model follows in the order of bases

    def setup(self, stage: str) -> None:
        """Record how a training reads its images."""
        cast("AnomalibModule", super()).setup(stage)
        self._record_reading()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the reading."""
        cast("AnomalibModule", super()).on_save_checkpoint(checkpoint)
        checkpoint[_KEY] = self.reading.plain

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Load the reading, unless a training reads its images itself."""
        cast("AnomalibModule", super()).on_load_checkpoint(checkpoint)
        self.reading = recorded_reading(checkpoint)
        self._record_reading()

    def _record_reading(self) -> None:
        trainer = cast("AnomalibModule", self)._trainer  # noqa: SLF001 - the public property raises without one
        if trainer is None or trainer.state.fn != TrainerFn.FITTING:
            return
        # There may be data loaders instead of a data module.
        images = getattr(getattr(trainer, "datamodule", None), "train_data", None)
        if images is not None:
            self.reading = reading_of_images(images)


def recorded_reading(checkpoint: Mapping[str, Any]) -> Reading:
    """How the training of a checkpoint read its images; anomalib's reading if it is not recorded.

    Raises:
        ValueError: If the record is damaged.
    """
    return Reading.from_plain(checkpoint.get(_KEY))


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
