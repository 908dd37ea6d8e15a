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
from anomalib.data import Batch
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule, MemoryBankMixin
from anomalib.post_processing import PostProcessor
from anomalib.visualization import Visualizer
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn

from anomalib_ot.decide.post_processor import ConformalPostProcessor
from anomalib_ot.features.preprocessing import denormalize
from anomalib_ot.host.calibration import SUPPORT, CalibrationScores, HasPValues, score_rows
from anomalib_ot.host.checkpoint_rules import CheckpointRules
from anomalib_ot.host.finishing import validate_now
from anomalib_ot.host.gradient_free import GradientFree
from anomalib_ot.host.held_out import HoldsOut
from anomalib_ot.host.image_check import ChecksImages
from anomalib_ot.host.image_features import check_finite
from anomalib_ot.host.interruption import Interruptible
from anomalib_ot.host.seeding import Seeded
from anomalib_ot.models.detector import Detector
from anomalib_ot.transport import NavigatorStart

from .foreground import create_foreground
from .settings import FoctSettings, ForegroundName, Measure, Prompt
from .torch_model import FoctModel

logger = logging.getLogger(__name__)

# With more support images, every query takes long.
_MANY = 32


class Foct(  # type: ignore[misc]  # as anomalib's memory banks
    Detector,
    Interruptible,
    ChecksImages,
    Seeded,
    HoldsOut,
    GradientFree,
    MemoryBankMixin,
    AnomalibModule,
):
    """Few-shot anomaly detection with conditional transport and an online memory.

    For one to a few normal images, which ``FewShot`` draws from any data module. Equations are those of the paper.

    Args:
        backbone: Name of any timm model, or a folder that timm saved, as ``local-dir:PATH`` or as a ``Path``.
        layers: Layers of the backbone whose features are concatenated, at the finest grid among them. By default those
            that suit it, see :mod:`anomalib_ot.features.backbone_defaults`: of strides 8 and 16, or at 1/2 and 5/6 of
            the depth of a plain vision transformer.
        pre_trained: Whether to load the backbone's pre-trained weights.
        image_size: Height and width that the default pre-processor resizes to, in pixels. By default 336 × 336;
            448 × 448 with DINOv2 and DINOv3; that of the backbone if it accepts no other.
        measure: Score by conditional ``transport``, or by the ``nearest`` feature of the memory.
        online: Let queries teach the episodic memory and the navigator (paper). The result of an image then depends on
            the images before it. Otherwise the score of an image depends on the support set and that image only.
        online_rate: Online, an image teaches only if the p-value of its largest distance from the support images, among
            those of their own left-out views, is above this rate, in [0, 1). With n views, a rate below 1 / (n + 1)
            refuses no image. At 0, all images teach (paper).
        keep_memory: Keep what queries taught from one test or prediction to the next, instead of resetting it.
        foreground: How to find the product in the support images: ``none`` takes all cells, ``pca`` the first principal
            component of the features, ``sam`` segment-anything (paper).
        sam_checkpoint: File of SAM's weights, for ``foreground="sam"``.
        sam_prompt: Prompt of SAM: a ``box`` around the image or a ``point`` at its centre.
        rotations: Views of each support image, rotated by equal angles. A query is compared with the nearest view; 1
            uses the image alone (paper).
        position_weight: Weight of positions in the cost, for features of unit variance and an image of unit size; 0
            ignores positions (paper).
        detail_weight: Weight of the detail in the score of a cell: the cosine distance of its features, without
            averaging, from the nearest in the coresets of all views; 0 for none (paper).
        foreground_ratio: α, the share of the support set's foreground features that the memory keeps, in (0, 1].
        background_ratio: β, the share of its background features that the memory keeps, in (0, 1].
        capacity: L, the number of features at which the episodic memory is compressed.
        compression: λ, the share of the capacity that compression keeps, in (0, 1).
        top_foreground: Largest number of foreground features that a query adds to the episodic memory.
        top_background: Largest number of background features that a query adds to the episodic memory.
        rho: ρ of eq. 4, the weight of the forward transport in the objective, in [0, 1].
        navigator_start: Start the navigator at the ``metric`` of the features, or at ``random`` (paper).
        navigator_hidden: Hidden units of the navigator, at most 16384.
        temperature: Temperature of the start ``metric``, positive.
        learning_rate: Learning rate of Adam, which fits the navigator; 1e-4 in the paper.
        support_steps: Largest number of steps that fit the navigator to each support image; 0 in the paper.
        query_steps: Largest number of steps that fit the navigator to each query; 0 keeps the navigator of the support
            set. 100 in the paper.
        fit_features: Features of memory and query that such a fit samples; 0 for all (paper).
        tolerance: Relative change of the objective at which a fit ends; 0 runs all steps (paper).
        smoothing: Standard deviation of the Gaussian that smooths the anomaly map, in pixels; 0 for none.
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
        >>> from anomalib_ot import FewShot, Foct
        >>> data = FewShot(MVTecAD(category="bottle"), shots=4)
        >>> Engine().train(Foct(), datamodule=data)  # doctest: +SKIP
    """

    torch_model = FoctModel
    model: FoctModel
    settings: FoctSettings
    calibration_scores: CalibrationScores | None = None
    views = "anomalib_ot.models.foct.views"
    checkpoint_rules = CheckpointRules(
        FoctSettings,
        learned=("semantic", "detail", "episodic", "centre", "scale", "view_distances"),
        marks=("model.semantic.",),
        before={"detail_weight": 0.0, "online_rate": 0.0},
    )

    def __init__(
        self,
        backbone: str | Path = FoctSettings.backbone,
        layers: Sequence[str] | None = FoctSettings.layers,
        pre_trained: bool = FoctSettings.pre_trained,
        image_size: tuple[int, int] | None = FoctSettings.image_size,
        measure: Measure = FoctSettings.measure,
        online: bool = FoctSettings.online,
        online_rate: float = FoctSettings.online_rate,
        keep_memory: bool = FoctSettings.keep_memory,
        foreground: ForegroundName = FoctSettings.foreground,
        sam_checkpoint: Path | str | None = FoctSettings.sam_checkpoint,
        sam_prompt: Prompt = FoctSettings.sam_prompt,
        rotations: int = FoctSettings.rotations,
        position_weight: float = FoctSettings.position_weight,
        detail_weight: float = FoctSettings.detail_weight,
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
        seed: int | None = FoctSettings.seed,
        pre_processor: nn.Module | bool = True,
        post_processor: ConformalPostProcessor | PostProcessor | nn.Module | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        self.settings = settings = FoctSettings.of(locals())
        # The host stores the arguments in checkpoints as they are here: names, not paths, and no None.
        backbone, layers, image_size = settings.backbone, settings.layers, settings.image_size
        super().__init__(pre_processor, post_processor, evaluator, visualizer)
        self.foreground = create_foreground(settings)
        self._support: list[Tensor] = []
        # Leaves the model as it was before validation.
        self._validation = ExitStack()
        self._is_validated = False

    def on_fit_start(self) -> None:
        """Load the foreground finder before any image is read.

        Raises:
            ModuleNotFoundError: If ``foreground="sam"`` and segment-anything is not installed.
            FileNotFoundError: If ``foreground="sam"`` and the checkpoint does not exist.
        """
        self.foreground.load()

    def on_train_start(self) -> None:
        """Discard the support set of an earlier fit."""
        self._support, self._is_validated = [], False
        self._is_fitted = torch.tensor([False], device=self.device)

    def training_step(self, batch: Batch, *args, **kwargs) -> STEP_OUTPUT:
        """Collect the support images.

        Args:
            batch: Images.
            *args: Unused.
            **kwargs: Unused.

        Returns:
            A loss without effect on any weight.
        """
        del args, kwargs
        images = batch.image
        assert images is not None  # noqa: S101 - batches of a data loader have images
        self.model.anomaly_map_generator.check_size(images.shape[-2:])
        check_finite({"the backbone": self.model(images)}, getattr(batch, "image_path", None))
        self._support.append(images)
        return torch.zeros((), requires_grad=True, device=self.device)

    def fit(self) -> None:
        """Fill the memory with the support set.

        Raises:
            RuntimeError: If there is no support set.
        """
        if not self._support:
            msg = "Foct has no support set yet: fit it, or load a checkpoint with ckpt_path"
            raise RuntimeError(msg)
        images = torch.cat(self._support)
        self._support = []
        if len(images) > _MANY:
            logger.warning(
                "Foct compares every query with each of %d support images, but is designed for a few. Draw fewer with "
                "FewShot, or train Pradot.",
                len(images),
            )
        self.model.fit(images, denormalize(images, self.pre_processor), self.foreground)
        # The scores of the support images set the threshold if few good images are held out.
        has_others = len(images) > 1 and isinstance(self.post_processor, HasPValues)
        self.calibration_scores = self._left_out_scores(images) if has_others else None

    def _left_out_scores(self, images: Tensor) -> CalibrationScores | None:
        """Scores of the support images, each by the memory of the others; None if computing them fails."""
        try:
            scored: Any = self.model.score_left_out(images)
        except Exception as error:  # noqa: BLE001 - a training must not fail at its end
            logger.warning(
                "The scores of the validation images set the threshold, as comparing the support images failed: %r",
                error,
            )
            return None
        return CalibrationScores.of(score_rows(scored.pred_score, scored.anomaly_map), SUPPORT)

    def on_validation_start(self) -> None:
        """Reset the episodic memory; what validation teaches is discarded when it ends."""
        super().on_validation_start()
        self._validation.enter_context(self.model.forgetting())
        self._is_validated = True

    def on_validation_epoch_end(self) -> None:
        """Discard what the validation set taught."""
        self._validation.close()

    def on_exception(self) -> None:
        """Discard what an interrupted validation taught."""
        self._validation.close()

    def on_train_epoch_end(self) -> None:
        """Validate if the trainer did not: it may schedule validation for a later epoch, but there is only one."""
        if not self._is_validated:
            validate_now(self.trainer)
        super().on_train_epoch_end()

    def rollback(self, queries: int) -> None:
        """Undo what the last queries of an online model taught, as if it had not scored them.

        A checkpoint stores the current memory, not its history. Without ``keep_memory``, each test and each prediction
        resets the memory anyway.

        Args:
            queries: Number of images, at most those since the last reset and at most 100.

        Raises:
            ValueError: If fewer queries can be undone.

        Example:
            >>> model = Foct(online=True, keep_memory=True)  # doctest: +SKIP
            >>> engine.predict(model, data_path="batch_of_bad_parts")  # doctest: +SKIP
            >>> model.rollback(20)  # doctest: +SKIP
        """
        self.model.rollback(queries)

    def on_test_start(self) -> None:
        """Reset the episodic memory, unless it is kept."""
        if not self.settings.keep_memory:
            self.model.reset()

    on_predict_start = on_test_start

    def frozen(self) -> AbstractContextManager[None]:
        """A context in which memory and navigator do not change, and queries teach nothing."""
        return self.model.frozen()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the settings that change scores, and a memory without history to undo.

        Raises:
            ValueError: If the checkpoint belongs to another model, or its tensors do not match this one.
        """
        super().on_load_checkpoint(checkpoint)
        self.model.earlier.clear()

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """Arguments that the model passes to the trainer."""
        return {"max_epochs": 1, "num_sanity_val_steps": 0, "devices": 1}
