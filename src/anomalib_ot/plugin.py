"""Registration with anomalib, the only file that touches its internals.

anomalib has no entry point for models. It finds them by three promises, each with a test in ``tests``:

1. A short name (``--model Pradot``, ``get_model("pradot")``, ``list_models()``) resolves among the imported subclasses
   of ``AnomalibModule``; likewise ``--data Assembly`` among those of ``AnomalibDataModule``.
2. A class path is looked up as an attribute of its module, ``anomalib.models`` when it has no dots.
3. ``get_model`` imports from the modules in ``anomalib.models.ALLOWED_MODULES`` only.

So our classes must be imported whenever ``anomalib.models`` is. The wheel carries ``anomalib_ot.pth``, which Python
reads at start-up and which calls :func:`install`. Only the standard library is imported here, so that a process which
never imports anomalib does not notice.
"""

from __future__ import annotations

import os
import sys

# Python runs this at every start: what site has not imported already is imported where it is needed.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

_HOST = "anomalib.models"
_SWITCH = "ANOMALIB_OT_AUTOLOAD"


class _RegisterAfterHost:
    """Imports our models once ``anomalib.models`` has been executed, then leaves ``sys.meta_path``."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        if fullname != _HOST:
            return None
        from importlib import import_module  # noqa: PLC0415
        from importlib.machinery import PathFinder  # noqa: PLC0415

        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            try:
                import_module("anomalib_ot.models")
                # Its visualizer has a short name too.
                import_module("anomalib_ot.visualization.visualizer")
            except Exception as error:  # noqa: BLE001 - whatever is wrong with the plugin, the host goes on
                import warnings  # noqa: PLC0415

                warnings.warn(
                    f"anomalib-ot could not register its models with anomalib: {type(error).__name__}: {error}. "
                    f"Set {_SWITCH}=0 to switch registration off.",
                    RuntimeWarning,
                    stacklevel=2,
                )

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Install the import hook, unless ``ANOMALIB_OT_AUTOLOAD=0`` or anomalib's models are imported already."""
    if os.environ.get(_SWITCH) == "0" or _HOST in sys.modules:
        return
    # In a virtual environment Python reads its .pth files twice.
    if not any(isinstance(finder, _RegisterAfterHost) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegisterAfterHost())


def require_versions() -> None:
    """Refuse installed packages of versions that this one's own metadata excludes, before they fail in other words.

    Raises:
        ImportError: If there are any; it names them, and the versions that would do.
    """
    from importlib.metadata import PackageNotFoundError, requires, version  # noqa: PLC0415

    from packaging.requirements import Requirement  # noqa: PLC0415 - comes with the host

    wrong = []
    for line in requires("anomalib-ot") or ():
        needed = Requirement(line)
        if needed.marker and not needed.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(needed.name)
        except PackageNotFoundError:
            # The import names it; another package may stand in for it.
            continue
        if not needed.specifier.contains(found, prereleases=True):
            wrong.append((f"{needed.name}{needed.specifier}", f"{needed.name} {found}"))
    if wrong:
        needs, finds = (", ".join(column) for column in zip(*wrong, strict=True))
        commands = " ".join(f'"{each}"' for each, _ in wrong)
        msg = f"anomalib-ot needs {needs}, but {finds} is installed; run: pip install {commands}"
        raise ImportError(msg)


def register(*models: type) -> None:
    """Make models reachable by anomalib's class paths, ``Pradot`` and ``anomalib.models.Pradot`` alike.

    Args:
        models: Subclasses of ``AnomalibModule``; importing them has imported ``anomalib.models``.
    """
    host = sys.modules[_HOST]
    host.ALLOWED_MODULES.update({"anomalib_ot", "anomalib_ot.models"})
    for model in models:
        setattr(host, model.__name__, model)
        if model.__name__ not in host.__all__:
            host.__all__.append(model.__name__)
