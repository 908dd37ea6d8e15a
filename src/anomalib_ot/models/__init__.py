"""The models. Importing this package registers them with anomalib."""

from anomalib_ot import data  # noqa: F401 - so that anomalib finds our data modules by name too
from anomalib_ot.models.foct import Foct
from anomalib_ot.models.pradot import Pradot
from anomalib_ot.models.wt_flow import WtFlow
from anomalib_ot.plugin import register

register(Foct, Pradot, WtFlow)

__all__ = ["Foct", "Pradot", "WtFlow"]
