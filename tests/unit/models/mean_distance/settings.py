"""The settings of both models: their defaults, their ranges, and what each of them changes."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from anomalib_ot.host.model_settings import ModelSettings, Scoring


@dataclass(frozen=True, kw_only=True)
class MeanDistanceSettings(ModelSettings):
    """Settings of MeanDistance; the base has layers and image size, and checks the image size and the smoothing."""

    strides: ClassVar = (8,)
    usual_image_size: ClassVar = (224, 224)

    backbone: Scoring[str | Path] = "resnet18"
    smoothing: Scoring[float] = 4.0
