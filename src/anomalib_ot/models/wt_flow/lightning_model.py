"""WT-Flow for anomalib: time-reversed flow matching with worst transport.

Paper: Li et al., Time-reversed flow matching with worst transport in high-dimensional latent space for image anomaly
detection, 2025, https://arxiv.org/abs/2508.05461
"""

import logging
from collections.abc import Iterable, Sequence, Sized
from copy import deepcopy
from itertools import count
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import torch
from anomalib import LearningType
from anomalib.data import Batch
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from lightning.pytorch.utilities.types import STEP_OUTPUT, OptimizerLRScheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader

from anomalib_ot.decide.post_processor import ConformalPostProcessor
from anomalib_ot.export.checked import CheckedExport
from anomalib_ot.features.backbone_defaults import default_image_size
from anomalib_ot.features.backbones import backbone_name
from anomalib_ot.features.extraction import Extraction
from anomalib_ot.features.preprocessing import resize_and_normalize
from anomalib_ot.features.store import CachePlace
from anomalib_ot.host.checkpoint_rules import CheckpointRules
from anomalib_ot.host.checkpoints import SafeCheckpoints
from anomalib_ot.host.cross_fit import FoldFeatures
from anomalib_ot.host.feature_cache import FeatureBatch
from anomalib_ot.host.feature_training import FeatureTraining
from anomalib_ot.host.verdicts import Verdicts
from anomalib_ot.transport import CouplingName, Processes, Scope, Solver, create_coupling

from .matching import matching_losses
from .settings import Normalization, Score, WtFlowSettings
from .torch_model import WtFlowModel
from .training import GRADIENT_NORM, average_into, create_optimizer, fit_flow, noise_generator

logger = logging.getLogger(__name__)

_BATCH = 16
# Steps between two measurements of the held-out loss, and draws of noise and times in each.
_INTERVAL = 25
_DRAWS = 4


class WtFlow(CheckedExport, Verdicts, SafeCheckpoints, FeatureTraining, AnomalibModule):  # type: ignore[misc]  # as anomalib's own models
    """Anomaly detection by time-reversed flow matching with worst transport.

    The backbone is frozen: the features of the training images are extracted once and cached, so that a step consists
    of the flow only. Scores use the exponential moving average of the weights.

    Args:
        backbone: Name of any timm model, or a folder that timm saved, as ``local-dir:PATH`` or as a ``Path``.
        layers: Layers of the backbone to take features from. Each has its own flow, and their maps are averaged. By
            default one that suits the backbone, see :mod:`anomalib_ot.features.backbone_defaults`: of stride 16, or at
            3/4 of the depth of a plain vision transformer.
        pre_trained: Whether to load the backbone's pre-trained weights.
        image_size: Height and width that the default pre-processor resizes to, in pixels. By default 256 × 256;
            448 × 448 with DINOv2 and DINOv3; that of the backbone if it accepts no other.
        normalization: ``whitening`` of each cell by its mean and covariance in normal images, see
            :class:`LocalWhitening`, or ``layer`` normalisation over the map, without parameters (paper).
        whitened_channels: Whitening projects features with more channels to this number.
        global_modes: Largest number of principal components of whole maps that are removed before the whitening, from
            0 to 32. Few images and images that are not aligned have fewer.
        pooling: Average the features over 3 x 3 cells at every second cell (paper).
        width: Channels of the velocity field, a multiple of 16, at most 16384.
        depth: Number of times that the velocity field halves the resolution, at most 16; 0 for none.
        coupling: Pair features with noise ``independent`` of each other, at ``optimal`` or at ``worst`` transport cost
            (paper).
        scope: Pair single ``positions`` or whole ``maps``.
        block_size: Number of points within which pairs are assigned, a divisor of the points in a batch; 0 for all,
            None for the largest divisor up to 128.
        solver: ``exact``, ``greedy`` or ``auto``, see :class:`anomalib_ot.transport.OptimalCoupling`.
        score: ``density`` (paper), ``log_density`` or ``mismatch``, see :meth:`WtFlowModel.scores`.
        euler_steps: Euler steps from t = 0 to 1 of ``density`` and ``log_density``.
        mismatch_times: Times in (0, 1) at which ``mismatch`` compares velocities.
        mismatch_draws: Noise draws of ``mismatch`` at each time.
        top_share: The image score is the mean of this share of the pixels, the highest ones; 0 takes the maximum. 0.03
            in the paper.
        smoothing: Standard deviation of the Gaussian that smooths the anomaly map, in pixels; 0 for none (paper).
        training_steps: Steps of the optimiser, over which the learning rate rises, then falls to 0 by a cosine.
        batch_size: Training images in a step, at most their total number. The default is 16, or all images if there are
            fewer.
        learning_rate: Highest learning rate of AdamW.
        weight_decay: Weight decay of AdamW.
        ema_rate: Share of the averaged weights that a step keeps, in [0, 1). The first steps keep less.
        validation_fraction: Fraction of the training images that is held out, in [0, 1). Training stops when their loss
            no longer decreases, and the weights with the lowest loss are kept. 0 holds out none.
        patience: Training stops after this many measurements of the held-out loss, one every 25 steps, without a lower
            loss.
        calibration_folds: Folds of the training images whose scores set the threshold. Each image is scored by a model
            that was fitted on the other folds. 0 takes the scores of the validation images. So do fewer than two images
            a fold, training without a feature cache, and training with several processes.
        feature_cache: Where to keep the features: ``device``, ``cpu``, ``disk`` or ``none``. ``auto`` takes the first
            of these in which they fit.
        cache_budget: Fraction of the free memory that ``feature_cache="auto"`` may use, in (0, 1].
        extraction: Extract the features of training images with ``torch`` or ``openvino``. ``auto`` takes OpenVINO
            where it is installed and saves time.
        pre_processor: Pre-processor; True for the default, False for none.
        post_processor: Post-processor; True for the default, False for none.
        evaluator: Evaluator; True for the default, False for none.
        visualizer: Visualizer; True for the default, False for none.

    Raises:
        TypeError: If the backbone is neither a name nor a path.
        ValueError: If an argument is out of range, or the backbone lacks a layer.

    Example:
        >>> from anomalib.data import MVTecAD
        >>> from anomalib.engine import Engine
        >>> from anomalib_ot import WtFlow
        >>> Engine().train(WtFlow(), datamodule=MVTecAD(category="bottle"))  # doctest: +SKIP
    """

    model: WtFlowModel
    settings: WtFlowSettings
    views = "anomalib_ot.models.wt_flow.views"
    checkpoint_rules = CheckpointRules(
        WtFlowSettings,
        parts=("model", "trained"),
        learned=("normalization", "noise"),
        marks=("model.heads.",),
        before={"global_modes": 0},
    )

    def __init__(
        self,
        backbone: str | Path = WtFlowSettings.backbone,
        layers: Sequence[str] | None = WtFlowSettings.layers,
        pre_trained: bool = WtFlowSettings.pre_trained,
        image_size: tuple[int, int] | None = WtFlowSettings.image_size,
        normalization: Normalization = WtFlowSettings.normalization,
        whitened_channels: int = WtFlowSettings.whitened_channels,
        global_modes: int = WtFlowSettings.global_modes,
        pooling: bool = WtFlowSettings.pooling,
        width: int = WtFlowSettings.width,
        depth: int = WtFlowSettings.depth,
        coupling: CouplingName = WtFlowSettings.coupling,
        scope: Scope = WtFlowSettings.scope,
        block_size: int | None = WtFlowSettings.block_size,
        solver: Solver = WtFlowSettings.solver,
        score: Score = WtFlowSettings.score,
        euler_steps: int = WtFlowSettings.euler_steps,
        mismatch_times: Sequence[float] = WtFlowSettings.mismatch_times,
        mismatch_draws: int = WtFlowSettings.mismatch_draws,
        top_share: float = WtFlowSettings.top_share,
        smoothing: float = WtFlowSettings.smoothing,
        training_steps: int = WtFlowSettings.training_steps,
        batch_size: int | None = WtFlowSettings.batch_size,
        learning_rate: float = WtFlowSettings.learning_rate,
        weight_decay: float = WtFlowSettings.weight_decay,
        ema_rate: float = WtFlowSettings.ema_rate,
        validation_fraction: float = WtFlowSettings.validation_fraction,
        patience: int = WtFlowSettings.patience,
        calibration_folds: int = WtFlowSettings.calibration_folds,
        feature_cache: CachePlace = WtFlowSettings.feature_cache,
        cache_budget: float = WtFlowSettings.cache_budget,
        extraction: Extraction = WtFlowSettings.extraction,
        pre_processor: nn.Module | bool = True,
        post_processor: ConformalPostProcessor | PostProcessor | nn.Module | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        # The host stores the arguments in checkpoints as they are here: names, not paths, and no None.
        backbone = backbone_name(backbone)
        settings = WtFlowSettings.of(locals())
        layers, image_size = settings.layers, settings.image_size
        if pre_processor is True:
            pre_processor = self.configure_pre_processor(image_size, backbone)
        super().__init__(
            pre_processor=pre_processor,
            post_processor=post_processor,
            evaluator=evaluator,
            visualizer=visualizer,
        )
        self.record_backbone(backbone)
        self.set_feature_training(settings, _BATCH)
        self.coupling = create_coupling(settings.coupling, settings.scope, settings.block_size, settings.solver)
        self.model = WtFlowModel(settings)
        # The model holds the moving average of these weights.
        self.trained = deepcopy(self.model.velocities())
        self.model.requires_grad_(requires_grad=False)
        # Lowest loss so far, and measurements since then; both are stored in checkpoints.
        self._lowest_loss = float("inf")
        self._looks_since = 0
        self._best_weights: dict[str, Tensor] | None = None

    def configure_post_processor(self) -> ConformalPostProcessor:
        """A threshold that promises a rate of false alarms, from good images alone."""
        return ConformalPostProcessor()

    @staticmethod
    def configure_pre_processor(
        image_size: tuple[int, int] | None = None,
        backbone: str | Path = WtFlowSettings.backbone,
    ) -> PreProcessor:
        """Resize and normalise with the backbone's own mean and standard deviation.

        Args:
            image_size: Height and width, in pixels. By default the paper's 256 × 256, where the backbone accepts it.
            backbone: Backbone whose data configuration to use.

        Returns:
            The pre-processor.
        """
        return resize_and_normalize(
            image_size or default_image_size(backbone, WtFlowSettings.usual_image_size), backbone
        )

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW, with a learning rate that rises, then falls by a cosine, over ``training_steps``."""
        # Lightning's learning-rate finder sets the rate in the hyperparameters.
        optimizer, schedule = create_optimizer(self.trained, self.settings, self.hparams["learning_rate"])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_fit_start(self) -> None:
        """Extract the features of the training images, and estimate how they vary.

        Raises:
            ValueError: If the feature maps are too small for the velocity field, or the block size does not divide
                the points in a batch.
        """
        if self.resumes_what_has_ended():
            return
        self.extract_training_features(self.model.feature_extractor)
        trained_on = self.training_features.trained_on
        if not self.model.is_fitted:
            self.model.fit_normalization(self.features_on_device(trained_on, "Fitting the normalisation"))
        first = self.model.embed(next(self.features_on_device(trained_on, "Checking a batch")))
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
        embeddings = self.model.embed(self.features_of(batch))
        processes, generator = Processes.all(), noise_generator(self.global_step, self.device)
        losses = matching_losses(self.trained, embeddings, self.coupling, generator, processes)
        # So that all processes report it, not only one.
        batch_losses = processes.sum(losses.detach() / self.trainer.world_size)
        if not batch_losses.isfinite().all():
            self._stop_at(batch_losses)
            return None
        # The finite loss shows that the weights are valid.
        average_into(self.model.velocities(), self.trained, self.global_step, self.settings.ema_rate)
        self.log("train_loss", batch_losses.mean(), prog_bar=True, batch_size=1)
        return losses.mean()

    def _stop_at(self, losses: Tensor) -> None:
        layer = self.model.layers[int((~losses.isfinite()).nonzero()[0])]
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
            and self._stopped_falling(self._held_out_loss(held_out))
        ):
            logger.info("The loss of held-out images stopped falling after %d steps.", self.global_step)
            self.trainer.should_stop = True
        super().on_train_batch_end(*args)

    @property
    def has_converged(self) -> bool:
        """Whether the loss of the held-out images stopped falling."""
        return self._looks_since >= self.settings.patience

    def finished_part(self) -> nn.Module:
        """The averaged velocity fields."""
        return self.model.velocities()

    def finish(self) -> None:
        """Restore the best weights, if images are held out."""
        if self._best_weights is not None:
            self.model.velocities().load_state_dict(self._best_weights)

    def fit_fold(self, features: FoldFeatures) -> WtFlowModel:
        """Fit a model on some of the training images, with as many steps as this one, or as it would have."""
        model = WtFlowModel(self.settings, self.model.feature_extractor).to(self.device).eval()
        model.fit_normalization(features.in_order())
        batches = (batch for number in count() for batch in features.epoch(number))
        steps = self.global_step or self.settings.training_steps
        fit_flow(model, batches, self.coupling, steps, self.hparams["learning_rate"])
        return model

    @torch.no_grad()
    def _held_out_loss(self, held_out: Iterable[FeatureBatch]) -> float:
        """Loss of the averaged weights, with the same noise and times in each measurement."""
        generator = torch.Generator(self.device).manual_seed(0)
        velocities = self.model.velocities()
        loss = fmean(
            float(matching_losses(velocities, embeddings, self.coupling, generator).mean())
            for embeddings in map(self.model.embed, self.features_on_device(held_out, "Validating"))
            for _ in range(_DRAWS)
        )
        self.log("val_loss", loss, prog_bar=True, batch_size=1)
        return loss

    def _stopped_falling(self, loss: float) -> bool:
        if loss < self._lowest_loss:
            self._lowest_loss = loss
            self._looks_since = 0
            self._best_weights = {name: value.clone() for name, value in self.model.velocities().state_dict().items()}
        else:
            self._looks_since += 1
        return self.has_converged

    def on_fit_end(self) -> None:
        """Release the cached features."""
        self.forget_training_features()

    def validation_step(self, batch: Batch, *args, **kwargs) -> STEP_OUTPUT:
        """Score a batch, from which the post-processor computes its thresholds.

        Args:
            batch: Images.
            *args: Unused.
            **kwargs: Unused.

        Returns:
            The batch with its anomaly maps and image scores.
        """
        del args, kwargs
        return batch.update(**self.model(batch.image)._asdict())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the training state that resuming needs."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["wt_flow"] = {
            "lowest_loss": self._lowest_loss,
            "looks_since": self._looks_since,
            "best_weights": self._best_weights,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the settings that change scores, and the training state.

        Raises:
            ValueError: If the checkpoint belongs to another model, or its tensors do not match this one.
        """
        super().on_load_checkpoint(checkpoint)
        state = checkpoint["wt_flow"]
        self._lowest_loss = state["lowest_loss"]
        self._looks_since = state["looks_since"]
        self._best_weights = state["best_weights"]

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """Arguments that the model passes to the trainer."""
        return {
            "max_epochs": -1,
            "max_steps": self.settings.training_steps,
            "gradient_clip_val": GRADIENT_NORM,
            "num_sanity_val_steps": 0,
        }

    @property
    def learning_type(self) -> LearningType:
        """One-class, as WtFlow learns from normal images."""
        return LearningType.ONE_CLASS
