"""Sphinx's settings. Build with ``make docs``; warnings are errors, and external pages are never fetched."""  # noqa: INP001

import sys
from pathlib import Path

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

import anomalib_ot

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "anomalib-ot"
author = "the authors of anomalib-ot"
project_copyright = author
release = version = anomalib_ot.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "model_settings",
    "paper_table",
]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"{project} {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 4

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_class_signature = "mixed"
maximum_signature_line_length = 100
python_use_unqualified_type_names = True
# Fields of a NamedTuple or a dataclass are described once, by its docstring.
napoleon_use_ivar = True

# Names of this package must resolve. Names of others are plain text, because their pages need a network.
nitpicky = True
nitpick_ignore_regex = [
    (
        r"py:.*",
        r"(anomalib|lightning|matplotlib|numpy|openvino|pandas|scipy|timm|torch|torchmetrics|torchvision|PIL)\..*",
    ),
    (r"py:.*", r"(abc|argparse|collections|contextlib|dataclasses|pathlib|tempfile|threading|types|typing)\..*"),
    (r"py:class", r"AnomalibModule|Metric|Tiler"),
    # Type variables.
    (r"py:class", r"anomalib_ot\..*\.(_Scored|[A-Z])"),
]

# tests/unit/test_docs.py runs the examples of docstrings. This builder runs the examples of the guides.
doctest_test_doctest_blocks = ""


def _find_by_last_name(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.Element
) -> nodes.Element | None:
    """Resolve a name of this package that is documented in another module than the reference names."""
    if node.get("refdomain") != "py":
        return None
    target = node["reftarget"]
    last = target.rpartition(".")[2] if target.startswith("anomalib_ot.") else target
    domain = env.get_domain("py")
    found = {name for name, entry in domain.objects.items() if name.endswith(f".{last}") and not entry.aliased}
    if len(found) != 1:
        return None
    return domain.resolve_xref(env, node["refdoc"], app.builder, node["reftype"], found.pop(), node, content)


def _link_within_site(_app: Sphinx, _name: str, source: list[str]) -> None:
    """Redirect links to the README, which is not a page of the site, to the guide that includes its results."""
    source[0] = source[0].replace("](../README.md)", "](guides/choosing.md)")


def setup(app: Sphinx) -> None:
    """Connect to Sphinx's events."""
    app.connect("missing-reference", _find_by_last_name)
    app.connect("source-read", _link_within_site)
