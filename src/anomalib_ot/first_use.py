"""Public names of a package that are imported on first use, and packages that are missing then."""

from collections.abc import Callable, Mapping
from importlib import import_module


def on_first_use(
    package: str, places: Mapping[str, str], known: Mapping[str, object]
) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of a package whose names are imported on first use.

    Args:
        package: Name of the package.
        places: Module of each name.
        known: The package's own names, ``globals()``.

    Example:
        >>> getattr_, dir_ = on_first_use("roots", {"sqrt": "math"}, {})
        >>> getattr_("sqrt")(9.0), dir_()
        (3.0, ['sqrt'])
    """

    def find(name: str) -> object:
        if name in places:
            return getattr(import_module(places[name]), name)
        msg = f"module {package!r} has no attribute {name!r}"
        raise AttributeError(msg)

    return find, lambda: sorted([*known, *places])


def missing_package(error: ModuleNotFoundError) -> str:
    """Message for a package that cannot be imported, with the extra that most packages come with.

    Args:
        error: The error of the import. If Python raised it, it has the name of the package.
    """
    hint = '; if you train models, run: pip install "anomalib-ot[train]"' if error.name else ""
    return f"{error}{hint}"
