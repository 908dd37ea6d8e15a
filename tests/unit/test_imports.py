"""The imports between the project's modules and packages have no circle."""

import ast
from graphlib import TopologicalSorter
from importlib import import_module
from pathlib import Path

import pytest

import anomalib_ot

ROOT = Path(anomalib_ot.__file__).parent


def module_name(path):
    """Dotted name of a module, that of a package for its ``__init__``."""
    return ".".join([ROOT.name, *path.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__")


MODULES = {module_name(path): path for path in ROOT.rglob("*.py")}


def imported(name):
    """Names that a module imports, including in functions and for type checkers."""
    package = name if MODULES[name].stem == "__init__" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names)
        elif isinstance(node, ast.ImportFrom):
            # Each further dot goes up by one package.
            above = package.split(".")[: package.count(".") + 2 - node.level] if node.level else []
            source = ".".join([*above, *filter(None, [node.module])])
            # ``from package import module`` imports the module.
            yield from (full if (full := f"{source}.{each.name}") in MODULES else source for each in node.names)


@pytest.fixture(scope="module")
def graph():
    """The project's modules that each of them imports."""
    return {name: {each for each in imported(name) if each in MODULES} - {name} for name in MODULES}


def test_the_imports_of_modules_have_no_circle(graph):
    TopologicalSorter(graph).prepare()


def test_the_imports_of_packages_have_no_circle(graph):
    packages = {}
    for name, names in graph.items():
        package, *others = (".".join(each.split(".")[:2]) for each in (name, *names))
        packages.setdefault(package, set()).update({*others} - {package})
    TopologicalSorter(packages).prepare()


def test_the_graph_has_relative_imports_and_imports_in_functions(graph):
    assert "anomalib_ot.transport.coupling" in graph["anomalib_ot.transport"]
    assert "anomalib_ot.transport" in graph["anomalib_ot.models.pradot.prototypes"]
    # The import of the compiled loops is in a function.
    assert "anomalib_ot.transport._sparse" in graph["anomalib_ot.transport._kernels"]


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize("path", sorted(BENCHMARKS.rglob("*.py")), ids=lambda path: str(path.relative_to(BENCHMARKS)))
def test_benchmarks_import_names_that_exist(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(ROOT.name):
            source = import_module(node.module)
            missing = [each.name for each in node.names if not hasattr(source, each.name)]
            assert not [name for name in missing if f"{node.module}.{name}" not in MODULES]
