"""WT-Flow for anomalib: time-reversed flow matching with worst transport.

Paper: Li et al., Time-reversed flow matching with worst transport in high-dimensional latent space for image anomaly
detection, 2025, https://arxiv.org/abs/2508.05461
"""

from collections.abc import Sequence
from pathlib import Path

from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.visualization import Visualizer
from torch import nn

from anomalib_ot.decide.post_processor import ConformalPostProcessor
from anomalib_ot.features.extraction import Extraction
from anomalib_ot.features.store import CachePlace
from anomalib_ot.host.checkpoint_rules import CheckpointRules
from anomalib_ot.host.cross_fit import FoldFeatures
from anomalib_ot.models.detector import Detector
from anomalib_ot.transport import CouplingName, Scope, Solver

from .flow_training import FlowTraining
from .settings import Normalization, Score, WtFlowSettings
from .torch_model import WtFlowModel


class WtFlow(Detector, FlowTraining, AnomalibModule):  # type: ignore[misc]  # as anomalib's own models
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
        >>> from anomalib_ot import WtFlow
        >>> Engine().train(WtFlow(), datamodule=MVTecAD(category="bottle"))  # doctest: +SKIP
    """

    torch_model = WtFlowModel
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
        seed: int | None = WtFlowSettings.seed,
        pre_processor: nn.Module | bool = True,
        post_processor: ConformalPostProcessor | PostProcessor | nn.Module | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        self.settings = settings = WtFlowSettings.of(locals())
        # The host stores the arguments in checkpoints as they are here: names, not paths, and no None.
        backbone, layers, image_size = settings.backbone, settings.layers, settings.image_size
        super().__init__(pre_processor, post_processor, evaluator, visualizer)
        self.set_flow_training()

    def fit_fold(self, features: FoldFeatures) -> WtFlowModel:
        """Fit a model on some of the training images, with as many steps as this one, or as it would have."""
        model: WtFlowModel = self.new_model()
        self.fit_flow_of_fold(model, features)
        return model
