"""FOCT: few-shot detection with conditional transport and an online memory."""

from .lightning_model import Foct
from .settings import FoctSettings
from .torch_model import FoctModel

__all__ = ["Foct", "FoctModel", "FoctSettings"]
