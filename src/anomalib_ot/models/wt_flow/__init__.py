"""WtFlow: time-reversed flow matching with worst-transport coupling."""

from .lightning_model import WtFlow
from .settings import WtFlowSettings
from .torch_model import WtFlowModel

__all__ = ["WtFlow", "WtFlowModel", "WtFlowSettings"]
