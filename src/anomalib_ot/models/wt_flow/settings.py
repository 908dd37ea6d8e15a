"""Settings of WtFlow."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from anomalib_ot.features.whitening import MOST_MODES
from anomalib_ot.host.model_settings import FeatureTrainingSettings, Scoring, Training
from anomalib_ot.settings import require, require_finite, require_whole
from anomalib_ot.transport import CouplingName, Scope, Solver, create_coupling

Normalization = Literal["whitening", "layer"]
Score = Literal["density", "log_density", "mismatch"]

# The eight groups of a GroupNorm need two channels each, as a map may have a single cell.
_MULTIPLE = 16
# No feature map has as many channels, or 2 to this power of cells along a side.
_WIDEST = 2**14
_DEEPEST = 16


@dataclass(frozen=True, kw_only=True)
class WtFlowSettings(FeatureTrainingSettings):
    """Settings of WtFlow, each with what it changes; :class:`WtFlow` documents them.

    Raises:
        ValueError: If a setting is out of its range.

    Example:
        >>> WtFlowSettings(score="density").euler_steps
        1
    """

    strides: ClassVar = (16,)
    usual_image_size: ClassVar = (256, 256)
    usual_batch_size: ClassVar = 16

    backbone: Scoring[str | Path] = "wide_resnet50_2"
    normalization: Scoring[Normalization] = "whitening"
    whitened_channels: Scoring[int] = 128
    global_modes: Scoring[int] = 32
    pooling: Scoring[bool] = False
    width: Scoring[int] = 64
    depth: Scoring[int] = 1
    coupling: Training[CouplingName] = "worst"
    scope: Training[Scope] = "positions"
    block_size: Training[int | None] = None
    solver: Training[Solver] = "auto"
    score: Scoring[Score] = "log_density"
    euler_steps: Scoring[int] = 1
    mismatch_times: Scoring[Sequence[float]] = (0.1, 0.3, 0.5, 0.7, 0.9)
    mismatch_draws: Scoring[int] = 1
    top_share: Scoring[float] = 0.0
    smoothing: Scoring[float] = 0.0
    training_steps: Training[int] = 200
    learning_rate: Training[float] = 1e-3
    weight_decay: Training[float] = 0.01
    ema_rate: Training[float] = 0.99
    patience: Training[int] = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        require_whole(1, "whitened_channels", self.whitened_channels)
        require_whole(0, "global_modes", self.global_modes, MOST_MODES)
        require(
            self.width >= _MULTIPLE and self.width % _MULTIPLE == 0, "width", f"a multiple of {_MULTIPLE}", self.width
        )
        require_whole(_MULTIPLE, "width", self.width, _WIDEST)
        require_whole(0, "depth", self.depth, _DEEPEST)
        self._check_scores()
        self._check_training()

    def _check_scores(self) -> None:
        require_whole(1, "euler_steps", self.euler_steps)
        times = list(self.mismatch_times)
        is_inside = bool(times) and all(0 < time < 1 for time in times)
        require(is_inside, "mismatch_times", "one or more times between 0 and 1", times)
        require_whole(1, "mismatch_draws", self.mismatch_draws)
        require(0 <= self.top_share <= 1, "top_share", "in [0, 1]", self.top_share)

    def _check_training(self) -> None:
        # Raises for settings that no coupling accepts.
        create_coupling(self.coupling, self.scope, self.block_size, self.solver)
        require_whole(1, "training_steps", self.training_steps)
        require_finite(self.learning_rate > 0, "learning_rate", "positive", self.learning_rate)
        require_finite(self.weight_decay >= 0, "weight_decay", "at least 0", self.weight_decay)
        require(0 <= self.ema_rate < 1, "ema_rate", "in [0, 1)", self.ema_rate)
