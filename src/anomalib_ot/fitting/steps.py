"""The steps of a fit: the finished ones, so that a repeated call skips them, and the time that one takes."""

import json
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from anomalib_ot.comparison.environment import installed_versions
from anomalib_ot.files import claim, write_text

logger = logging.getLogger(__name__)

STEPS = "steps.json"


class Steps:
    """What each finished step saw and found, in a file that is complete after each of them.

    Args:
        folder: Folder of the file.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._kept = _read(folder / STEPS)

    def found(self, name: str, seen: Any) -> Any:
        """What a step found.

        Args:
            name: Name of the step, as in "the export".
            seen: What the step depends on, besides the versions of the packages, as plain values.

        Returns:
            Plain values; None if the step is not finished, or what it depends on has changed since, or a file of it is
            missing.
        """
        kept = self._kept.get(name)
        if kept is None:
            return None
        if kept["seen"] != _digest(seen):
            logger.info("%s is repeated: images, settings or versions have changed.", name.capitalize())
            return None
        # Someone may have tidied up.
        if missing := [name for name in kept["files"] if not Path(name).is_file()]:
            logger.info("%s is repeated: %s is missing.", name.capitalize(), missing[0])
            return None
        logger.info("%s is skipped: it is finished, and nothing has changed since.", name.capitalize())
        return kept["found"]

    def finish(self, name: str, seen: Any, found: Any, files: Iterable[Path] = ()) -> None:
        """Keep what a step has found, as plain values, and the names of the files that it has made."""
        self._kept[name] = {"seen": _digest(seen), "found": found, "files": [*map(str, files)]}
        claim(self._folder, STEPS)
        write_text(self._folder / STEPS, json.dumps(self._kept))


@contextmanager
def elapsed_time(step: str) -> Iterator[None]:
    """Show the time that a step has taken, on a terminal alone. The step prints and logs nothing."""
    console = Console(stderr=True)
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        progress.add_task(step, total=None)
        yield


def _digest(seen: Any) -> str:
    return sha256(json.dumps([seen, installed_versions()], sort_keys=True).encode()).hexdigest()


def _read(path: Path) -> dict[str, Any]:
    """The finished steps in a file; none if it is missing or damaged."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        return {name: {key: each[key] for key in ("seen", "found", "files")} for name, each in kept.items()}
    except FileNotFoundError:
        pass
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        logger.warning("The finished steps in %s cannot be read (%s), and are repeated.", path, error)
    return {}
