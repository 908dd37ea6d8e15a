"""The models: a package each, named in :data:`anomalib_ot.MODELS`. Importing one registers nothing."""

# The host first, which has the versions checked and is executed before a model of ours is half imported.
import anomalib_ot.host  # noqa: F401
from anomalib_ot.models.foct import Foct
from anomalib_ot.models.pradot import Pradot
from anomalib_ot.models.wt_flow import WtFlow

__all__ = ["Foct", "Pradot", "WtFlow"]
