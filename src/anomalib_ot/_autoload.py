"""The import hook that registers our models with anomalib.

anomalib has no entry point for models; :mod:`anomalib_ot.host.registration` describes how it finds them. Our classes
must be imported whenever ``anomalib.models`` is executed. The wheel contains ``anomalib_ot.pth``, which Python reads at
start-up and which calls :func:`install`. This module imports only the standard library, so that it hardly costs time in
a process that never imports anomalib.
"""

from __future__ import annotations

import os
import sys

# Python runs this at every start, so modules that site has not already imported are imported where they are needed.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

_HOST = "anomalib.models"
_SWITCH = "ANOMALIB_OT_AUTOLOAD"


class _RegisterAfterHost:
    """Registers our models at the end of every execution of ``anomalib.models``.

    It finds no modules itself. It wraps the loader that another finder returns for the host. It stays in
    ``sys.meta_path``, because a module may be searched for without being imported, imported again after a failure, or
    reloaded.
    """

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        if sys.meta_path[0] is not self:
            # A finder in front of this one, such as that of a type checker, would find the host first.
            sys.meta_path.remove(self)
            sys.meta_path.insert(0, self)
        if fullname != _HOST or os.environ.get(_SWITCH) == "0":
            return None
        for finder in sys.meta_path[1:]:
            find = getattr(finder, "find_spec", None)
            spec = find(fullname, path, target) if find else None
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _RegisteringLoader(spec.loader)
                return spec
        return None


class _RegisteringLoader:
    """A loader that registers our models after it has executed the host.

    Args:
        loader: The host's own loader, which the module keeps.
    """

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        _register_models()


def _register_models() -> None:
    from importlib import import_module  # noqa: PLC0415

    import anomalib_ot  # noqa: PLC0415

    try:
        import_module("anomalib_ot.host.versions").require_versions()
        # Data modules, the post-processor and the visualizer are found by short names too.
        for module in ("anomalib_ot.data", "anomalib_ot.decide.post_processor", "anomalib_ot.explain.visualizer"):
            import_module(module)
        models = [getattr(import_module(place), name) for name, place in anomalib_ot.MODELS.items()]
        import_module("anomalib_ot.host.registration").register(*models)
    except Exception as error:  # noqa: BLE001 - the host must work without the plugin
        import warnings  # noqa: PLC0415

        from anomalib_ot.first_use import missing_package  # noqa: PLC0415

        text = missing_package(error) if isinstance(error, ModuleNotFoundError) else str(error)
        warnings.warn(
            f"anomalib-ot could not register its models with anomalib: {type(error).__name__}: {text}. "
            f"Set {_SWITCH}=0 to switch registration off.",
            RuntimeWarning,
            stacklevel=2,
        )


def install() -> None:
    """Install the import hook, unless ``ANOMALIB_OT_AUTOLOAD=0``; register at once if the host is imported already."""
    if os.environ.get(_SWITCH) == "0":
        return
    # In a virtual environment, Python reads .pth files twice.
    if not any(isinstance(finder, _RegisterAfterHost) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegisterAfterHost())
    if _HOST in sys.modules:
        _register_models()
