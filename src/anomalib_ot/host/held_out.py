"""Held-out images: they stay held out in later runs, and warnings say what thresholds and metrics from them mean."""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from anomalib.data import AnomalibDataModule, Batch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import STEP_OUTPUT

from .calibration import HELD_OUT, TRAINED, CalibratesItself, CalibrationScores
from .scale import HasScale
from .splits import Split, count_held_out, joined, overlaps, split_of, trained_but_held_out, use_split

if TYPE_CHECKING:
    from anomalib.models.components import AnomalibModule

logger = logging.getLogger(__name__)

# Width of the scale of image scores, in thresholds, if no anomaly was held out: a raw score of 0 becomes 0.375, the
# threshold 0.5, and five times the threshold 1. A sensitivity moves the threshold by a share of the width.
_WIDTH = 8
_NAMED = 5


class HoldsOut:
    """Part of a Lightning model that records the split of its training, and warns if held-out images are unsuitable.

    The checkpoint records which images the model was trained on. If a later run draws another split of the same images,
    the split of the training is restored. If that is not possible, a warning gives the number of images that the model
    was trained on.

    Attributes:
        split: The split that the model was trained with; None if it is not known.
    """

    trainer: Any
    split: Split | None = None

    def configure_callbacks(self) -> list[Callback]:
        """The callbacks of the host, followed by one that checks held-out images and may change the score scale."""
        return [*super().configure_callbacks(), HeldOutCheck()]  # type: ignore[misc]  # the host's model follows in the order of bases

    def setup(self, stage: str) -> None:
        """Record the split of a training, or restore it."""
        cast("AnomalibModule", super()).setup(stage)
        data = _data(self.trainer)
        if data is None:
            return
        self._use_split(data)
        if stage == TrainerFn.FITTING:
            # A fitted model continues from what it has learned.
            self.split = joined(split_of(data), self.split)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the split."""
        cast("AnomalibModule", super()).on_save_checkpoint(checkpoint)
        checkpoint["split"] = self.split

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Load the split, and restore it in the data module."""
        cast("AnomalibModule", super()).on_load_checkpoint(checkpoint)
        # Older checkpoints have no split.
        self.split = checkpoint.get("split")
        trainer = cast("AnomalibModule", self)._trainer  # noqa: SLF001 - the public property raises without one
        data = _data(trainer)
        if trainer is not None and data is not None:
            self._use_split(data)
            if trainer.state.fn == TrainerFn.FITTING:
                self.split = joined(split_of(data), self.split)

    def validation_step(self, batch: Batch, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Score a batch, from which the post-processor computes its thresholds.

        Args:
            batch: Images.
            *args: Unused.
            **kwargs: Unused.

        Returns:
            The batch with its anomaly maps and image scores.
        """
        del args, kwargs
        return batch.update(**cast("Any", self).model(batch.image)._asdict())

    def _use_split(self, data: AnomalibDataModule) -> None:
        if self.split is not None and take_split(data, self.split):
            # New data sets do not resize as the model does. A second set-up keeps the split.
            data.setup(self.trainer.state.fn)


def take_split(data: AnomalibDataModule, split: Split) -> bool:
    """Restore the split of a training, or warn of held-out images that the model was trained on.

    Args:
        data: The data module, which is set up.
        split: The split of the training.

    Returns:
        Whether images were moved.
    """
    before = count_held_out(data)
    moved = use_split(data, split)
    if moved:
        logger.warning(
            "The model was trained on %d of the %d images that %s drew to hold out: the split of the training is "
            "restored. With a seed, such as --data.seed 0, each run draws the same split.",
            moved,
            before,
            data.name,
        )
    if left := trained_but_held_out(data, split):
        way_out = (
            "Hold images out when training."
            if overlaps(split)
            else "Give the folders and split settings of the training, and the same --data.seed to both commands."
        )
        logger.warning(
            "The model was trained on %d of the %d held-out images of %s: their scores, and metrics and p-values from "
            "them, do not apply to new images. %s",
            left,
            count_held_out(data),
            data.name,
            way_out,
        )
    return moved > 0


def calibrating_scores(rows: Iterable[tuple[float, float | None]], model: Any) -> CalibrationScores:
    """The scores that calibrate verdicts: those of the validation images, or those that a model provides itself.

    Args:
        rows: Image score and maximum of the map, None without a map, of each good validation image.
        model: The model that scored them.

    Returns:
        The scores of the validation images if the model was not trained on any of them, and provides no scores or those
        of fewer images; otherwise those that it provides, if it does.
    """
    was_trained_on = _was_trained_on_held_out(model)
    validated = CalibrationScores.of(rows, TRAINED if was_trained_on else HELD_OUT)
    own = model.calibration_scores if isinstance(model, CalibratesItself) else None
    # The promise of held-out images is exact, but more images promise a lower rate.
    is_better = own is not None and (was_trained_on or len(own.images) >= len(validated.images))
    return cast("CalibrationScores", own) if is_better else validated


class HeldOutCheck(Callback):
    """Reports the source of the threshold if no anomalous image was held out, and tests whose metrics mean nothing.

    Without anomalous images, the host's scale of image scores ends at the highest score of a good image. This callback
    widens it, so that scores on both sides of the threshold differ.
    """

    def __init__(self) -> None:
        self._good: list[str] = []
        self._anomalous = 0

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reset the counts."""
        del trainer, pl_module
        self._good, self._anomalous = [], 0

    on_test_start = on_validation_start

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Count the images of a batch."""
        del trainer, pl_module, outputs, args, kwargs
        labels = getattr(batch, "gt_label", None)
        if labels is None:
            return
        paths = batch.image_path or [""] * len(labels)
        self._good += [str(path) for path, label in zip(paths, labels.tolist(), strict=True) if not label]
        self._anomalous += int(labels.sum())

    on_test_batch_end = on_validation_batch_end

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report what a threshold from good images alone means. For that of anomalib, widen the scale of the scores."""
        good, anomalous = self._counts(trainer, pl_module)
        processor = getattr(pl_module, "post_processor", None)
        if not good or not getattr(processor, "enable_thresholding", False):
            return
        if isinstance(processor, HasScale):
            _warn_of_trained_images(processor)
        elif not anomalous:
            _widen(processor)
            logger.warning("%s", self._about_threshold(good, float(cast("Any", processor).image_threshold), pl_module))

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn if the metrics mean nothing."""
        good, anomalous = self._counts(trainer, pl_module)
        if (good == 0) != (anomalous == 0):
            there, lacking = ("good", "anomalous") if good else ("anomalous", "good")
            logger.warning(
                "The test has %d %s images and no %s ones: AUROC and F1, such as the 0.0 in the table, mean nothing. "
                "Add %s images to the test to measure how well the model separates them.",
                good or anomalous,
                there,
                lacking,
                lacking,
            )

    def _counts(self, trainer: Trainer, pl_module: LightningModule) -> tuple[int, int]:
        counts = torch.tensor([len(self._good), self._anomalous], device=pl_module.device)
        good, anomalous = cast("torch.Tensor", trainer.strategy.reduce(counts, reduce_op="sum")).tolist()
        return int(good), int(anomalous)

    def _about_threshold(self, good: int, threshold: float, model: Any) -> str:
        names = ", ".join(Path(path).name for path in self._good[:_NAMED])
        more = ", …" if good > _NAMED else ""
        which = f"the highest score of {good} good images" if good > 1 else "the score of one good image"
        if _was_trained_on_held_out(model):
            chance = (
                "The model was trained on some of these images, and new good images score higher: expect most of them "
                "to be flagged. Hold images out, or validate with anomalous images, for a usable threshold"
            )
        else:
            chance = (
                f"If new good images vary no more than these, up to 1 in {good + 1} of them is flagged. A model that "
                "was trained on few images flags more. With anomalous images in the validation set, the threshold "
                "depends on them too"
            )
        return (
            f"No anomalous images were held out: the threshold, a raw score of {threshold:.4g} that is shown as 0.5, "
            f"is {which} ({names}{more}). {chance}."
        )


def _warn_of_trained_images(processor: Any) -> None:
    """Warn that a promised rate of false alarms does not hold, if the scores behind it are of training images."""
    if getattr(processor, "calibration_source", None) == TRAINED:
        logger.warning(
            "The model was trained on some of the good images that its threshold is computed from. New good images "
            "score higher: expect far more false alarms than false_alarm_rate. Hold images out."
        )


def _widen(processor: Any) -> None:
    threshold, low, high = processor.image_threshold, processor.image_min, processor.image_max
    width = _WIDTH * threshold.abs()
    # A comparison with NaN, if the host does not normalise, is false.
    if width > high - low:
        low.copy_(threshold - width / 2)
        high.copy_(threshold + width / 2)


def _was_trained_on_held_out(model: Any) -> bool:
    split = getattr(model, "split", None)
    if split is None:
        return False
    data = _data(model.trainer)
    return data is not None and trained_but_held_out(data, split) > 0


def _data(trainer: Any) -> AnomalibDataModule | None:
    data = getattr(trainer, "datamodule", None)
    return data if isinstance(data, AnomalibDataModule) else None
