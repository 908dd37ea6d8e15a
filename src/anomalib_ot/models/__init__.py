"""The models: a package each, named in :data:`anomalib_ot.MODELS`. Importing one registers nothing.

Their classes are imported on first use, so that no model needs the others.
"""

from importlib import import_module

# The host first, which has the versions checked and is executed before a model of ours is half imported.
import anomalib_ot.host  # noqa: F401
from anomalib_ot import MODELS

__all__ = [*MODELS]  # noqa: PLE0604 - a list all the same


def __getattr__(name: str) -> type:
    if name in MODELS:
        return getattr(import_module(MODELS[name]), name)
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)


def __dir__() -> list[str]:
    return sorted([*globals(), *MODELS])
