"""Duo for anomalib: Pradot and WtFlow in one model."""

import logging
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.visualization import Visualizer
from torch import nn
from torch.utils.data import DataLoader

from anomalib_ot.decide.post_processor import ConformalPostProcessor
from anomalib_ot.features.extraction import Extraction, FeatureMaps
from anomalib_ot.features.store import CachePlace, FeatureDataset
from anomalib_ot.host.calibration import CalibrationScores
from anomalib_ot.host.checkpoint_rules import CheckpointRules
from anomalib_ot.host.cross_fit import FoldFeatures, fold_scores, left_out, rows_of
from anomalib_ot.host.seeding import own_seed, user_seed
from anomalib_ot.models.detector import Detector
from anomalib_ot.models.pradot import PradotModel
from anomalib_ot.models.pradot.training import fit_prototypes
from anomalib_ot.models.wt_flow import WtFlowModel
from anomalib_ot.models.wt_flow.flow_training import FlowTraining
from anomalib_ot.transport import Processes

from .settings import DuoSettings
from .torch_model import DuoModel, PartScores

logger = logging.getLogger(__name__)

# Images whose features weigh the parts if there is no cache.
_MOST_WITHOUT_CACHE = 64


class Duo(Detector, FlowTraining, AnomalibModule):  # type: ignore[misc]  # as anomalib's own models
    """Anomaly detection by the prototypes of Pradot and the flow of WtFlow, on the features of one backbone.

    When the training starts, the features of the training images are extracted and cached, and the prototypes are
    fitted. The steps of the trainer train the flow. When the training ends, models that are fitted on the other folds
    score each training image. The spread of these scores weighs the maps of the two parts, and the scores set the
    threshold.

    Args:
        backbone: Name of any timm model, or a folder that timm saved, as ``local-dir:PATH`` or as a ``Path``.
        layers: Layers of the backbone to take features from. The prototypes have all of them, the flow the last one. By
            default those that suit the backbone, see :mod:`anomalib_ot.features.backbone_defaults`: of strides 8 and
            16, or at 1/2 and 5/6 of the depth of a plain vision transformer.
        pre_trained: Whether to load the backbone's pre-trained weights.
        image_size: Height and width that the default pre-processor resizes to, in pixels. By default 224 × 224;
            448 × 448 with DINOv2 and DINOv3; that of the backbone if it accepts no other.
        smoothing: Standard deviation of the Gaussian that smooths the map of the prototypes, in pixels; 0 for none. The
            map of the flow is not smoothed.
        batch_size: Training images in a batch, at most their total number. The default is 16, or all images if there
            are fewer.
        validation_fraction: Fraction of the training images that is held out, in [0, 1). The training of the flow stops
            when their loss no longer decreases, and the weights with the lowest loss are kept. 0 holds out none.
        patience: The training stops after this many measurements of the held-out loss, one every 25 steps, without a
            lower loss.
        calibration_folds: Folds of the training images whose scores weigh the parts and set the threshold. Each image
            is scored by a model that was fitted on the other folds. 0 takes three folds for the weights, and the scores
            of the validation images for the threshold. Fewer than two images a fold, training without a feature cache
            and training with several processes take these scores too, and as many folds for the weights as images
            allow.
        feature_cache: Where to keep the features: ``device``, ``cpu``, ``disk`` or ``none``. ``auto`` takes the first
            of these in which they fit.
        cache_budget: Fraction of the free memory that ``feature_cache="auto"`` may use, in (0, 1].
        extraction: Extract the features of training images with ``torch`` or ``openvino``. ``auto`` takes OpenVINO
            where it is installed and saves time.
        pradot: Settings that only :class:`~anomalib_ot.Pradot` has, by name; by default its own defaults. It is fitted
            for all of its ``epochs``.
        wt_flow: Settings that only :class:`~anomalib_ot.WtFlow` has, likewise, without ``top_share``.
        seed: Seed of all random numbers of a training, so that the same images give the same model. How a data module
            divides its images follows from its own seed. By default, the numbers are those that the caller has seeded;
            anomalib's command ignores its own ``seed_everything``.
        pre_processor: Pre-processor; True for the default, False for none.
        post_processor: Post-processor; True for the default, False for none.
        evaluator: Evaluator; True for the default, False for none.
        visualizer: Visualizer; True for the default, False for none.

    Raises:
        TypeError: If the backbone is neither a name nor a path, or settings of a part are no dictionary.
        ValueError: If an argument is out of range, a part lacks a setting, or the backbone lacks a layer.

    Example:
        >>> from anomalib.data import MVTecAD
        >>> from anomalib.engine import Engine
        >>> from anomalib_ot import Duo
        >>> Engine().train(Duo(), datamodule=MVTecAD(category="bottle"))  # doctest: +SKIP
    """

    torch_model = DuoModel
    model: DuoModel
    settings: DuoSettings
    views = "anomalib_ot.models.duo.views"
    checkpoint_rules = CheckpointRules(
        DuoSettings,
        parts=("model", "trained"),
        learned=("prototypes", "normalization", "noise"),
    )

    def __init__(
        self,
        backbone: str | Path = DuoSettings.backbone,
        layers: Sequence[str] | None = DuoSettings.layers,
        pre_trained: bool = DuoSettings.pre_trained,
        image_size: tuple[int, int] | None = DuoSettings.image_size,
        smoothing: float = DuoSettings.smoothing,
        batch_size: int | None = DuoSettings.batch_size,
        validation_fraction: float = DuoSettings.validation_fraction,
        patience: int = DuoSettings.patience,
        calibration_folds: int = DuoSettings.calibration_folds,
        feature_cache: CachePlace = DuoSettings.feature_cache,
        cache_budget: float = DuoSettings.cache_budget,
        extraction: Extraction = DuoSettings.extraction,
        pradot: dict[str, Any] | None = DuoSettings.pradot,
        wt_flow: dict[str, Any] | None = DuoSettings.wt_flow,
        seed: int | None = DuoSettings.seed,
        pre_processor: nn.Module | bool = True,
        post_processor: ConformalPostProcessor | PostProcessor | nn.Module | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        self.settings = settings = DuoSettings.of(locals())
        # The host stores the arguments in checkpoints as they are here: names, not paths, and no None.
        backbone, layers, image_size = settings.backbone, settings.layers, settings.image_size
        pradot, wt_flow = settings.pradot, settings.wt_flow
        super().__init__(pre_processor, post_processor, evaluator, visualizer)
        self.set_flow_training()

    @property
    def flow(self) -> WtFlowModel:
        """The flow, which the steps of the trainer train."""
        return self.model.wt_flow

    def on_fit_start(self) -> None:
        """Prepare the training of the flow, and fit the prototypes.

        Raises:
            ValueError: As for :meth:`FlowTraining.on_fit_start`.
        """
        super().on_fit_start()
        if self.model.pradot.is_initialised:
            return
        # Replaced once it is fitted, so that a fit that is interrupted before leaves no half of it.
        pradot = PradotModel(self.settings.of_pradot(), self.model.feature_extractor).to(self.device).eval()
        logger.info("Fitting the prototypes for %d epochs.", pradot.settings.epochs)
        in_order = partial(self.features_on_device, self.training_features.trained_on, "Fitting the prototypes")
        fit_prototypes(pradot, in_order, map(self._epoch, range(pradot.settings.epochs)))
        pradot.tiler = self.model.tiler
        self.model.pradot = pradot

    def _epoch(self, number: int) -> Iterator[FeatureMaps]:
        """The batches of an epoch of the prototypes, of which this process has its share."""
        batches = self.training_features.epoch(number)
        for batch in self.features_on_device(batches, f"Fitting the prototypes, epoch {number + 1}"):
            yield {layer: maps[self.trainer.global_rank :: self.trainer.world_size] for layer, maps in batch.items()}

    def fit_fold(self, features: FoldFeatures) -> DuoModel:
        """Fit a model on some of the training images, as this one was fitted on all of them."""
        return self._fit_like(self.model, features)

    def fit_on(self, features: FoldFeatures) -> DuoModel:
        """Fit a model on features outside a training, and weigh its parts by two folds of them."""
        model = self.fit_fold(features)
        scores = left_out(features, 2, lambda rest: self._fit_like(model, rest).part_scores)
        model.weigh(scores, cast("tuple[int, int]", self.settings.image_size))
        return model

    def _fit_like(self, other: DuoModel, features: FoldFeatures) -> DuoModel:
        """Fit a model on some images, on the scale of another one if that is fitted."""
        model: DuoModel = self.new_model()
        self.fit_flow_of_fold(model.wt_flow, features)
        fit_prototypes(model.pradot, features.in_order, map(features.epoch, range(model.pradot.settings.epochs)))
        model.pradot.take_scale(other.pradot)
        return model

    def score_folds(self, features: FoldFeatures, folds: int) -> CalibrationScores:
        """Score each training image by a model that was fitted on the other folds, and weigh the parts by that."""
        scores = left_out(features, folds, self._part_scorer)
        self._weigh(scores)
        rows = (rows_of(self.model.combine(each, self._image_size)) for each in scores)
        return fold_scores(features, folds, rows)

    def _part_scorer(self, features: FoldFeatures) -> Any:
        return self.fit_fold(features).part_scores

    def _weigh(self, scores: Sequence[PartScores]) -> None:
        self.model.weigh(scores, self._image_size)
        # Processes that compute the same may round otherwise.
        self.model.weights = Processes.all().first(self.model.weights)

    def calibrate(self) -> None:
        """Weigh the parts, and calibrate the threshold, by the scores of training images that are left out."""
        super().calibrate()
        if self.calibration_scores is not None:
            return
        try:
            with own_seed(user_seed()):
                self._weigh_alone()
        except Exception as error:
            # Another process would wait for this one.
            if self.trainer.world_size > 1:
                raise
            self.model.weights = torch.full_like(self.model.weights, 0.5)
            logger.warning("The parts have equal weights, as folds failed: %r", error)

    def _weigh_alone(self) -> None:
        """Weigh the parts by folds that do not calibrate the threshold."""
        images = self.training_features.trained_on
        dataset = images.dataset if isinstance(images, DataLoader) else self._first_features()
        features = FoldFeatures(dataset, self.batch_size, self.device, user_seed())
        folds = min(self.settings.calibration_folds or DuoSettings.calibration_folds, len(features))
        if folds > 1:
            self.score_folds(features, folds)
        else:
            with torch.no_grad():
                self._weigh([self.model.part_scores(batch) for batch in features.in_order()])

    def _first_features(self) -> FeatureDataset:
        batches, count = [], 0
        for batch in self.features_on_device(self.training_features.trained_on, "Weighing the parts"):
            batches.append(batch)
            count += len(next(iter(batch.values())))
            if count >= _MOST_WITHOUT_CACHE:
                break
        return FeatureDataset({layer: torch.cat([batch[layer] for batch in batches]) for layer in batches[0]})
