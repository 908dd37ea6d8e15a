"""What was held out of a training: that it stays so in later runs, and what it says of thresholds and metrics."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from anomalib.data import AnomalibDataModule
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from .splits import Split, count_held_out, joined, overlaps, split_of, trained_but_held_out, use_split

if TYPE_CHECKING:
    from anomalib.models.components import AnomalibModule

logger = logging.getLogger(__name__)

# Width of the scale of image scores, in thresholds, where no anomaly tells how far they go: a score of 0 becomes 0.375,
# the threshold 0.5, and five times as much 1. The wider, the more of its threshold a sensitivity moves.
_WIDTH = 8
_NAMED = 5


class HoldsOut:
    """Part of a Lightning model that knows its training's split, and says what the held-out pictures are good for.

    The checkpoint records which pictures the model was trained on. Where a later run draws another split of the same
    pictures, that of the training is used; where it cannot be, a warning counts the pictures that are not held out.

    Attributes:
        split: The split that the model was trained with, None where it is not known.
    """

    trainer: Any
    split: Split | None = None

    def configure_callbacks(self) -> list[Callback]:
        """The host's, and after them, as it changes the post-processor's scale, one that looks at what is held out."""
        return [*super().configure_callbacks(), HeldOutCheck()]  # type: ignore[misc]  # the host's model comes after this part

    def setup(self, stage: str) -> None:
        """Note the split that is trained with, or use it again."""
        cast("AnomalibModule", super()).setup(stage)
        data = _data(self.trainer)
        if data is None:
            return
        self._use_split(data)
        if stage == TrainerFn.FITTING:
            # A model that was fitted before goes on from what it has learned.
            self.split = joined(split_of(data), self.split)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the split."""
        cast("AnomalibModule", super()).on_save_checkpoint(checkpoint)
        checkpoint["split"] = self.split

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over the split, and use it again."""
        cast("AnomalibModule", super()).on_load_checkpoint(checkpoint)
        # Checkpoints did not always have it.
        self.split = checkpoint.get("split")
        trainer = cast("AnomalibModule", self)._trainer  # noqa: SLF001 - the public property raises where there is none
        data = _data(trainer)
        if trainer is not None and data is not None:
            self._use_split(data)
            if trainer.state.fn == TrainerFn.FITTING:
                self.split = joined(split_of(data), self.split)

    def _use_split(self, data: AnomalibDataModule) -> None:
        if self.split is not None and take_split(data, self.split):
            # Data sets that were made anew do not resize as the model does; a second set-up keeps the split.
            data.setup(self.trainer.state.fn)


def take_split(data: AnomalibDataModule, split: Split) -> bool:
    """Use the split of a training again, or warn of held-out pictures that were trained on.

    Args:
        data: The data module, which is set up.
        split: The split of the training.

    Returns:
        Whether pictures were put back where they had been.
    """
    before = count_held_out(data)
    moved = use_split(data, split)
    if moved:
        logger.warning(
            "%d of the %d pictures that %s drew to be held out were trained on: the split of the training is used "
            "again. With a seed, as --data.seed 0, each run draws the same.",
            moved,
            before,
            data.name,
        )
    if left := trained_but_held_out(data, split):
        way_out = (
            "Hold pictures out when training."
            if overlaps(split)
            else "Give the folders and split settings of the training, and one --data.seed to both commands."
        )
        logger.warning(
            "%d of the %d held-out pictures of %s were trained on: their scores, and metrics and p-values from them, "
            "say nothing of new pictures. %s",
            left,
            count_held_out(data),
            data.name,
            way_out,
        )
    return moved > 0


class HeldOutCheck(Callback):
    """Says where the threshold comes from, if no anomaly was held out, and when a test says nothing.

    The host's scale of image scores then ends at the highest score of a good picture. It is made wider, so that scores
    on both sides of the threshold differ.
    """

    def __init__(self) -> None:
        self._good: list[str] = []
        self._anomalous = 0

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start to count."""
        del trainer, pl_module
        self._good, self._anomalous = [], 0

    on_test_start = on_validation_start

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Count the pictures of a batch."""
        del trainer, pl_module, outputs, args, kwargs
        labels = getattr(batch, "gt_label", None)
        if labels is None:
            return
        paths = batch.image_path or [""] * len(labels)
        self._good += [str(path) for path, label in zip(paths, labels.tolist(), strict=True) if not label]
        self._anomalous += int(labels.sum())

    on_test_batch_end = on_validation_batch_end

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Widen the scale, and say where the threshold comes from, if there was no anomaly."""
        good, anomalous = self._counts(trainer, pl_module)
        if anomalous or not good:
            return
        processor = getattr(pl_module, "post_processor", None)
        if getattr(processor, "enable_thresholding", False):
            _widen(processor)
            logger.warning("%s", self._about_threshold(good, float(cast("Any", processor).image_threshold), pl_module))

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say when metrics mean nothing."""
        good, anomalous = self._counts(trainer, pl_module)
        if (good == 0) != (anomalous == 0):
            there, lacking = ("good", "anomalous") if good else ("anomalous", "good")
            logger.warning(
                "The test has %d %s pictures and no %s ones: AUROC and F1, such as the 0.0 in the table, mean nothing. "
                "Add %s pictures to the test to measure how well the model tells them apart.",
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
        which = f"the highest score of {good} good pictures" if good > 1 else "the score of one good picture"
        data = _data(model.trainer)
        split = getattr(model, "split", None)
        if data is not None and split is not None and trained_but_held_out(data, split):
            chance = (
                "The model was trained on such pictures too, and new good ones score higher: expect most of them to be "
                "flagged. Hold pictures out, or test with anomalous ones, for a threshold that can be used"
            )
        else:
            chance = (
                f"If new good pictures vary no more than these, up to 1 in {good + 1} of them is flagged. A model that "
                "was trained on few pictures flags more; with anomalous pictures in the validation set the threshold "
                "depends on these too"
            )
        return (
            f"No anomalous pictures were held out: the threshold, a raw score of {threshold:.4g} that is shown as 0.5, "
            f"is {which} ({names}{more}). {chance}."
        )


def _widen(processor: Any) -> None:
    threshold, low, high = processor.image_threshold, processor.image_min, processor.image_max
    width = _WIDTH * threshold.abs()
    # NaN, where the host does not normalise, is in no order.
    if width > high - low:
        low.copy_(threshold - width / 2)
        high.copy_(threshold + width / 2)


def _data(trainer: Any) -> AnomalibDataModule | None:
    data = getattr(trainer, "datamodule", None)
    return data if isinstance(data, AnomalibDataModule) else None
