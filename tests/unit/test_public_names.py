"""What users import from the packages, whatever else was imported before."""

from importlib import import_module
from pkgutil import iter_modules, walk_packages
from types import ModuleType

import pytest

import anomalib_ot

PACKAGES = ["anomalib_ot", *(each.name for each in walk_packages(anomalib_ot.__path__, "anomalib_ot.") if each.ispkg)]


@pytest.mark.parametrize("package", PACKAGES)
def test_a_public_name_is_no_module_before_or_after_the_modules_are_imported(package):
    module = import_module(package)
    names = getattr(module, "__all__", [])
    assert not [name for name in names if isinstance(getattr(module, name), ModuleType)]
    # A later import of a module replaces a name of the same spelling.
    assert not {*names} & {each.name for each in iter_modules(module.__path__)}


def test_explain_is_the_function_after_its_module_was_imported():
    from_package = {"anomalib_ot.explain": ["explain"], "anomalib_ot.comparison": ["compare", "evaluate", "measure"]}
    for module in ("anomalib_ot.explain.explanation", "anomalib_ot.comparison.execution"):
        import_module(module)
    for package, names in from_package.items():
        assert [getattr(import_module(package), name).__name__ for name in names] == names
