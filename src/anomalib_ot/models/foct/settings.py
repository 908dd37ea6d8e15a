"""Settings of Foct."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from anomalib_ot.host.model_settings import ModelSettings, Scoring, Training
from anomalib_ot.settings import require, require_finite, require_whole
from anomalib_ot.transport import NavigatorStart

ForegroundName = Literal["pca", "sam", "none"]
Measure = Literal["transport", "nearest"]
Prompt = Literal["box", "point"]

# More than the channels of any feature.
_MOST_HIDDEN = 2**14


@dataclass(frozen=True, kw_only=True)
class FoctSettings(ModelSettings):
    """Settings of Foct, each with what it changes; :class:`Foct` documents them.

    Raises:
        ValueError: If a setting is out of its range.

    Example:
        >>> FoctSettings(online=True).capacity
        100
    """

    strides: ClassVar = (8, 16)
    usual_image_size: ClassVar = (336, 336)

    backbone: Scoring[str | Path] = "wide_resnet50_2"
    measure: Scoring[Measure] = "transport"
    online: Scoring[bool] = False
    online_rate: Scoring[float] = 0.0
    keep_memory: Scoring[bool] = False
    foreground: Training[ForegroundName] = "none"
    sam_checkpoint: Training[Path | str | None] = None
    sam_prompt: Training[Prompt] = "box"
    rotations: Scoring[int] = 12
    position_weight: Scoring[float] = 4.0
    detail_weight: Scoring[float] = 1.25
    foreground_ratio: Training[float] = 0.1
    background_ratio: Training[float] = 0.075
    capacity: Scoring[int] = 100
    compression: Scoring[float] = 0.25
    top_foreground: Scoring[int] = 10
    top_background: Scoring[int] = 40
    rho: Scoring[float] = 0.5
    navigator_start: Scoring[NavigatorStart] = "metric"
    navigator_hidden: Scoring[int] = 4
    temperature: Scoring[float] = 0.3
    learning_rate: Scoring[float] = 1e-2
    support_steps: Training[int] = 100
    query_steps: Scoring[int] = 0
    fit_features: Scoring[int] = 256
    tolerance: Scoring[float] = 1e-3
    smoothing: Scoring[float] = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_whole(1, "rotations", self.rotations)
        require_finite(self.position_weight >= 0, "position_weight", "at least 0", self.position_weight)
        require_finite(self.detail_weight >= 0, "detail_weight", "at least 0", self.detail_weight)
        if self.sam_checkpoint is not None and self.foreground != "sam":
            msg = f"sam_checkpoint is given, but foreground={self.foreground!r} does not read it; set foreground to sam"
            raise ValueError(msg)
        self._check_memory()
        self._check_navigator()

    def _check_memory(self) -> None:
        require_finite(0 <= self.online_rate < 1, "online_rate", "in [0, 1)", self.online_rate)
        require(0 < self.foreground_ratio <= 1, "foreground_ratio", "in (0, 1]", self.foreground_ratio)
        require(0 < self.background_ratio <= 1, "background_ratio", "in (0, 1]", self.background_ratio)
        require_whole(0, "top_foreground", self.top_foreground)
        require_whole(0, "top_background", self.top_background)
        added = self.top_foreground + self.top_background
        require(self.capacity >= added, "capacity", f"at least top_foreground + top_background, {added}", self.capacity)
        require_whole(1, "capacity", self.capacity)
        require(0 < self.compression < 1, "compression", "in (0, 1)", self.compression)

    def _check_navigator(self) -> None:
        require(0 <= self.rho <= 1, "rho", "in [0, 1]", self.rho)
        require_whole(1, "navigator_hidden", self.navigator_hidden, _MOST_HIDDEN)
        require_finite(self.temperature > 0, "temperature", "positive", self.temperature)
        require_finite(self.learning_rate > 0, "learning_rate", "positive", self.learning_rate)
        require_whole(0, "support_steps", self.support_steps)
        require_whole(0, "query_steps", self.query_steps)
        require_whole(0, "fit_features", self.fit_features)
        require_finite(self.tolerance >= 0, "tolerance", "at least 0", self.tolerance)
