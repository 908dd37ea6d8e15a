"""The models. Importing this package registers them with anomalib."""

from anomalib_ot._autoload import register, require_versions

# Before anything that a wrong version would fail in.
require_versions()

from anomalib_ot import data  # noqa: E402, F401 - so that anomalib finds our data modules by name too
from .foct import Foct  # noqa: E402
from .pradot import Pradot  # noqa: E402
from .wt_flow import WtFlow  # noqa: E402

register(Foct, Pradot, WtFlow)

__all__ = ["Foct", "Pradot", "WtFlow"]
