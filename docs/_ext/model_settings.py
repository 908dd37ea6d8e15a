"""The directive ``model-settings``: a table of a class's arguments, from its signature and its docstring."""  # noqa: INP001

import re
from importlib import import_module
from inspect import signature
from typing import Any, ClassVar

import docstring_parser
import yaml
from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective


class ModelSettings(SphinxDirective):
    """Name, default and effect of each argument of a class.

    The argument is the class, such as ``anomalib_ot.Pradot``. The content is YAML with the measured effects of
    arguments by name. An unknown name is an error.
    """

    required_arguments = 1
    has_content = True
    # Arguments of all models, which anomalib sets.
    shared: ClassVar = {"pre_processor", "post_processor", "evaluator", "visualizer"}

    def run(self) -> list[nodes.Node]:
        """Create the table."""
        module, _, name = self.arguments[0].rpartition(".")
        class_ = getattr(import_module(module), name)
        parameters = {key: each for key, each in signature(class_).parameters.items() if key not in self.shared}
        described = {each.arg_name: each.description or "" for each in docstring_parser.parse(class_.__doc__).params}
        measured: dict[str, str] = yaml.safe_load("\n".join(self.content)) or {}
        if unknown := [*(measured.keys() - parameters.keys()), *(parameters.keys() - described.keys())]:
            message = f"{self.arguments[0]} has no argument, or no description of it: {', '.join(unknown)}"
            raise self.error(message)
        lines = ["| setting | default | effect |", "| --- | --- | --- |"]
        for key, parameter in parameters.items():
            effect = _markdown(described[key])
            if key in measured:
                effect += f" **Measured:** {' '.join(measured[key].split())}"
            lines.append(f"| `{key}` | `{_shown(parameter.default)}` | {effect} |")
        container = nodes.container(classes=["model-settings"])
        self.state.nested_parse(StringList(lines, self.get_source_info()[0]), self.content_offset, container)
        return [container]


def _markdown(text: str) -> str:
    """Convert a description from reStructuredText to MyST on one line."""
    return re.sub(r":(\w+):`", r"{py:\1}`", " ".join(text.split())).replace("|", r"\|")


def _shown(default: Any) -> str:
    """A default value in the syntax of a configuration."""
    value = list(default) if isinstance(default, tuple) else default
    return yaml.safe_dump(value, default_flow_style=True).splitlines()[0]


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive."""
    app.add_directive("model-settings", ModelSettings)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
