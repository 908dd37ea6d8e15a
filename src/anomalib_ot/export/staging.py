"""Exports that take the place of earlier ones whole, and of no file that another has written."""

import json
import logging
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from tempfile import mkdtemp

from anomalib.deploy import ExportType

logger = logging.getLogger(__name__)

REPORT = ".parity.json"
"""How the name of an export's report ends, after the name of the model."""

_PREFIX = ".export-"
_EARLIER = "earlier"
# No export takes a day: who made the folder was killed.
_LEFT_BEHIND = 24 * 60 * 60


@contextmanager
def staged(export_root: Path | str, kind: ExportType) -> Iterator[Path]:
    """A folder to export into, whose files go to the export's own folder when all is well.

    Files of an earlier export of the same name are replaced; another's keep their content under a new name.

    Args:
        export_root: Folder of the export.
        kind: Kind of the export, whose report is among its files.

    Yields:
        The folder, to be used as the ``export_root``.
    """
    root = Path(export_root)
    root.mkdir(parents=True, exist_ok=True)
    _remove_left_behind(root)
    # Reports of exports before this one.
    own = _own_files(root)
    folder = Path(mkdtemp(prefix=_PREFIX, dir=root))
    earlier = folder / _EARLIER / kind.value
    try:
        yield folder
        destination = root / "weights" / kind.value
        destination.mkdir(parents=True, exist_ok=True)
        files = sorted((folder / "weights" / kind.value).iterdir(), key=_place)
        _set_aside(files, destination, own)
        _swap(files, destination, earlier)
    finally:
        if not any(earlier.glob("*")):
            shutil.rmtree(folder, ignore_errors=True)


def final(export_root: Path | str, staged_file: Path) -> Path:
    """Where a staged file has gone."""
    return Path(export_root) / "weights" / staged_file.parent.name / staged_file.name


def _place(path: Path) -> int:
    """Weights come before the graph that reads them, and the report last: where there is one, the model is whole."""
    return 2 if path.suffix == ".json" else int(path.suffix in {".onnx", ".xml"})


def _swap(files: Sequence[Path], destination: Path, earlier: Path) -> None:
    """Put files in the place of those of the same names; after an error these are back.

    Args:
        files: The new files, in the order of :func:`_place`.
        destination: Folder to put them in.
        earlier: New folder for those that were there, until all is done. A process that is killed leaves them here.
    """
    earlier.mkdir(parents=True)
    try:
        # Whatever breaks this off, no graph has another export's weights.
        for path in reversed(files):
            if (destination / path.name).exists():
                (destination / path.name).replace(earlier / path.name)
        for path in files:
            path.replace(destination / path.name)
    except BaseException:
        for path in reversed(files):
            if not path.exists():
                (destination / path.name).unlink(missing_ok=True)
        for path in sorted(earlier.iterdir(), key=_place):
            path.replace(destination / path.name)
        raise
    shutil.rmtree(earlier)


def _own_files(root: Path) -> set[tuple[str, int]]:
    """Names and sizes of files that are in a report, be it that of an export which was killed on the way."""
    own = set()
    for path in [*root.glob(f"weights/*/*{REPORT}"), *root.glob(f"{_PREFIX}*/**/*{REPORT}")]:
        if sizes := _sizes(path):
            own |= {*sizes.items(), (path.name, path.stat().st_size)}
    return own


def _sizes(report: Path) -> dict[str, int]:
    """Sizes of the files of an export by name, none where a file is no report."""
    try:
        return dict(json.loads(report.read_text())["bytes"])
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def _set_aside(files: Sequence[Path], destination: Path, own: set[tuple[str, int]]) -> None:
    """Rename what is in the way, unless all of it is of an export of ours: a graph keeps its weights."""
    in_the_way = [destination / path.name for path in files if (destination / path.name).exists()]
    if all((path.name, path.stat().st_size) in own for path in in_the_way):
        return
    model = next(path.name.removesuffix(REPORT) for path in files if path.name.endswith(REPORT))
    number = next(number for number in count(1) if not any(destination.glob(f"{model}.earlier-{number}.*")))
    for path in in_the_way:
        kept = path.with_name(f"{model}.earlier-{number}{path.name.removeprefix(model)}")
        path.rename(kept)
        logger.warning("%s is not of a checked export, and is kept as %s.", path, kept.name)


def _remove_left_behind(root: Path) -> None:
    """Remove the folders of exports that were killed, unless one has files that are nowhere else."""
    for folder in root.glob(f"{_PREFIX}*"):
        is_old = time.time() - folder.stat().st_mtime > _LEFT_BEHIND
        earlier = folder.glob(f"{_EARLIER}/*/*")
        if is_old and all((root / "weights" / path.parent.name / path.name).exists() for path in earlier):
            shutil.rmtree(folder, ignore_errors=True)
