"""Files of a prediction: a table, a list and overlays, complete after each image."""

import csv
import json
import logging
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO, Literal, TextIO

import numpy as np
from numpy.typing import NDArray

from anomalib_ot.files import claim, require_ours
from anomalib_ot.images.folder import IMAGE_SUFFIXES
from anomalib_ot.prediction_table import COLUMNS, TABLE

from .drawing import overlay
from .inferencer import Prediction

logger = logging.getLogger(__name__)

LIST = "predictions.json"
OVERLAYS = "overlays"
Overlays = Literal["none", "anomalous", "all"]

_END = b"\n]}\n"


class Results:
    """Files of a prediction in a folder.

    ``predictions.csv`` has a row for each image, and ``predictions.json`` an object with more details. Both are
    complete after each image, whatever ends the process. Results of an earlier run are moved to a folder ``earlier-1``
    and so on.

    Args:
        folder: Folder to write to.
        about: What is the same for all images, for the head of ``predictions.json``.
        overlays: Images that are drawn to the folder ``overlays``.

    Attributes:
        labels: Number of images by label.

    Raises:
        FileExistsError: If the folder contains files of these names that anomalib-ot did not write.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any], overlays: Overlays = "anomalous") -> None:
        self.labels: dict[str, int] = {}
        self._folder = folder
        self._overlays = overlays
        _require_ours(folder)
        _set_aside(folder)
        claim(folder, TABLE, LIST)
        self._table: TextIO = (folder / TABLE).open("w", encoding="utf-8", errors="backslashreplace", newline="")
        self._writer = csv.writer(self._table, lineterminator="\n")
        self._writer.writerow(COLUMNS)
        self._table.flush()
        self._list: BinaryIO = (folder / LIST).open("wb")
        head = json.dumps({**about, "predictions": []}, indent=1)
        self._list.write(head[: head.rindex("]")].encode() + _END)
        self._list.flush()

    def close(self) -> None:
        """Close the files."""
        self._table.close()
        self._list.close()

    def add(self, path: Path, name: Path, pixels: NDArray[np.float32], prediction: Prediction) -> None:
        """Add the prediction of an image.

        Args:
            path: Path of the image.
            name: The path within the folder of the images, for its overlay.
            pixels: RGB pixels (H, W, 3) in [0, 1].
            prediction: The prediction.
        """
        drawn = None
        if self._overlays == "all" or (self._overlays == "anomalous" and prediction.is_anomalous):
            drawn = Path(OVERLAYS) / overlay_name(name)
            (self._folder / drawn).parent.mkdir(parents=True, exist_ok=True)
            overlay(pixels, prediction).save(self._folder / drawn)
        row = {
            "path": str(path),
            "score": _shortest(prediction.score),
            "threshold": None if prediction.threshold is None else round(prediction.threshold, 6),
            "label": prediction.label,
            "score_raw": _shortest(prediction.raw_score),
            "p_value": None if prediction.p_value is None else float(f"{prediction.p_value:.6g}"),
        }
        self._write(row, overlay=drawn and drawn.as_posix(), remark=prediction.blank or None)

    def add_unreadable(self, path: Path, why: str) -> None:
        """Add an image without a prediction, with the label ``unreadable``."""
        self._write({"path": str(path), "label": "unreadable"}, remark=why)

    def _write(self, row: dict[str, Any], **details: Any) -> None:
        values = ["" if row.get(name) is None else row[name] for name in COLUMNS]
        # Infinite numbers are not part of JSON.
        finite = {name: str(each) if _is_infinite(each) else each for name, each in {**row, **details}.items()}
        separator = b",\n" if self.labels else b"\n"
        self.labels[row["label"]] = self.labels.get(row["label"], 0) + 1
        try:
            self._writer.writerow(values)
            self._table.flush()
        finally:
            # An interruption in between must not leave an image in one file only.
            self._list.seek(-len(_END), 2)
            self._list.write(separator + json.dumps(finite, allow_nan=False).encode() + _END)
            self._list.flush()


def overlay_name(name: Path) -> Path:
    """Path of an overlay for the path of an image; no two images have the same.

    Example:
        >>> [str(overlay_name(Path(name))) for name in ("a/1.png", "a/1.jpg")]
        ['a/1.png', 'a/1.jpg.png']
    """
    is_plain = name.suffix == ".png" and Path(name.stem).suffix.lower() not in IMAGE_SUFFIXES
    return name if is_plain else name.with_name(f"{name.name}.png")


def _require_ours(folder: Path) -> None:
    """Check that no foreign file has the place of a result.

    Raises:
        FileExistsError: If one has.
    """
    require_ours(folder, TABLE, LIST)
    if (folder / OVERLAYS).exists() and not (folder / TABLE).exists():
        msg = f"{folder} holds {OVERLAYS}, which anomalib-ot did not write there; move it, or choose another output"
        raise FileExistsError(msg)


def _set_aside(folder: Path) -> None:
    """Move the results of an earlier run to a folder of their own."""
    existing = [folder / name for name in (LIST, OVERLAYS, TABLE) if (folder / name).exists()]
    if not existing:
        return
    earlier = next(path for number in count(1) if not (path := folder / f"earlier-{number}").exists())
    earlier.mkdir()
    for path in existing:
        path.rename(earlier / path.name)
    logger.info("The results of an earlier run are now in %s.", earlier)


def _shortest(value: float | None) -> float | None:
    """A number with the fewest digits that identify it in single precision."""
    return None if value is None else float(str(np.float32(value)))


def _is_infinite(value: Any) -> bool:
    return isinstance(value, float) and not np.isfinite(value)
