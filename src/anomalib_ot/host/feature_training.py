"""Models whose epochs run over frozen features of the training images."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sized
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from anomalib.data import AnomalibDataModule, Batch, InferenceBatch
from rich.progress import track
from torch import Tensor, nn
from torch.utils.data import DataLoader

from anomalib_ot.features.extraction import FastExtractor, FeatureMaps, extract_by_tiles

from .calibration import CalibrationScores, HasPValues
from .cross_fit import FoldFeatures, cross_fit
from .early_stopping import StopsEarly
from .feature_cache import TrainingFeatures, train_on_features
from .held_out import HoldsOut
from .image_check import ChecksImages, ImageCheck
from .image_features import FeatureBatch, check_finite
from .interruption import Interruptible
from .model_settings import FeatureTrainingSettings
from .seeding import Seeded, own_seed, user_seed

if TYPE_CHECKING:
    from anomalib.models.components import AnomalibModule

    from anomalib_ot.features.anomaly_map import AnomalyMapGenerator

logger = logging.getLogger(__name__)

_FEWEST_IN_FOLD = 2


class FeatureTraining(Interruptible, ChecksImages, Seeded, HoldsOut, StopsEarly):
    """Part of a Lightning model that extracts frozen features once and trains on them.

    The model sets ``settings`` before it calls the constructor, and calls :meth:`extract_training_features` when its
    fit starts. The features are released when the fit ends or fails. The model overrides :meth:`fit_fold`. The torch
    model returns features in training mode, and its method ``score`` scores features.

    Attributes:
        settings: The model's settings.
        torch_model: Class of the torch model.
        batch_size: Number of images in a training batch, if there are as many.
        training_features: Features of the training images, during a fit.
        calibration_scores: Scores of training images by models that were fitted without them, from the last fit; None
            if the validation images calibrate.
    """

    device: Any
    model: nn.Module
    settings: FeatureTrainingSettings
    torch_model: ClassVar[Any]
    pre_processor: Any
    calibration_scores: CalibrationScores | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.batch_size = self.settings.batch_size or self.settings.usual_batch_size
        self.training_features = TrainingFeatures(())
        self._extractor: FastExtractor | None = None
        # Height and width of the pre-processed training images.
        self._image_size = torch.Size()

    def resumes_what_has_ended(self) -> bool:
        """Stop the trainer at once if it resumes a training that has ended, whose last checkpoint is the result.

        Returns:
            Whether the trainer stops.
        """
        # Without a checkpoint, a fitted model continues to learn. Checkpoints of the first format do not record whether
        # they are finished; converged ones are.
        stops = self.has_converged and self.is_finished is not False and self.trainer.ckpt_path is not None
        self.trainer.should_stop |= stops
        return stops

    def extract_training_features(self, extractor: nn.Module) -> None:
        """Extract the features of the training images, unless they change from epoch to epoch.

        Args:
            extractor: Maps images to the feature map of each layer.

        Raises:
            ValueError: As for :func:`train_on_features`.
        """
        data = getattr(self.trainer, "datamodule", None)
        count = len(data.train_data) if isinstance(data, AnomalibDataModule) else None
        self._extractor = FastExtractor(extractor, self.settings.extraction, count)
        self.training_features = train_on_features(
            self.trainer,
            self._extract,
            getattr(self.pre_processor, "transform", None),
            self._check_images,
            place=self.settings.feature_cache,
            budget=self.settings.cache_budget,
            batch_size=self.batch_size,
            takes_fewer=self.settings.batch_size is None,
            device=self.device,
            hold_out=self.settings.validation_fraction,
        )

    def new_model(self) -> Any:
        """A new torch model in evaluation mode, which shares the feature extractor of this one."""
        return type(self).torch_model(self.settings, self.model.feature_extractor).to(self.device).eval()

    def fit_fold(self, features: FoldFeatures) -> nn.Module:
        """Fit a new torch model on some of the training images, as this one was or would be fitted on all of them.

        Args:
            features: Features of these images.

        Returns:
            The model, in evaluation mode. It shares the feature extractor of this one.
        """
        raise NotImplementedError

    def fit_on(self, features: FoldFeatures) -> nn.Module:
        """Fit a new torch model on features outside a training, with all that its scores need.

        Args:
            features: Features of the images.

        Returns:
            As :meth:`fit_fold`.
        """
        return self.fit_fold(features)

    def calibrate(self) -> None:
        """Score the training images by models that were fitted without them, unless the validation images calibrate."""
        self.calibration_scores = None
        folds = self.settings.calibration_folds
        if not (folds and self.trainer.enable_validation and isinstance(cast("Any", self).post_processor, HasPValues)):
            return
        loader = self.training_features.trained_on
        if reason := _why_no_folds(loader, folds, self.trainer.world_size):
            logger.info("The scores of the validation images set the threshold, not those of folds: %s.", reason)
            return
        dataset = cast("DataLoader", loader).dataset
        features = FoldFeatures(dataset, self.batch_size, self.device, user_seed())
        logger.info(
            "Fitting %d models, each without one fold of the training images, to calibrate the threshold.", folds
        )
        try:
            # The seed of the user decides the folds and their models, which change no other random numbers.
            with own_seed(user_seed()):
                self.calibration_scores = self.score_folds(features, folds)
        except Exception as error:  # noqa: BLE001 - a training must not fail at its end
            logger.warning("The scores of the validation images set the threshold, as folds failed: %r", error)

    def score_folds(self, features: FoldFeatures, folds: int) -> CalibrationScores:
        """Score each training image by a model that was fitted on the other folds."""
        return cross_fit(features, folds, self._scorer_of_fold)

    def _scorer_of_fold(self, features: FoldFeatures) -> Callable[[FeatureMaps], InferenceBatch]:
        model: Any = self.fit_fold(features)
        return partial(model.score, size=self._image_size)

    def on_fit_end(self) -> None:
        """Release the cached features."""
        cast("AnomalibModule", super()).on_fit_end()
        self.training_features = TrainingFeatures(())
        self._extractor = None

    def on_exception(self) -> None:
        """Release the cached features."""
        self.on_fit_end()

    def features_on_device(self, batches: Iterable[FeatureBatch], task: str) -> Iterator[FeatureMaps]:
        """Iterate over features on the device of the model.

        Args:
            batches: Features, of ``training_features``.
            task: Label of the progress bar, which is shown for cached features; extraction shows its own.

        Yields:
            Feature map (B, D, H, W) of each layer.
        """
        hides_progress = not isinstance(batches, DataLoader) or self.trainer.progress_bar_callback is None
        for batch in track(batches, task, transient=True, disable=hides_progress):
            yield {layer: maps.to(self.device) for layer, maps in batch.features.items()}

    def features_of(self, batch: Batch | FeatureBatch) -> FeatureMaps:
        """Feature map (B, D, H, W) of each layer for a training batch of images or of cached features.

        Raises:
            ValueError: If features are not finite.
        """
        if isinstance(batch, FeatureBatch):
            return batch.features
        features = self.model(batch.image)
        check_finite(features, getattr(batch, "image_path", None))
        return features

    def _check_images(self, batch: Batch) -> None:
        for check in self.trainer.callbacks:
            if isinstance(check, ImageCheck):
                check.check_batch(batch, self.trainer.state.stage)

    @torch.no_grad()
    def _extract(self, images: Tensor) -> FeatureMaps:
        assert self._extractor is not None  # noqa: S101 - created when the fit starts
        with self.trainer.precision_plugin.forward_context():
            transform = getattr(self.pre_processor, "transform", None)
            images = transform(images) if transform else images
            self._image_size = images.shape[-2:]
            # Check before training, as no map is computed until its end.
            cast("AnomalyMapGenerator", self.model.anomaly_map_generator).check_size(images.shape[-2:])
            return extract_by_tiles(self._extractor, images, getattr(self.model, "tiler", None))


def _why_no_folds(features: Iterable[FeatureBatch], folds: int, processes: int) -> str | None:
    """Why there are no folds, or None."""
    if not isinstance(features, DataLoader):
        return "the features of the training images are not cached"
    if processes > 1:
        return f"{processes} processes train"
    count = len(cast("Sized", features.dataset))
    if count < _FEWEST_IN_FOLD * folds:
        return f"{count} training images are fewer than {_FEWEST_IN_FOLD} in each of {folds} folds"
    return None
