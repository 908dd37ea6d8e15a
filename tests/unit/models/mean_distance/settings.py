"""The settings of both models: their defaults, their ranges, and what each of them changes."""

from dataclasses import dataclass
from pathlib import Path

from anomalib_ot.host.model_settings import ModelSettings, Scoring, Training


@dataclass(frozen=True, kw_only=True)
class MeanDistanceSettings(ModelSettings):
    """Settings of MeanDistance; ``__post_init__`` of the base checks the image size and the smoothing."""

    backbone: Scoring[str | Path] = "resnet18"
    layer: Scoring[str] = "layer2"
    pre_trained: Training[bool] = True
    image_size: Scoring[tuple[int, int]] = (224, 224)
    smoothing: Scoring[float] = 4.0
