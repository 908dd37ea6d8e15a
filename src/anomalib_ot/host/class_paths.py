"""Objects from the class paths of anomalib's configurations."""

from argparse import ArgumentError
from importlib import import_module
from inspect import Parameter, signature
from pathlib import Path
from types import NoneType
from typing import Any, get_args

import anomalib.models  # noqa: F401 - jsonargparse finds short names among the imported classes
from jsonargparse import ArgumentParser, Namespace


def create(kind: type, config: dict[str, Any]) -> Any:
    """Create an object from its configuration.

    Args:
        kind: Base class.
        config: ``class_path``, which may be the short name of an imported subclass, and ``init_args``.

    Returns:
        The object.

    Raises:
        argparse.ArgumentError: If the class does not exist, or does not take the arguments.
    """
    parser, parsed = _parse(kind, config)
    return parser.instantiate_classes(parsed).it


def class_of(kind: type, config: dict[str, Any]) -> Any:
    """The class of the object that :func:`create` returns.

    Raises:
        argparse.ArgumentError: If the class does not exist, or does not take the arguments.
    """
    return _class(_parse(kind, config)[1].it)


def rooted(config: dict[str, Any], root: Path) -> dict[str, Any]:
    """Make the relative ``root`` of a configuration, or of the ``datamodule`` within it, relative to a folder.

    A configuration of another form is returned unchanged; :func:`create` refuses it.
    """
    own = {} if config.get("init_args") is None else config["init_args"]
    if not isinstance(own, dict):
        return config
    inner = own.get("datamodule")
    if isinstance(inner, str):
        inner = {"class_path": inner}
    if isinstance(inner, dict):
        return {**config, "init_args": {**own, "datamodule": rooted(inner, root)}}
    place = "" if own.get("root") is None else own["root"]
    if not isinstance(place, str | Path):
        return config
    return {**config, "init_args": {**own, "root": str(root / place)}}


def root_of(config: dict[str, Any]) -> Path | None:
    """The ``root`` of a configuration, or of the ``datamodule`` within it; None if it has none."""
    own = config.get("init_args")
    if not isinstance(own, dict):
        return None
    if isinstance(inner := own.get("datamodule"), dict):
        return root_of(inner)
    return Path(own["root"]) if isinstance(own.get("root"), str) else None


def _parse(kind: type, config: dict[str, Any]) -> tuple[ArgumentParser, Namespace]:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--it", type=kind)
    it = {name: config[name] for name in ("class_path", "init_args") if name in config}
    parsed = parser.parse_object(Namespace(it=it))
    _refuse_null(parsed.it)
    return parser, parsed


def _class(config: Namespace) -> Any:
    module, _, name = config.class_path.rpartition(".")
    return getattr(import_module(module), name)


def _refuse_null(config: Namespace) -> None:
    """Refuse null for an argument that does not allow it, which jsonargparse accepts."""
    kind = _class(config)
    allowed = signature(kind).parameters
    for argument, value in vars(config.get("init_args", Namespace())).items():
        if isinstance(value, Namespace) and "class_path" in value:
            _refuse_null(value)
        own = allowed.get(argument)
        if value is None and own and own.default is not None and not _allows_null(own.annotation):
            msg = f"{kind.__name__} must have a {argument}, not null; leave it out for its default"
            raise ArgumentError(None, msg)


def _allows_null(annotation: Any) -> bool:
    """Whether a type includes null, or is unknown."""
    return annotation in {Any, Parameter.empty} or isinstance(annotation, str) or NoneType in get_args(annotation)
