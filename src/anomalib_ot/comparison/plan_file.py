"""Plans from files and from the command line."""

from argparse import ArgumentError
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from anomalib_ot.host.class_paths import rooted
from anomalib_ot.shipped import shipped_file

from .plan import Plan, members, require_plain


def read_plan(
    plan: str | Path | None = None,
    models: Sequence[str | dict[str, Any]] | None = None,
    data: Sequence[str | dict[str, Any]] | None = None,
    root: Path | None = None,
    **settings: Any,
) -> Plan:
    """Read the plan of a YAML file, of a command line, or of both. The command line overrides the file.

    Args:
        plan: YAML file with the arguments of :class:`Plan`, or the name of a shipped plan, such as ``quick``. Its
            ``reference`` is relative to the folder of the file. An empty key counts as absent.
        models: Labels of models in the file to use, or other models: a class, or ``class_path`` and ``init_args``.
        data: Data modules, likewise.
        root: Base folder of the data modules' relative ``root``.
        **settings: Other arguments of :class:`Plan`; None keeps the value of the file.

    Returns:
        The plan.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file or a name is invalid.
    """
    path = None if plan is None else _found(plan)
    content = _load(path) if path else {}
    for name, names in (("models", models), ("data", data)):
        if names is not None:
            content[name] = _choose(content.get(name, {}), names)
    if models is not None:
        content["ensembles"] = tuple(
            each for each in content.get("ensembles", ()) if {*members(each)} <= {*content["models"]}
        )
        if content.get("baseline") not in {*content["models"], *content["ensembles"]}:
            content["baseline"] = None
    content |= {name: value for name, value in settings.items() if value is not None}
    if root is not None:
        content["data"] = {label: rooted(config, root) for label, config in content.get("data", {}).items()}
    return Plan(**_typed(content, path))


def _found(plan: str | Path) -> Path:
    """The file, or the shipped plan of this name."""
    return path if (path := Path(plan)).is_file() else shipped_file(str(plan), "compare")


def _load(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (RecursionError, ValueError, yaml.YAMLError) as error:
        msg = f"{path} cannot be read as YAML: {error}"
        raise ValueError(msg) from error
    require_plain(str(path), content)
    known = [each.name for each in fields(Plan)]
    if not isinstance(content, dict) or not content.keys() <= {*known}:
        msg = f"{path} is not a plan of a comparison, whose keys are {', '.join(known)}"
        raise ValueError(msg)
    if isinstance(reference := content.get("reference"), str):
        content["reference"] = path.parent / reference
    content = _typed(_without_empty(content), path)
    for name in ("models", "data"):
        content[name] = {label: _without_empty(config) for label, config in content[name].items()}
    return content


def _without_empty(content: dict[str, Any]) -> dict[str, Any]:
    """The keys that are not empty. YAML reads an empty key as null."""
    return {name: value for name, value in content.items() if value is not None}


def _typed(content: dict[str, Any], path: Path | None) -> dict[str, Any]:
    """Arguments of :class:`Plan`, with models and data.

    Raises:
        ValueError: If a value has the wrong type.
    """
    values: dict[str, Any] = {"models": {}, "data": {}, **content}
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Plan)
    try:
        # A copy, because the parser changes the dictionaries within dictionaries.
        parsed = parser.parse_object(deepcopy(values))
    except (ArgumentError, TypeError) as error:
        msg = f"{path or 'the plan'}: {' '.join(str(error).split())}"
        raise ValueError(msg) from error
    # Dictionaries are not parsed, because the parser could take them for classes.
    return {name: value if isinstance(value, dict) else parsed[name] for name, value in values.items()}


def _choose(labelled: dict[str, Any], wanted: Sequence[str | dict[str, Any]]) -> dict[str, Any]:
    """The wanted entries of the file, and those given by class, whose labels are the names of the classes."""
    chosen = {}
    for each in wanted:
        if isinstance(each, str) and each in labelled:
            chosen[each] = labelled[each]
        else:
            config = {"class_path": each} if isinstance(each, str) else each
            label = str(config.get("class_path")).rpartition(".")[2]
            if chosen.get(label, config) != config:
                msg = f"there are two entries called {label}; give them different labels in a plan"
                raise ValueError(msg)
            chosen[label] = config
    return chosen
