"""PRADOT for anomalib: prototypes learned by optimal transport.

Paper: Trombetta and Lartizien, Learning local and global prototypes with optimal transport for unsupervised anomaly
detection and localization, 2025, https://arxiv.org/abs/2508.12927
"""

import logging
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from anomalib.data import Batch
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.visualization import Visualizer
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import nn

from anomalib_ot.decide.post_processor import ConformalPostProcessor
from anomalib_ot.features.extraction import Extraction
from anomalib_ot.features.store import CachePlace
from anomalib_ot.host.checkpoint_rules import CheckpointRules
from anomalib_ot.host.cross_fit import FoldFeatures
from anomalib_ot.host.feature_training import FeatureTraining
from anomalib_ot.host.gradient_free import GradientFree
from anomalib_ot.host.image_features import FeatureBatch
from anomalib_ot.models.detector import Detector
from anomalib_ot.transport import SpatialCost

from .settings import Initialisation, PradotSettings
from .torch_model import PradotModel
from .training import fit_prototypes

logger = logging.getLogger(__name__)

# Share by which the cost must fall, as it varies by up to half a percent with the drawing of batches.
_FALL = 0.005


class Pradot(Detector, FeatureTraining, GradientFree, AnomalibModule):  # type: ignore[misc]  # as anomalib's own models
    """Prototype-based anomaly detection with optimal transport.

    One training learns global (α = 0) and local (α > 0) prototypes on all layers. The backbone is frozen: the features
    of the training images are extracted once and cached, so that an epoch consists of transport only. Equations are
    those of the paper.

    Args:
        backbone: Name of any timm model, or a folder that timm saved, as ``local-dir:PATH`` or as a ``Path``.
        layers: Layers of the backbone to take features from. By default those that suit it, see
            :mod:`anomalib_ot.features.backbone_defaults`: of strides 8 and 16, or at 1/2 and 5/6 of the depth of a
            plain vision transformer.
        pre_trained: Whether to load the backbone's pre-trained weights.
        image_size: Height and width that the default pre-processor resizes to, in pixels. By default 224 × 224;
            448 × 448 with DINOv2 and DINOv3; that of the backbone if it accepts no other.
        prototypes_per_cell: Prototypes in each cell of a feature map, n: one value for all layers, or one per layer.
            Below 1, the prototypes have a coarser grid of their own, with this many cells for each one of the map. By
            default 16 as in the paper, or fewer on maps of more than 14 × 14 cells, for about 3,136 at most.
        alphas: Weights α of the spatial cost, in [0, 1]; 0 ignores positions. Prototypes are learned for each.
        epochs: Largest number of passes over the training images.
        batch_size: Training images in one transport problem, at most their total number; at least
            ``prototypes_per_cell`` is recommended. The default is 32, or all images if there are fewer; the paper has
            64.
        whitened_channels: Whiten the features locally, see :class:`LocalWhitening`. Features with more channels are
            first projected to this many random directions. 0 compares the features as they are (paper).
        global_modes: Largest number of principal components of whole maps that are removed before the whitening, from
            0 to 32. Few images and images that are not aligned have fewer. None without whitening.
        deviation: Also score the distance of each whitened feature from the mean at its cell. Its share of the score
            follows from how aligned the training images are. Needs whitening and ``calibrate``.
        spatial: ``squared`` distance of positions (paper) or ``euclidean`` (authors' code).
        initialisation: Start prototypes at features of training images (``sample``), at N(0, 1) (``normal``, paper) or
            at U(0, 1) (``uniform``, authors' code).
        ema_rate: η of eq. 5, the share of a prototype that a step keeps, in [0, 1].
        ema_warm_up: Keep min(η, t / (t + 1)) in step t. Early prototypes are then the mean of the start and all
            barycentres so far, and the start is forgotten within a few steps. The paper keeps η from the first step.
        epsilon: Entropic regularisation ε of eq. 4, positive.
        sinkhorn_iterations: Largest number of Sinkhorn iterations in a step.
        sinkhorn_tolerance: L1 error of the marginals at which the iterations stop; 0 runs all of them.
        free_coordinates: Move the prototypes' coordinates to the barycentre of the coordinates that are sent to them,
            as the authors' code can.
        normalize_score: Divide both costs by their maxima over the image (authors' code), instead of the plain cost of
            eq. 1 as in eq. 6 (paper).
        calibrate: Weight the maps of all layers and α by the inverse of the scores of normal images, instead of equally
            (paper).
        compress: After training, drop prototypes while no cell of a training image scores more than
            ``compress_tolerance`` higher.
        compress_tolerance: Increase of a score that compression allows, as a share of the highest score of its image,
            at least 0. A larger value leaves fewer prototypes, which score faster.
        smoothing: Standard deviation of the Gaussian that smooths the anomaly map, in pixels; 0 for none (paper).
        transport_memory: Memory for the transport's similarities and kernel, in GiB, positive; see
            :class:`anomalib_ot.transport.Workspace`. Where they do not fit, they are rounded, or computed again on each
            use.
        validation_fraction: Fraction of the training images that is held out to measure the transport cost, in [0, 1).
            The prototypes with the lowest cost are kept. The paper holds out none, the authors' code 0.2.
        patience: Training stops after this many epochs in which the transport cost did not fall by more than 0.5 %.
        calibration_folds: Folds of the training images whose scores set the threshold. Each image is scored by a model
            that was fitted on the other folds. 0 takes the scores of the validation images. So do fewer than two images
            a fold, training without a feature cache, and training with several processes.
        feature_cache: Where to keep the features: ``device``, ``cpu``, ``disk`` or ``none``. ``auto`` takes the first
            of these in which they fit.
        cache_budget: Fraction of the free memory that ``feature_cache="auto"`` may use, in (0, 1].
        extraction: Extract the features of training images with ``torch`` or ``openvino``. ``auto`` takes OpenVINO
            where it is installed and saves time.
        seed: Seed of all random numbers of a training, so that the same images give the same model. How a data module
            divides its images follows from its own seed. By default, the numbers are those that the caller has seeded;
            anomalib's command ignores its own ``seed_everything``.
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
        >>> from anomalib_ot import Pradot
        >>> engine = Engine()
        >>> engine.train(Pradot(), datamodule=MVTecAD(category="bottle"))  # doctest: +SKIP
    """

    torch_model = PradotModel
    model: PradotModel
    settings: PradotSettings
    views = "anomalib_ot.models.pradot.views"
    early_stopping_keys = ("pradot", "lowest_cost", "epochs_since", "best_prototypes")
    checkpoint_rules = CheckpointRules(
        PradotSettings,
        learned=("prototypes",),
        marks=("model.prototypes.",),
        before={"global_modes": 0, "deviation": False},
    )

    def __init__(
        self,
        backbone: str | Path = PradotSettings.backbone,
        layers: Sequence[str] | None = PradotSettings.layers,
        pre_trained: bool = PradotSettings.pre_trained,
        image_size: tuple[int, int] | None = PradotSettings.image_size,
        prototypes_per_cell: int | float | Sequence[float] | None = PradotSettings.prototypes_per_cell,  # noqa: PYI041 - jsonargparse keeps an int an int
        alphas: Sequence[float] = PradotSettings.alphas,
        epochs: int = PradotSettings.epochs,
        batch_size: int | None = PradotSettings.batch_size,
        whitened_channels: int = PradotSettings.whitened_channels,
        global_modes: int = PradotSettings.global_modes,
        deviation: bool = PradotSettings.deviation,
        spatial: SpatialCost = PradotSettings.spatial,
        initialisation: Initialisation = PradotSettings.initialisation,
        ema_rate: float = PradotSettings.ema_rate,
        ema_warm_up: bool = PradotSettings.ema_warm_up,
        epsilon: float = PradotSettings.epsilon,
        sinkhorn_iterations: int = PradotSettings.sinkhorn_iterations,
        sinkhorn_tolerance: float = PradotSettings.sinkhorn_tolerance,
        free_coordinates: bool = PradotSettings.free_coordinates,
        normalize_score: bool = PradotSettings.normalize_score,
        calibrate: bool = PradotSettings.calibrate,
        compress: bool = PradotSettings.compress,
        compress_tolerance: float = PradotSettings.compress_tolerance,
        smoothing: float = PradotSettings.smoothing,
        transport_memory: float = PradotSettings.transport_memory,
        validation_fraction: float = PradotSettings.validation_fraction,
        patience: int = PradotSettings.patience,
        calibration_folds: int = PradotSettings.calibration_folds,
        feature_cache: CachePlace = PradotSettings.feature_cache,
        cache_budget: float = PradotSettings.cache_budget,
        extraction: Extraction = PradotSettings.extraction,
        seed: int | None = PradotSettings.seed,
        pre_processor: nn.Module | bool = True,
        post_processor: ConformalPostProcessor | PostProcessor | nn.Module | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        self.settings = settings = PradotSettings.of(locals())
        # The host stores the arguments in checkpoints as they are here: names, not paths, and no None.
        backbone, layers, image_size = settings.backbone, settings.layers, settings.image_size
        super().__init__(pre_processor, post_processor, evaluator, visualizer)
        # Distributed training needs a parameter with a gradient.
        self.anchor = nn.Parameter(torch.zeros(()))
        self._epoch_costs: list[float] = []

    def on_fit_start(self) -> None:
        """Extract the features of the training images, unless they change between epochs or training has ended."""
        if self.resumes_what_has_ended():
            return
        self.extract_training_features(self.model.feature_extractor)
        self.model.fit_whitening(self.features_on_device(self.training_features.trained_on, "Fitting the whitening"))
        if not self.model.is_initialised:
            self.model.initialise(next(self.features_on_device(self.training_features.trained_on, "Starting")))

    def on_train_epoch_start(self) -> None:
        """Clear the costs of the previous epoch."""
        self._epoch_costs = []

    def training_step(self, batch: Batch | FeatureBatch, *args, **kwargs) -> STEP_OUTPUT:
        """Move the prototypes towards the barycentres of a batch.

        Args:
            batch: Images, or their cached features.
            *args: Unused.
            **kwargs: Unused.

        Returns:
            The transport cost, as a loss without effect on any weight.
        """
        del args, kwargs
        cost = self.model.update(self.features_of(batch))
        self._epoch_costs.append(cost)
        self.log("train_transport_cost", cost, on_step=False, on_epoch=True, prog_bar=True, batch_size=1)
        return cost + 0 * self.anchor

    def on_train_epoch_end(self) -> None:
        """Decide whether this was the last epoch."""
        if self._epoch_costs:
            self._track(fmean(self._epoch_costs))
        super().on_train_epoch_end()

    def _track(self, cost: float) -> None:
        if self.training_features.held_out is not None:
            cost = self._held_out_cost(self.training_features.held_out)
            self.log("val_transport_cost", cost, prog_bar=True, batch_size=1)
        if self.stopped_falling(cost, _FALL):
            logger.info("Transport cost %.5f stopped falling after %d epochs.", cost, self.current_epoch + 1)
            self.trainer.should_stop = True

    def finished_part(self) -> nn.Module:
        """The prototypes."""
        return self.model.prototypes

    def finish(self) -> None:
        """Restore the best prototypes, then compress them and weight their maps by the training images."""
        self.restore_best()
        if report := self.model.finish(partial(self.features_on_device, self.training_features.trained_on)):
            logger.info("%s", report)

    def fit_fold(self, features: FoldFeatures) -> PradotModel:
        """Fit a model on some of the training images, with as many epochs as this one, or as it would have."""
        model: PradotModel = self.new_model()
        epochs = self.settings.epochs if self.is_finished is None else self.current_epoch + 1
        fit_prototypes(model, features.in_order, map(features.epoch, range(epochs)))
        model.take_scale(self.model)
        return model

    def on_fit_end(self) -> None:
        """Release the cached features and the memory for transport."""
        super().on_fit_end()
        self.model.workspace.clear()

    def _held_out_cost(self, held_out: Iterable[FeatureBatch]) -> float:
        return fmean(
            self.model.transport_cost(features) for features in self.features_on_device(held_out, "Validating")
        )

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """Arguments that the model passes to the trainer."""
        return {
            "max_epochs": self.settings.epochs,
            "num_sanity_val_steps": 0,
        }
