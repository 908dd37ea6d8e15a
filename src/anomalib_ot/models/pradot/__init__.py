"""PRADOT: local and global prototypes learned by optimal transport."""

from .lightning_model import Pradot
from .settings import PradotSettings
from .torch_model import PradotModel

__all__ = ["Pradot", "PradotModel", "PradotSettings"]
