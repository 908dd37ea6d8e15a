"""The models: a package each, named in :data:`anomalib_ot.MODELS`. Importing one registers nothing.

Their classes are imported on first use, so that no model needs the others.
"""

# The host first, which has the versions checked and is executed before a model of ours is half imported.
import anomalib_ot.host  # noqa: F401
from anomalib_ot import MODELS
from anomalib_ot.first_use import on_first_use

__all__ = [*MODELS]  # noqa: PLE0604 - a list all the same
__getattr__, __dir__ = on_first_use(__name__, MODELS, globals())
