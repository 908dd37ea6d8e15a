"""The directive ``paper-table``: published numbers from the CSV files of the comparisons."""  # noqa: INP001

import csv
from pathlib import Path
from typing import ClassVar

from docutils import nodes
from docutils.parsers.rst import directives
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

# Columns of the files, by option.
_OPTIONS = {"model": "models", "category": "categories", "metric": "metrics"}


class PaperTable(SphinxDirective):
    """A row for each model, a column for each metric of each category.

    The argument is the path of the CSV file from the root of the source tree. ``models``, ``categories`` and
    ``metrics`` select rows and columns, separated by semicolons. An unknown name is an error.
    """

    required_arguments = 1
    option_spec: ClassVar = dict.fromkeys(_OPTIONS.values(), directives.unchanged_required)

    def run(self) -> list[nodes.Node]:
        """Create the table."""
        path = Path(self.env.srcdir).parent / self.arguments[0]
        self.env.note_dependency(str(path))
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        chosen = {name: self._chosen(option) for name, option in _OPTIONS.items()}
        for name, values in chosen.items():
            if unknown := {*values} - {row[name] for row in rows}:
                message = f"{path.name} has no {name} {', '.join(sorted(unknown))}"
                raise self.error(message)
        rows = [row for row in rows if all(row[name] in values for name, values in chosen.items())]
        columns = list(dict.fromkeys((row["category"], row["metric"]) for row in rows))
        # If two tables of a paper contradict one another, both numbers are shown.
        numbers: dict[tuple[str, ...], str] = {}
        for row in rows:
            key = (row["model"], row["category"], row["metric"])
            numbers[key] = f"{numbers[key]} or {row['value']}" if key in numbers else row["value"]
        titles = [f"{metric.replace('_', ' ')}, {category}" for category, metric in columns]
        lines = [f"| model | {' | '.join(titles)} |", f"| --- |{' --- |' * len(columns)}"]
        lines += [
            f"| {model} | {' | '.join(numbers.get((model, *column), '–') for column in columns)} |"  # noqa: RUF001
            for model in chosen["model"]
        ]
        container = nodes.container()
        self.state.nested_parse(StringList(lines, str(path)), self.content_offset, container)
        return [container]

    def _chosen(self, name: str) -> list[str]:
        return [each.strip() for each in self.options[name].split(";")]


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive."""
    app.add_directive("paper-table", PaperTable)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
