"""Settings of Pradot."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import ClassVar, Literal

from anomalib_ot.features.whitening import MOST_MODES
from anomalib_ot.host.model_settings import FeatureTrainingSettings, Scoring, Training
from anomalib_ot.settings import require, require_finite, require_whole
from anomalib_ot.transport import SpatialCost

Initialisation = Literal["sample", "normal", "uniform"]


@dataclass(frozen=True, kw_only=True)
class PradotSettings(FeatureTrainingSettings):
    """Settings of Pradot, each with what it changes; :class:`Pradot` documents them.

    Raises:
        ValueError: If a setting is out of its range.

    Example:
        >>> PradotSettings(alphas=[0.0]).epsilon
        0.01
    """

    strides: ClassVar = (8, 16)
    usual_image_size: ClassVar = (224, 224)
    # Half of the paper's: a step then takes half the time, and with few images there are more steps.
    usual_batch_size: ClassVar = 32

    backbone: Scoring[str | Path] = "resnet50"
    prototypes_per_cell: Scoring[int | float | Sequence[float] | None] = None
    alphas: Scoring[Sequence[float]] = (0.0, 0.3)
    epochs: Training[int] = 5
    whitened_channels: Scoring[int] = 128
    global_modes: Scoring[int] = 32
    deviation: Scoring[bool] = True
    spatial: Scoring[SpatialCost] = "euclidean"
    initialisation: Training[Initialisation] = "sample"
    ema_rate: Training[float] = 0.95
    ema_warm_up: Training[bool] = True
    epsilon: Training[float] = 0.01
    sinkhorn_iterations: Training[int] = 100
    sinkhorn_tolerance: Training[float] = 0.1
    free_coordinates: Training[bool] = False
    normalize_score: Scoring[bool] = True
    calibrate: Training[bool] = True
    compress: Training[bool] = True
    compress_tolerance: Training[float] = 0.1
    smoothing: Scoring[float] = 4.0
    transport_memory: Training[float] = 2.0
    patience: Training[int] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_prototypes()
        require_whole(1, "epochs", self.epochs)
        require_whole(0, "whitened_channels", self.whitened_channels)
        require_whole(0, "global_modes", self.global_modes, MOST_MODES)
        require(0 <= self.ema_rate <= 1, "ema_rate", "in [0, 1]", self.ema_rate)
        require_finite(self.epsilon > 0, "epsilon", "positive", self.epsilon)
        require_whole(1, "sinkhorn_iterations", self.sinkhorn_iterations)
        require_finite(self.sinkhorn_tolerance >= 0, "sinkhorn_tolerance", "at least 0", self.sinkhorn_tolerance)
        require_finite(self.compress_tolerance >= 0, "compress_tolerance", "at least 0", self.compress_tolerance)
        require_finite(self.transport_memory > 0, "transport_memory", "positive", self.transport_memory)

    def _check_prototypes(self) -> None:
        given = [each for each in self.per_cell if each is not None]
        for per_cell in given:
            is_whole = 1 <= per_cell < inf and per_cell == int(per_cell)
            allowed = "a whole number or between 0 and 1"
            require(0 < per_cell < 1 or is_whole, "prototypes_per_cell", allowed, per_cell)
            if per_cell < 1 and self.free_coordinates:
                msg = "free_coordinates needs prototypes_per_cell of at least 1: a coarser grid has fixed coordinates"
                raise ValueError(msg)
        if len(self.per_cell) != len(self.layer_names):
            msg = (
                f"prototypes_per_cell has {len(self.per_cell)} values for {len(self.layer_names)} layers; give one for "
                "each, or one"
            )
            raise ValueError(msg)
        for alpha in self.alphas:
            require(0 <= alpha <= 1, "each of alphas", "in [0, 1]", alpha)
        is_set = 0 < len({*self.alphas}) == len(self.alphas)
        require(is_set, "alphas", "one or more different weights", list(self.alphas))

    @property
    def per_cell(self) -> list[float | None]:
        """``prototypes_per_cell`` of each layer; None where it follows from the number of cells."""
        given = self.prototypes_per_cell
        values: list[float | None] = list(given) if isinstance(given, Sequence) else [given]
        return values * len(self.layer_names) if len(values) == 1 else values
