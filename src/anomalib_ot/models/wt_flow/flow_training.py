"""Training of a flow by Lightning's trainer, for the models that have one."""

import logging
from collections.abc import Iterable, Sized
from copy import deepcopy
from functools import cached_property
from itertools import count
from statistics import fmean
from typing import Any, cast

import torch
from anomalib.data import Batch
from lightning.pytorch.utilities.types import STEP_OUTPUT, OptimizerLRScheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader

from anomalib_ot.host.cross_fit import FoldFeatures
from anomalib_ot.host.feature_training import FeatureTraining
from anomalib_ot.host.image_features import FeatureBatch
from anomalib_ot.transport import Coupling, Processes, create_coupling

from .matching import matching_losses
from .torch_model import WtFlowModel
from .training import GRADIENT_NORM, average_into, create_optimizer, fit_flow, noise_generator

logger = logging.getLogger(__name__)

# Steps between two measurements of the held-out loss, and draws of noise and times in each.
_INTERVAL = 25
_DRAWS = 4


class FlowTraining(FeatureTraining):
    """Part of a Lightning model that trains a flow, in steps of the trainer.

    The model calls :meth:`set_flow_training` in its constructor, once it has its torch model.

    Attributes:
        trained: The velocity fields that are trained. The flow has the moving average of their weights.
    """

    early_stopping_keys = ("wt_flow", "lowest_loss", "looks_since", "best_weights")
    hparams: Any
    log: Any
    trained: nn.ModuleList

    @property
    def flow(self) -> WtFlowModel:
        """The flow that is trained."""
        return cast("WtFlowModel", self.model)

    def set_flow_training(self) -> None:
        """Copy the velocity fields to train."""
        self.trained = deepcopy(self.flow.velocities())
        self.model.requires_grad_(requires_grad=False)

    @cached_property
    def coupling(self) -> Coupling:
        """Pairs features with noise."""
        settings = self.flow.settings
        return create_coupling(settings.coupling, settings.scope, settings.block_size, settings.solver)

    @property
    def _learning_rate(self) -> float:
        # Lightning's learning-rate finder sets the rate in the hyperparameters.
        return cast("float", self.hparams.get("learning_rate", self.flow.settings.learning_rate))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW, with a learning rate that rises, then falls by a cosine, over ``training_steps``."""
        optimizer, schedule = create_optimizer(self.trained, self.flow.settings, self._learning_rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_fit_start(self) -> None:
        """Extract the features of the training images, and estimate how they vary.

        Raises:
            ValueError: If the feature maps are too small for the velocity field, or the block size does not divide
                the points in a batch.
        """
        if self.resumes_what_has_ended():
            return
        self.extract_training_features(cast("nn.Module", self.model.feature_extractor))
        trained_on = self.training_features.trained_on
        if not self.flow.is_fitted:
            self.flow.fit_normalization(self.features_on_device(trained_on, "Fitting the normalisation"))
        first = self.flow.embed(next(self.features_on_device(trained_on, "Checking a batch")))
        sizes = {len(first[0])}
        for features in (trained_on, self.training_features.held_out):
            if isinstance(features, DataLoader):
                total = len(cast("Sized", features.dataset))
                sizes |= {min(total, self.batch_size), total % self.batch_size}
        for size in sorted(sizes - {0}, reverse=True):
            for maps in first:
                self.coupling.check((size, *maps.shape[1:]))

    def training_step(self, batch: Batch | FeatureBatch, *args, **kwargs) -> STEP_OUTPUT:
        """Regress the velocity from features to their paired noise.

        Args:
            batch: Images, or their cached features.
            *args: Unused.
            **kwargs: Unused.

        Returns:
            The loss, or None if it is not finite; training then stops with the last weights of a finite loss.

        Raises:
            RuntimeError: If the first loss is not finite, or any loss in training with several processes.
        """
        del args, kwargs
        embeddings = self.flow.embed(self.features_of(batch))
        processes, generator = Processes.all(), noise_generator(self.global_step, self.device)
        losses = matching_losses(self.trained, embeddings, self.coupling, generator, processes)
        # So that all processes report it, not only one.
        batch_losses = processes.sum(losses.detach() / self.trainer.world_size)
        if not batch_losses.isfinite().all():
            self._stop_at(batch_losses)
            return None
        # The finite loss shows that the weights are valid.
        average_into(self.flow.velocities(), self.trained, self.global_step, self.flow.settings.ema_rate)
        self.log("train_loss", batch_losses.mean(), prog_bar=True, batch_size=1)
        return losses.mean()

    def _stop_at(self, losses: Tensor) -> None:
        layer = self.flow.layers[int((~losses.isfinite()).nonzero()[0])]
        msg = (
            f"the loss of layer {layer} is not finite at step {self.global_step} (epoch {self.current_epoch}); lower "
            "learning_rate or train with a higher precision"
        )
        # With several processes, Lightning allows none of them to skip a step.
        if self.global_step == 0 or self.trainer.world_size > 1:
            raise RuntimeError(msg)
        logger.error("Training stops with the weights of the step before: %s.", msg)
        self.trainer.should_stop = True

    def on_train_batch_end(self, *args) -> None:
        """Measure the held-out loss at regular intervals."""
        held_out = self.training_features.held_out
        if (
            held_out is not None
            and self.global_step % _INTERVAL == 0
            and self.stopped_falling(self._held_out_loss(held_out))
        ):
            logger.info("The loss of held-out images stopped falling after %d steps.", self.global_step)
            self.trainer.should_stop = True
        super().on_train_batch_end(*args)

    def finished_part(self) -> nn.Module:
        """The averaged velocity fields."""
        return self.flow.velocities()

    def finish(self) -> None:
        """Restore the best weights, if images are held out."""
        self.restore_best()

    def fit_flow_of_fold(self, flow: WtFlowModel, features: FoldFeatures) -> None:
        """Fit a new flow to some of the training images, with as many steps as this one, or as it would have."""
        flow.fit_normalization(features.in_order())
        batches = (batch for number in count() for batch in features.epoch(number))
        steps = self.global_step or flow.settings.training_steps
        fit_flow(flow, batches, self.coupling, steps, self._learning_rate)

    @torch.no_grad()
    def _held_out_loss(self, held_out: Iterable[FeatureBatch]) -> float:
        """Loss of the averaged weights, with the same noise and times in each measurement."""
        generator = torch.Generator(self.device).manual_seed(0)
        velocities = self.flow.velocities()
        loss = fmean(
            float(matching_losses(velocities, embeddings, self.coupling, generator).mean())
            for embeddings in map(self.flow.embed, self.features_on_device(held_out, "Validating"))
            for _ in range(_DRAWS)
        )
        self.log("val_loss", loss, prog_bar=True, batch_size=1)
        return loss

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """Arguments that the model passes to the trainer."""
        return {
            "max_epochs": -1,
            "max_steps": self.flow.settings.training_steps,
            "gradient_clip_val": GRADIENT_NORM,
            "num_sanity_val_steps": 0,
        }
