"""Models that are finished once, however their training ends."""

import logging
import os
from typing import TYPE_CHECKING, Any, cast

from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

if TYPE_CHECKING:
    from anomalib.models.components import AnomalibModule

logger = logging.getLogger(__name__)


class Finishing:
    """Part of a Lightning model with a last step of learning after the training, followed by a validation.

    Validation computes maps and thresholds from all its images. It runs once, after the model is finished, unless the
    user sets how often. Training may end by its number of epochs or steps, by a time limit, by a callback that sets
    ``should_stop``, or by SIGTERM. Most of these are known when an epoch ends, before the trainer saves a checkpoint.
    A callback that watches a metric decides later, and one that counts steps saves earlier. In both cases the finished
    model is written to the checkpoints of the last step. A checkpoint of an interrupted training records that, and a
    test of it gives a warning.

    The model overrides :meth:`finish`, :meth:`finished_part` and ``has_converged``, and may override
    :meth:`calibrate`.

    Attributes:
        is_finished: Whether training has ended and the model is finished; None if no trainer has trained the model.
    """

    trainer: Any
    global_step: int
    current_epoch: int
    is_finished: bool | None = None
    # State of `finished_part` before it was finished, from which training continues.
    _unfinished: dict[str, Tensor] | None = None
    _saved_unfinished_at: int | None = None
    _was_terminated = False
    _has_warned_of_end = False

    @property
    def has_converged(self) -> bool:
        """Whether the model itself ended the training, which then must not continue from a checkpoint."""
        return False

    def finish(self) -> None:
        """Finish the model after the last step."""
        raise NotImplementedError

    def calibrate(self) -> None:
        """Calibrate the finished model before it is validated; a terminated training does not."""

    def finished_part(self) -> nn.Module:
        """The part of the model that both training and :meth:`finish` change."""
        raise NotImplementedError

    def on_train_start(self) -> None:
        """Continue from the state before the model was finished, if it was."""
        cast("AnomalibModule", super()).on_train_start()
        if self._unfinished is not None:
            self.finished_part().load_state_dict(self._unfinished)
        self.is_finished, self._unfinished, self._saved_unfinished_at = False, None, None

    def on_train_batch_end(self, *args: Any) -> None:
        """Defer the validation until the model is finished, and a termination until the epoch has ended."""
        cast("AnomalibModule", super()).on_train_batch_end(*args)
        trainer = self.trainer
        ends = self._stops() or (trainer.is_last_batch and self._is_last_epoch())
        # Lightning has no public way to skip one validation without changing the user's settings.
        trainer.fit_loop.epoch_loop._skip_next_val = ends or _validates_each_epoch(trainer)  # noqa: SLF001
        signals = trainer._signal_connector  # noqa: SLF001 - Lightning would raise at once, and save nothing
        # Several processes receive a signal at different steps, and would wait for one another.
        if signals.received_sigterm and trainer.world_size == 1:
            self._was_terminated, signals.received_sigterm = True, False

    def on_train_epoch_end(self) -> None:
        """Finish and validate the model after the last epoch, before the trainer saves it."""
        was_terminated, self._was_terminated = self._was_terminated, False
        if was_terminated or self._stops() or self._is_last_epoch():
            self._conclude(hurries=was_terminated)
        cast("AnomalibModule", super()).on_train_epoch_end()
        if was_terminated:
            self.trainer._signal_connector.received_sigterm = True  # noqa: SLF001 - Lightning now ends the training

    def on_train_end(self) -> None:
        """Finish a model whose training a callback ended after the epoch, and correct checkpoints saved too early."""
        cast("AnomalibModule", super()).on_train_end()
        if not self.is_finished:
            self._conclude()
        if self._saved_unfinished_at == self.global_step:
            if self.trainer.is_global_zero:
                self._amend_checkpoints()
            self.trainer.strategy.barrier()

    def _stops(self) -> bool:
        """Whether training ends with this batch, even within an epoch."""
        trainer = self.trainer
        if trainer.should_stop and trainer.fit_loop._can_stop_early:  # noqa: SLF001 - min_epochs and min_steps
            return True
        return 0 <= trainer.max_steps <= self.global_step

    def _is_last_epoch(self) -> bool:
        return 0 <= self.trainer.max_epochs <= self.current_epoch + 1

    def _conclude(self, *, hurries: bool = False) -> None:
        part = self.finished_part()
        self._unfinished = {name: value.clone() for name, value in part.state_dict().items()}
        self.finish()
        self.is_finished = True
        if not hurries:
            self.calibrate()
        validate_now(self.trainer)

    def _amend_checkpoints(self) -> None:
        """Write the finished model to checkpoints of the last step, and keep the state of the trainer's loops."""
        strategy = self.trainer.strategy
        for callback in self.trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint):
                for path in {callback.best_model_path, callback.last_model_path, *callback.best_k_models} - {""}:
                    # A resumed checkpoint lists files too, which may no longer exist or belong to another run.
                    is_own = os.path.dirname(path) == str(callback.dirpath)  # noqa: PTH120 - it may be a URL
                    if not is_own or not get_filesystem(path).exists(path):
                        continue
                    content = strategy.load_checkpoint(path, weights_only=False)
                    if content["global_step"] == self.global_step and not content["finishing"]["is_finished"]:
                        content["state_dict"] = strategy.lightning_module_state_dict()
                        self.on_save_checkpoint(content)
                        strategy.save_checkpoint(content, path)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add whether the model is finished, and the state that resuming starts from."""
        cast("AnomalibModule", super()).on_save_checkpoint(checkpoint)
        if self.is_finished is False:
            self._saved_unfinished_at = self.global_step
        checkpoint["finishing"] = {
            "is_finished": self.is_finished,
            "unfinished": None if self.has_converged else self._unfinished,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Load whether the model is finished."""
        cast("AnomalibModule", super()).on_load_checkpoint(checkpoint)
        # Checkpoints of the first format do not record it.
        state = checkpoint.get("finishing", {"is_finished": None, "unfinished": None})
        self.is_finished, self._unfinished = state["is_finished"], state["unfinished"]

    def on_test_start(self) -> None:
        """Warn if the model is not finished."""
        cast("AnomalibModule", super()).on_test_start()
        self._warn_if_unfinished()

    def on_predict_start(self) -> None:
        """Warn if the model is not finished."""
        cast("AnomalibModule", super()).on_predict_start()
        self._warn_if_unfinished()

    def _warn_if_unfinished(self) -> None:
        if self.is_finished is False and not self._has_warned_of_end:
            self._has_warned_of_end = True
            logger.warning(
                "The training of this %s was interrupted: its scores are those of an unfinished model, and its "
                "thresholds may be missing. Resume it with anomalib fit --ckpt_path, or train again.",
                type(self).__name__,
            )


def validate_now(trainer: Trainer) -> None:
    """Validate within training as the trainer does, if there are validation data."""
    if not trainer.enable_validation:
        return
    trainer.validating = True
    try:
        trainer.fit_loop.epoch_loop.val_loop.run()
    finally:
        trainer.training = True


def _validates_each_epoch(trainer: Trainer) -> bool:
    """Whether the user left it to the trainer when to validate."""
    if trainer.check_val_every_n_epoch != 1 or getattr(trainer, "_val_check_time_interval", None) is not None:
        return False
    # An integer is a number of batches.
    return isinstance(trainer.val_check_interval, float) and trainer.val_check_interval == 1
