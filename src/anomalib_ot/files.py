"""Files that are there whole or not at all, and take the place of none but our own."""

import json
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from zipfile import BadZipFile
from zlib import error as ZlibError  # noqa: N812

# What reading a damaged zip archive raises, among it RuntimeError for parts that seem encrypted or packed in a new way.
DAMAGED_ARCHIVE = (BadZipFile, EOFError, RuntimeError, ZlibError)


# Lists, in a folder, the names of what we wrote there; nothing else in it is ours to replace.
MARKER = ".anomalib-ot.json"


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Fill a folder that takes the place of one filled so before, once all is written; else that one stays as it was.

    Args:
        folder: The folder's name; missing parents are made.

    Yields:
        The folder to write files to, beside it.

    Raises:
        FileExistsError: If the folder holds what was not written so.
    """
    require_ours(folder)
    # Where the name is a link, what it leads to is replaced, not the link.
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = _beside(folder)
    try:
        partial.mkdir()
        yield partial
        _note(partial, (path.name for path in partial.iterdir()))
        _swap(folder, partial)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def claim(folder: Path, *names: str) -> None:
    """Make a folder if it is not there, and note that files of these names in it are ours to replace.

    Raises:
        FileExistsError: If there is one that we did not write.
    """
    require_ours(folder, *names)
    folder.mkdir(parents=True, exist_ok=True)
    if missing := {*names} - _ours(folder):
        _note(folder, _ours(folder) | missing)


def require_ours(folder: Path, *names: str) -> None:
    """Refuse to replace what we did not write.

    Args:
        folder: A folder, which may be absent.
        names: Files in it that are to be replaced; all that it holds by default.

    Raises:
        FileExistsError: If there is such a thing.
    """
    if not folder.exists() and not folder.is_symlink():
        return
    if not folder.is_dir():
        msg = f"{folder} is no folder; move it away, or choose another output"
        raise FileExistsError(msg)
    ours = _ours(folder)
    foreign = [
        path.name
        for path in sorted(folder.iterdir())
        if (path.name != MARKER or path.is_dir())
        and (not names or path.name in {*names, MARKER})
        and (path.name not in ours or path.is_dir())
    ]
    if foreign:
        more = f" and {len(foreign) - 1} more" if foreign[1:] else ""
        msg = (
            f"{folder} holds {foreign[0]}{more}, which anomalib-ot did not write there; "
            "move that away, or choose another output"
        )
        raise FileExistsError(msg)


def _ours(folder: Path) -> set[str]:
    """Names of what we wrote in a folder; none where that cannot be read."""
    try:
        return {*map(str, json.loads((folder / MARKER).read_text(encoding="utf-8")))}
    except (OSError, TypeError, ValueError):
        return set()


def _note(folder: Path, names: Iterable[str]) -> None:
    write_text(folder / MARKER, json.dumps(sorted(names)))


def _swap(folder: Path, partial: Path) -> None:
    """Give a folder's name to another one; whatever breaks this off, the earlier one is there whole or not at all."""
    require_ours(folder)
    earlier = _beside(folder)
    with suppress(FileNotFoundError):
        folder.rename(earlier)
    try:
        partial.rename(folder)
    except OSError:
        with suppress(OSError):
            earlier.rename(folder)
        raise
    # File by file, and not what another process may have put there since.
    ours = {*_ours(earlier), MARKER}
    with suppress(OSError):
        for path in [*earlier.iterdir()]:
            if path.name in ours:
                path.unlink()
        earlier.rmdir()


def write_text(path: Path, content: str) -> Path:
    """Write a file, whole or not at all; an earlier one stays until then."""
    partial = _beside(path)
    try:
        partial.write_text(content, encoding="utf-8", newline="\n")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _beside(path: Path) -> Path:
    """A hidden name that no other process writes to."""
    return path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}")
