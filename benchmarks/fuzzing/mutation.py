"""Changes of bytes and values."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Values that no setting expects.
STRANGE = (
    *(None, True, False, 0, 1, -1, 2**70, 0.5, -0.0, 1e308, float("nan"), float("inf")),
    *("", "x", "é\0", "../..", "Padim", [], {}, [[]], [1, "b"], {"a": 1}, {"class_path": "Pradot"}),
)


class Changed:
    """The samples, with one of them changed.

    Attributes:
        root: Folder of the samples.
        blamed: An error must contain one of these names.
    """

    def __init__(self, root: Path, generator: random.Random) -> None:
        self.root = root
        self.blamed: tuple[str, ...] = ()
        self._generator = generator
        self._originals: dict[Path, bytes] = {}

    def write(self, path: Path, content: bytes, *blamed: str) -> None:
        """Change a sample until :meth:`restore`; an error must contain one of ``blamed``, by default its file name."""
        self._originals[path] = path.read_bytes()
        path.write_bytes(content)
        self.blamed = blamed or (path.name,)

    def mutate(self, path: Path, *blamed: str) -> None:
        """Change some bytes of a sample."""
        self.write(path, mutated(self._generator, path.read_bytes()), *blamed)

    def restore(self) -> None:
        """Restore all samples."""
        for path, content in self._originals.items():
            path.write_bytes(content)


def mutated(generator: random.Random, content: bytes) -> bytes:
    """Change, remove, insert or cut off bytes, most often near one of the ends."""
    changed = bytearray(content)
    for _ in range(generator.choice((1, 1, 2, 4, 16))):
        place = int(generator.random() ** generator.choice((1, 3)) * len(changed))
        place = place if generator.random() < 0.7 else len(changed) - place  # noqa: PLR2004
        how = generator.choice(("change", "remove", "insert", "cut"))
        if how == "change" and place < len(changed):
            changed[place] = generator.randrange(256)
        elif how == "remove":
            del changed[place : place + generator.randrange(1, 64)]
        elif how == "insert":
            changed[place:place] = generator.randbytes(generator.randrange(1, 32))
        elif how == "cut":
            del changed[place:]
    return bytes(changed)


def altered(generator: random.Random, value: Any, times: int = 1) -> Any:
    """Replace or remove values or keys in nested lists and dictionaries."""
    for _ in range(times):
        value = _altered(generator, value)
    return value


def _altered(generator: random.Random, value: Any) -> Any:
    if not isinstance(value, dict | list) or not value or generator.random() < 0.1:  # noqa: PLR2004
        return generator.choice(STRANGE)
    if isinstance(value, list):
        index = generator.randrange(len(value))
        kept = [*value[:index], *value[index + 1 :]]
        how = generator.choice(("within", "within", "remove", "repeat"))
        return {
            "within": lambda: [*value[:index], _altered(generator, value[index]), *value[index + 1 :]],
            "remove": lambda: kept,
            "repeat": lambda: [*value, value[index]],
        }[how]()
    key = generator.choice([*value])
    rest = {name: each for name, each in value.items() if name != key}
    how = generator.choice(("within", "within", "within", "remove", "rename"))
    return {
        "within": lambda: {**value, key: _altered(generator, value[key])},
        "remove": lambda: rest,
        "rename": lambda: {**rest, generator.choice(("x", "", 1, f"{key}s")): value[key]},
    }[how]()


def changed_text(generator: random.Random, content: Any, dump: Callable[[Any], str]) -> bytes:
    """A configuration with changed values or bytes."""
    text = dump(altered(generator, content, generator.choice((0, 1, 1, 2)))).encode()
    return mutated(generator, text) if generator.random() < 0.3 else text  # noqa: PLR2004
