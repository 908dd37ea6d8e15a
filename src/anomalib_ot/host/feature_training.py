"""Models whose epochs run over frozen features of the training images."""

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from anomalib.data import AnomalibDataModule, Batch
from lightning.pytorch import Callback, Trainer
from rich.progress import track
from torch import Tensor, nn
from torch.utils.data import DataLoader

from anomalib_ot.features.extraction import FastExtractor, FeatureMaps, extract_by_tiles

from .feature_cache import FeatureBatch, TrainingFeatures, check_finite, train_on_features
from .finishing import Finishing
from .held_out import HoldsOut
from .image_check import ChecksImages, ImageCheck
from .model_settings import FeatureTrainingSettings

if TYPE_CHECKING:
    from anomalib.models.components import AnomalibModule

    from anomalib_ot.features.anomaly_map import AnomalyMapGenerator


class FeatureTraining(ChecksImages, HoldsOut, Finishing):
    """Part of a Lightning model that extracts frozen features once and trains on them.

    The model calls :meth:`set_feature_training` in its constructor, :meth:`extract_training_features` when its fit
    starts, and :meth:`forget_training_features` when its fit ends. A failed fit releases the features too. The torch
    model returns features in training mode.

    Attributes:
        settings: The model's settings.
        training_features: Features of the training images, during a fit.
    """

    device: Any
    model: nn.Module
    settings: FeatureTrainingSettings
    pre_processor: Any

    def set_feature_training(self, settings: FeatureTrainingSettings, usual_batch_size: int) -> None:
        """Set how features are extracted and cached.

        Args:
            settings: The model's settings.
            usual_batch_size: Number of images in a training batch if the settings give none and there are as many.
        """
        self.settings = settings
        self.batch_size = settings.batch_size or usual_batch_size
        self.training_features = TrainingFeatures(())
        self._extractor: FastExtractor | None = None

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

    def configure_callbacks(self) -> list[Callback]:
        """The callbacks of the host, and one that releases the features if a fit fails."""
        callbacks = cast("AnomalibModule", super()).configure_callbacks()
        return [*cast("Sequence[Callback]", callbacks), _FeatureRelease()]

    def forget_training_features(self) -> None:
        """Release the cached features."""
        self.training_features = TrainingFeatures(())
        self._extractor = None

    def features_on_device(self, batches: Iterable[FeatureBatch], task: str) -> Iterator[FeatureMaps]:
        """Iterate over features on the device of the model.

        Args:
            batches: Features, of ``training_features``.
            task: Label of the progress bar, which is shown if the features are not cached and extracted again.

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
            # Check before training, as no map is computed until its end.
            cast("AnomalyMapGenerator", self.model.anomaly_map_generator).check_size(images.shape[-2:])
            return extract_by_tiles(self._extractor, images, getattr(self.model, "tiler", None))


class _FeatureRelease(Callback):
    """Releases the features of a fit that failed or was interrupted, which Lightning reports only to callbacks."""

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        del trainer, exception
        pl_module.on_fit_end()
