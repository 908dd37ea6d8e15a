"""Registration of our models with anomalib.

anomalib has no entry point for models. It finds them in three ways, each with a test:

1. A short name (``--model Pradot``, ``get_model("pradot")``, ``list_models()``) resolves among the imported subclasses
   of ``AnomalibModule``, and ``--data Assembly`` among those of ``AnomalibDataModule``.
2. A class path is an attribute of its module, or of ``anomalib.models`` if it has no dots.
3. ``get_model`` imports only from the modules in ``anomalib.models.ALLOWED_MODULES``.
"""

import sys


def register(*models: type) -> None:
    """Let anomalib find models by both class paths, ``Pradot`` and ``anomalib.models.Pradot``.

    Args:
        models: Subclasses of ``AnomalibModule``.
    """
    # While the module is executed, it is not yet an attribute of its package.
    host = sys.modules["anomalib.models"]
    host.ALLOWED_MODULES.update({"anomalib_ot", "anomalib_ot.models"})
    for model in models:
        setattr(host, model.__name__, model)
        if model.__name__ not in host.__all__:
            host.__all__.append(model.__name__)
