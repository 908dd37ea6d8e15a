"""Publication of exports: all files of an export replace those of an earlier one, or none does.

Files of the same names that no export of this package wrote are never replaced. They are renamed to ``NAME.earlier-1``
and so on.
"""

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
"""Suffix of a report's file name, after the name of the model."""

_PREFIX = ".export-"
_EARLIER = "earlier"
# No export takes a day: the process that made an older folder was killed.
_LEFT_BEHIND = 24 * 60 * 60


@contextmanager
def staged(export_root: Path | str, kind: ExportType) -> Iterator[Path]:
    """Make a temporary folder to export into, and move its files to the export's folder if no error occurs.

    Files of an earlier export of the same name are replaced. Other files of the same names are renamed.

    Args:
        export_root: Folder of the export.
        kind: Type of the export. A report must be among its files.

    Yields:
        The temporary folder, to be used as the ``export_root``.
    """
    root = Path(export_root)
    root.mkdir(parents=True, exist_ok=True)
    _remove_left_behind(root)
    # Before this export adds its own report.
    own = _own_files(root)
    folder = Path(mkdtemp(prefix=_PREFIX, dir=root))
    earlier = folder / _EARLIER / kind.value
    try:
        yield folder
        destination = weights_folder(root, kind)
        files = sorted(weights_folder(folder, kind).iterdir(), key=_place)
        _set_aside(files, destination, own)
        _swap(files, destination, earlier)
    finally:
        if not any(earlier.glob("*")):
            shutil.rmtree(folder, ignore_errors=True)


def weights_folder(export_root: Path | str, kind: ExportType) -> Path:
    """Make the folder of a type of export below its root, as anomalib lays it out.

    Args:
        export_root: Folder of the export.
        kind: Type of the export.

    Returns:
        The folder ``weights/KIND``.
    """
    folder = Path(export_root) / "weights" / kind.value
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def published(export_root: Path | str, staged_file: Path) -> Path:
    """Return the path of a staged file after the export.

    Args:
        export_root: Folder of the export.
        staged_file: Path of the file in the temporary folder.

    Returns:
        Its path in the export's folder.
    """
    return Path(export_root) / "weights" / staged_file.parent.name / staged_file.name


def _place(path: Path) -> int:
    """Order of a file: weights, the graph that reads them, its calibration, and the report of a complete export."""
    if path.name.endswith(REPORT):
        return 3
    return 2 if path.suffix == ".json" else int(path.suffix in {".onnx", ".xml"})


def _swap(files: Sequence[Path], destination: Path, earlier: Path) -> None:
    """Replace files of the same names by new ones. After an error, the old files are restored.

    Args:
        files: The new files, in the order of :func:`_place`.
        destination: Folder to move them to.
        earlier: New folder that holds the old files until all are replaced. A process that is killed leaves them there.
    """
    earlier.mkdir(parents=True)
    try:
        # In this order, an interruption never leaves a graph with another export's weights.
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
    """Names and sizes of all files that a report lists, including reports of killed exports."""
    own = set()
    for path in [*root.glob(f"weights/*/*{REPORT}"), *root.glob(f"{_PREFIX}*/**/*{REPORT}")]:
        if sizes := _sizes(path):
            own |= {*sizes.items(), (path.name, path.stat().st_size)}
    return own


def _sizes(report: Path) -> dict[str, int]:
    """Sizes of an export's files by name, empty if the file is not a report."""
    try:
        return dict(json.loads(report.read_text())["bytes"])
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def _set_aside(files: Sequence[Path], destination: Path, own: set[tuple[str, int]]) -> None:
    """Rename the existing files unless reports list all of them. They stay together: a graph keeps its weights."""
    existing = [destination / path.name for path in files if (destination / path.name).exists()]
    if all((path.name, path.stat().st_size) in own for path in existing):
        return
    model = next(path.name.removesuffix(REPORT) for path in files if path.name.endswith(REPORT))
    number = next(number for number in count(1) if not any(destination.glob(f"{model}.earlier-{number}.*")))
    for path in existing:
        kept = path.with_name(f"{model}.earlier-{number}{path.name.removeprefix(model)}")
        path.rename(kept)
        logger.warning("%s was not written by a checked export; it is kept as %s.", path, kept.name)


def _remove_left_behind(root: Path) -> None:
    """Remove the folders of exports killed over a day ago, except folders with the only copy of a file."""
    for folder in root.glob(f"{_PREFIX}*"):
        is_old = time.time() - folder.stat().st_mtime > _LEFT_BEHIND
        earlier = folder.glob(f"{_EARLIER}/*/*")
        if is_old and all((root / "weights" / path.parent.name / path.name).exists() for path in earlier):
            shutil.rmtree(folder, ignore_errors=True)
