"""Optimal-transport anomaly detectors for anomalib.

The public names are imported on first use, to keep ``import anomalib_ot`` fast.
"""

__version__ = "0.1.0"

MODELS = {
    "Duo": "anomalib_ot.models.duo",
    "Foct": "anomalib_ot.models.foct",
    "Pradot": "anomalib_ot.models.pradot",
    "WtFlow": "anomalib_ot.models.wt_flow",
}
"""The package of each model. A new model needs a package and a line here."""

_DATA = {"Assembly": "anomalib_ot.data", "FewShot": "anomalib_ot.data"}
__all__ = sorted([*_DATA, *MODELS])  # noqa: PLE0605 - a list all the same


def __getattr__(name: str) -> type:
    package = MODELS.get(name) or _DATA.get(name)
    if package:
        # Python imports this file at each start.
        from importlib import import_module  # noqa: PLC0415

        try:
            return getattr(import_module(package), name)
        except ModuleNotFoundError as error:
            from .first_use import missing_package  # noqa: PLC0415

            raise ModuleNotFoundError(missing_package(error)) from error
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)


def __dir__() -> list[str]:
    return sorted([*globals(), *_DATA, *MODELS])
