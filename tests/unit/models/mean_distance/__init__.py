"""A template of a model: the distance to the mean feature. See "Adding a model" in CONTRIBUTING.md."""

from .lightning_model import MeanDistance
from .settings import MeanDistanceSettings
from .torch_model import MeanDistanceModel

__all__ = ["MeanDistance", "MeanDistanceModel", "MeanDistanceSettings"]
