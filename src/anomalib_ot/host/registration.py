"""How anomalib finds our models.

It has no entry point for models. It finds them by three promises, each with a test:

1. A short name (``--model Pradot``, ``get_model("pradot")``, ``list_models()``) resolves among the imported subclasses
   of ``AnomalibModule``; likewise ``--data Assembly`` among those of ``AnomalibDataModule``.
2. A class path is looked up as an attribute of its module, ``anomalib.models`` when it has no dots.
3. ``get_model`` imports from the modules in ``anomalib.models.ALLOWED_MODULES`` only.
"""

import sys


def register(*models: type) -> None:
    """Make models reachable by anomalib's class paths, ``Pradot`` and ``anomalib.models.Pradot`` alike.

    Args:
        models: Subclasses of ``AnomalibModule``.
    """
    # While it is being executed it is no attribute of its package yet.
    host = sys.modules["anomalib.models"]
    host.ALLOWED_MODULES.update({"anomalib_ot", "anomalib_ot.models"})
    for model in models:
        setattr(host, model.__name__, model)
        if model.__name__ not in host.__all__:
            host.__all__.append(model.__name__)
