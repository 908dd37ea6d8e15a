"""Duo: the prototypes of Pradot and the flow of WtFlow on the features of one backbone.

This package imports the other two models, as the only one: it consists of them.
"""

from .lightning_model import Duo
from .settings import DuoSettings
from .torch_model import DuoModel

__all__ = ["Duo", "DuoModel", "DuoSettings"]
