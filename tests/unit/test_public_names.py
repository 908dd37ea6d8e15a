"""What users import from the packages, whatever else was imported before."""

import subprocess
import sys
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
    command = (
        "import anomalib_ot.explain.explanation; from anomalib_ot.explain import explain;"
        "import anomalib_ot.comparison.execution; from anomalib_ot.comparison import compare, evaluate, measure;"
        "print(*(each.__name__ for each in (explain, compare, evaluate, measure)))"
    )
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["explain", "compare", "evaluate", "measure"]
