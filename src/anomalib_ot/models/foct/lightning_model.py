"""FOCT for anomalib: few-shot detection with foreground-aware online conditional transport.

Paper: FOCT: Few-shot industrial anomaly detection with foreground-aware online conditional transport, ACM Multimedia
2024.
"""

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import torch
from anomalib import LearningType
from anomalib.data import Batch
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule, MemoryBankMixin
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn

from anomalib_ot.export.checked import CheckedExport
from anomalib_ot.features.backbones import backbone_name, denormalize, resize_and_normalize
from anomalib_ot.host.checkpoints import CheckpointRules, SafeCheckpoints
from anomalib_ot.host.feature_cache import check_finite
from anomalib_ot.host.finishing import validate_now
from anomalib_ot.host.gradient_free import GradientFree
from anomalib_ot.host.held_out import HoldsOut
from anomalib_ot.host.picture_check import ChecksPictures
from anomalib_ot.host.verdicts import Verdicts
from anomalib_ot.transport import NavigatorStart

from .foreground import create_foreground
from .settings import FoctSettings, ForegroundName, Measure, Prompt
from .torch_model import FoctModel

logger = logging.getLogger(__name__)

# Support images beyond which every query takes long.
_MANY = 32


class _BrokenOff(Callback):
    """Tells Foct of an exception, of which the trainer tells callbacks alone."""

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Tell it."""
        del trainer, exception
        pl_module.on_exception()


class Foct(  # type: ignore[misc]  # as anomalib's memory banks
    CheckedExport, Verdicts, SafeCheckpoints, ChecksPictures, HoldsOut, GradientFree, MemoryBankMixin, AnomalibModule
):
    """Few-shot anomaly detection with conditional transport and an online memory.

    Made for one to a few normal images; ``FewShot`` draws them from any data module.

    Args:
        backbone: Name of a timm model, or ``local-dir:PATH`` or a ``Path`` for a folder that timm saved.
        layers: Layers of the backbone whose features are concatenated.
        pre_trained: Whether to load the backbone's pre-trained weights.
        image_size: Height and width that the default pre-processor resizes to, in pixels.
        measure: Score by conditional ``transport``, or by the ``nearest`` feature of the memory.
        online: Let queries teach the memory (paper): the result of an image then depends on those before it. Otherwise
            scores are independent of each other.
        keep_memory: Keep what queries taught from one test or prediction to the next, rather than start afresh.
        foreground: Finds the product in the support images: ``pca``, the first principal component of the features;
            ``sam``, segment-anything (paper); or ``none``.
        sam_checkpoint: File of SAM's weights.
        sam_prompt: ``box`` around the image or ``point`` at its centre.
        rotations: Views of each support image, turned by equal angles, of which the one nearest to the query counts; 1
            for the image alone (paper).
        position_weight: Weight of positions in the cost; 0 ignores them (paper).
        foreground_ratio: Share of the foreground features that the memory keeps, in (0, 1].
        background_ratio: Share of the background features that the memory keeps, in (0, 1].
        capacity: Features at which the episodic memory is compressed.
        compression: Share of the capacity that compression keeps, in (0, 1).
        top_foreground: Largest number of foreground features that a query adds to the episodic memory.
        top_background: Largest number of background features that it adds.
        rho: Weight of the forward transport in the objective, in [0, 1].
        navigator_start: Start the navigator at the ``metric`` of the features, or at ``random`` (paper).
        navigator_hidden: Hidden units of the navigator.
        temperature: Temperature of the start ``metric``.
        learning_rate: Learning rate of the navigator; 1e-4 in the paper.
        support_steps: Largest number of steps that fit the navigator to each support image; 0 in the paper.
        query_steps: Largest number of steps that fit it to each query; 100 in the paper.
        fit_features: Features of memory and query that such a fit samples; 0 for all (paper).
        tolerance: Relative change of the objective at which a fit ends; 0 takes all steps (paper).
        smoothing: Standard deviation of the Gaussian that smooths the anomaly map, in pixels.
        pre_processor: Pre-processor, or whether to use the default.
        post_processor: Post-processor, or whether to use the default.
        evaluator: Evaluator, or whether to use the default.
        visualizer: Visualizer, or whether to use the default.

    Raises:
        TypeError: If the backbone is neither a name nor a path.
        ValueError: If an argument is out of its range or the backbone lacks a layer.

    Example:
        >>> from anomalib.data import MVTecAD
        >>> from anomalib.engine import Engine
        >>> from anomalib_ot import FewShot, Foct
        >>> data = FewShot(MVTecAD(category="bottle"), shots=4)
        >>> Engine().train(Foct(), datamodule=data)  # doctest: +SKIP
    """

    model: FoctModel
    settings: FoctSettings
    views = "anomalib_ot.models.foct.views"
    checkpoint_rules = CheckpointRules(
        FoctSettings,
        learned=("semantic", "episodic", "centre", "scale"),
        marks=("model.semantic.",),
    )

    def __init__(
        self,
        backbone: str | Path = FoctSettings.backbone,
        layers: Sequence[str] = FoctSettings.layers,
        pre_trained: bool = FoctSettings.pre_trained,
        image_size: tuple[int, int] = FoctSettings.image_size,
        measure: Measure = FoctSettings.measure,
        online: bool = FoctSettings.online,
        keep_memory: bool = FoctSettings.keep_memory,
        foreground: ForegroundName = FoctSettings.foreground,
        sam_checkpoint: Path | str | None = FoctSettings.sam_checkpoint,
        sam_prompt: Prompt = FoctSettings.sam_prompt,
        rotations: int = FoctSettings.rotations,
        position_weight: float = FoctSettings.position_weight,
        foreground_ratio: float = FoctSettings.foreground_ratio,
        background_ratio: float = FoctSettings.background_ratio,
        capacity: int = FoctSettings.capacity,
        compression: float = FoctSettings.compression,
        top_foreground: int = FoctSettings.top_foreground,
        top_background: int = FoctSettings.top_background,
        rho: float = FoctSettings.rho,
        navigator_start: NavigatorStart = FoctSettings.navigator_start,
        navigator_hidden: int = FoctSettings.navigator_hidden,
        temperature: float = FoctSettings.temperature,
        learning_rate: float = FoctSettings.learning_rate,
        support_steps: int = FoctSettings.support_steps,
        query_steps: int = FoctSettings.query_steps,
        fit_features: int = FoctSettings.fit_features,
        tolerance: float = FoctSettings.tolerance,
        smoothing: float = FoctSettings.smoothing,
        pre_processor: nn.Module | bool = True,
        post_processor: PostProcessor | nn.Module | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        # Settings and checkpoints hold names, not paths.
        backbone = backbone_name(backbone)
        settings = FoctSettings.of(locals())
        if pre_processor is True:
            pre_processor = self.configure_pre_processor(image_size, backbone)
        super().__init__(
            pre_processor=pre_processor,
            post_processor=post_processor,
            evaluator=evaluator,
            visualizer=visualizer,
        )
        self.record_backbone(backbone)
        self.settings = settings
        self.foreground = create_foreground(settings)
        self.model = FoctModel(settings)
        self._support: list[Tensor] = []
        # Leaves the model as it was before validation.
        self._validation = ExitStack()
        self._is_validated = False

    @staticmethod
    def configure_pre_processor(
        image_size: tuple[int, int] | None = None,
        backbone: str | Path = "wide_resnet50_2",
    ) -> PreProcessor:
        """Resize and normalise with the backbone's own mean and standard deviation.

        Args:
            image_size: Height and width, in pixels. Defaults to the paper's 336 × 336.
            backbone: Backbone whose data configuration to use.

        Returns:
            The pre-processor.
        """
        return resize_and_normalize(image_size or (336, 336), backbone)

    def on_fit_start(self) -> None:
        """Load what finds the foreground, before any image is looked at.

        Raises:
            ModuleNotFoundError: If ``foreground="sam"`` and segment-anything is not installed.
            FileNotFoundError: If ``foreground="sam"`` and there is no checkpoint.
        """
        self.foreground.load()

    def on_train_start(self) -> None:
        """Forget the support set of an earlier fit."""
        self._support, self._is_validated = [], False
        self._is_fitted = torch.tensor([False], device=self.device)

    def training_step(self, batch: Batch, *args, **kwargs) -> STEP_OUTPUT:
        """Collect the support images.

        Args:
            batch: Images.
            *args: Unused.
            **kwargs: Unused.

        Returns:
            A loss that moves nothing.
        """
        del args, kwargs
        images = batch.image
        assert images is not None  # noqa: S101 - a data loader's batches have images
        self.model.anomaly_map_generator.check_size(images.shape[-2:])
        check_finite({"the backbone": self.model(images)}, getattr(batch, "image_path", None))
        self._support.append(images)
        return torch.zeros((), requires_grad=True, device=self.device)

    def fit(self) -> None:
        """Fill the memory with the support set.

        Raises:
            RuntimeError: If there is none.
        """
        if not self._support:
            msg = "Foct has no support set yet: fit it, or load a checkpoint with ckpt_path"
            raise RuntimeError(msg)
        images = torch.cat(self._support)
        self._support = []
        if len(images) > _MANY:
            logger.warning(
                "Foct compares every query with each of %d support images; it is made for a few. Draw some with "
                "FewShot, or train Pradot.",
                len(images),
            )
        self.model.fit(images, denormalize(images, self.pre_processor), self.foreground)

    def validation_step(self, batch: Batch, *args, **kwargs) -> STEP_OUTPUT:
        """Score a batch, one image after the other.

        Args:
            batch: Images.
            *args: Unused.
            **kwargs: Unused.

        Returns:
            The batch with its anomaly maps and image scores.
        """
        del args, kwargs
        return batch.update(**self.model(batch.image)._asdict())

    def on_validation_start(self) -> None:
        """Start afresh; what validation teaches is forgotten after it."""
        super().on_validation_start()
        self._validation.enter_context(self.model.forgetting())
        self._is_validated = True

    def on_validation_epoch_end(self) -> None:
        """Forget the images of the validation set."""
        self._validation.close()

    def on_exception(self) -> None:
        """Forget the images of a validation that was broken off."""
        self._validation.close()

    def configure_callbacks(self) -> list[Callback]:
        """Those of the host, and what tells the model that a run was broken off."""
        return [_BrokenOff(), *super().configure_callbacks()]

    def on_train_epoch_end(self) -> None:
        """Validate where the trainer did not, as it would only in a later epoch: there is but one."""
        if not self._is_validated:
            validate_now(self.trainer)
        super().on_train_epoch_end()

    def rollback(self, queries: int) -> None:
        """Take back what the last queries of an online model taught, as if they had not been seen.

        A checkpoint has the memory as it stands, not what came before it. Unless ``keep_memory``, each test and each
        prediction starts afresh anyway.

        Args:
            queries: Number of images, up to the last 100 since the memory was last empty.

        Raises:
            ValueError: If there are not as many.

        Example:
            >>> model = Foct(online=True, keep_memory=True)  # doctest: +SKIP
            >>> engine.predict(model, data_path="batch_of_bad_parts")  # doctest: +SKIP
            >>> model.rollback(20)  # doctest: +SKIP
        """
        self.model.rollback(queries)

    def on_test_start(self) -> None:
        """Start afresh, unless the memory is kept."""
        if not self.settings.keep_memory:
            self.model.reset()

    def on_predict_start(self) -> None:
        """Start afresh, unless the memory is kept."""
        if not self.settings.keep_memory:
            self.model.reset()

    def frozen(self) -> AbstractContextManager[None]:
        """Memory and navigator as they stand, which no query teaches any more."""
        return self.model.frozen()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take settings that change scores, and a memory of which nothing can be taken back.

        Raises:
            ValueError: If the checkpoint is of another model, or does not fit.
        """
        super().on_load_checkpoint(checkpoint)
        self.model.earlier.clear()

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """Arguments of the trainer that the model sets."""
        return {"max_epochs": 1, "num_sanity_val_steps": 0, "devices": 1}

    @property
    def learning_type(self) -> LearningType:
        """One-class, as Foct learns from normal images. For what anomalib calls few-shot, it would not fit at all."""
        return LearningType.ONE_CLASS
