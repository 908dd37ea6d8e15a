"""What a comparison keeps of each run: one folder, written whole or not at all.

::

    RESULTS/runs/tray-breakfast_box/Pradot/seed-0/
    ├── result.json      what ran, where, what came out; or the error
    ├── images.csv       a line for each test image: path, kind, label, score
    └── maps.npz         anomaly maps and merged masks, where there are any

A hidden file beside them lists these names, so that no folder with anything else in it is replaced.
"""

import csv
import io
import json
import re
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anomalib_ot.components.files import DAMAGED_ARCHIVE, replacing

Curve = list[list[float]]

_COLUMNS = ("image", "kind", "label", "score")
_HALF_MAX = float(np.finfo(np.float16).max)
_UNSAFE = re.compile(r'[/\\:*?"<>| %]|^\.|\.$')
# Names that Windows keeps for devices, with any suffix.
_DEVICE = re.compile(r"^(con|prn|aux|nul|com\d|lpt\d)(?=\.|$)", re.IGNORECASE)


def folder_name(label: str) -> str:
    """A label as the name of a folder, which leads nowhere else on any system."""
    printable = "".join(character if character.isprintable() else "-" for character in label)
    return _DEVICE.sub(r"\1-", _UNSAFE.sub("-", printable), count=1)


def name_of(category: str, shots: int | None) -> str:
    """A category, with the number of training images if it is not all of them."""
    return category if shots is None else f"{category}, {shots} shot{'s' * (shots > 1)}"


@dataclass(frozen=True, order=True)
class Key:
    """What tells a run from the others of a comparison.

    Args:
        category: Label of the data, with the category where there are several, as ``tray/breakfast_box``.
        model: Label of the model.
        shots: Number of training images, or None for all.
        seed: Seed of everything random.
    """

    category: str
    model: str
    shots: int | None = None
    seed: int = 0

    @property
    def folder(self) -> Path:
        """Where the run lies among the runs."""
        draw = f"seed-{self.seed}" if self.shots is None else f"{self.shots}-shot-seed-{self.seed}"
        return Path(folder_name(self.category), folder_name(self.model), draw)

    def __str__(self) -> str:
        return f"{self.model} on {name_of(self.category, self.shots)}, seed {self.seed}"


@dataclass(frozen=True)
class Predictions:
    """What a model says of the test images, in the order of their paths.

    Scores and maps are on the scale that anomalib's post-processor makes of the validation images, where 0.5 is the
    threshold, but not clipped to [0, 1], so that no two defects tie.

    Args:
        images: Path of each of the N images.
        kinds: Kind of anomaly, the name of the image's folder; ``good`` for normal images.
        labels: Integers (N,), 0 normal, 1 anomalous.
        scores: Floats (N,).
        maps: Floats (N, H, W), or None if the model makes none.
        truth: Merged true masks, booleans (N, H, W), or None if there are none.
    """

    images: list[str]
    kinds: list[str]
    labels: NDArray[np.int64]
    scores: NDArray[np.float32]
    maps: NDArray[np.floating[Any]] | None = None
    truth: NDArray[np.bool_] | None = None

    @cached_property
    def fingerprint(self) -> str:
        """Name of the test set, alike for two runs if they tested the same images with the same labels."""
        images = zip(self.images, self.kinds, self.labels.tolist(), strict=True)
        names = "\n".join(f"{kind}/{Path(image).name} {label}" for image, kind, label in images)
        return sha256(names.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Record:
    """One run.

    Args:
        key: Which run.
        config: Model, data, image size and the rest of what was asked for.
        metrics: Metrics in percent by name, such as ``image_AUROC``; those that cannot be measured are absent.
        curves: Curves by name, ``ROC`` or ``PRO``, as two lists of numbers in [0, 1]: false-positive rate, and rate of
            true positives or overlap.
        costs: ``fit_s``, ``ms_per_image``, ``openvino_ms_per_image``, ``peak_mib``, ``size_mib``, ``parameters``.
        overrides: Where the model departs from what all models share, and why.
        environment: Versions, hardware, threads, revision, time.
        test_set: The predictions' fingerprint.
        error: Why the run failed, with the traceback; empty if it did not.
        folder: Where it lies.
    """

    key: Key
    config: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    curves: dict[str, Curve] = field(default_factory=dict)
    costs: dict[str, float] = field(default_factory=dict)
    overrides: dict[str, str] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    test_set: str = ""
    error: str = ""
    folder: Path | None = None

    @property
    def failed(self) -> bool:
        """Whether there is an error instead of metrics."""
        return bool(self.error)

    @property
    def message(self) -> str:
        """The error in one line, without its traceback."""
        return self.error.strip().splitlines()[-1] if self.error else ""

    @cached_property
    def predictions(self) -> Predictions:
        """What the model said of the test images, read when asked for.

        Raises:
            ValueError: If the files are cut off or missing.
        """
        if self.folder is None:
            msg = f"{self.key} was never written"
            raise ValueError(msg)
        try:
            predictions = _read_predictions(self.folder)
        except (OSError, KeyError, TypeError, ValueError, *DAMAGED_ARCHIVE) as error:
            raise _unreadable(self.folder, error) from error
        if predictions.fingerprint != self.test_set:
            raise _unreadable(self.folder, ValueError("its images are not those that were tested"))
        return predictions


def write_record(runs: Path, record: Record, predictions: Predictions | None = None) -> Record:
    """Keep a run: written beside its place, then moved there, so that a full disk or a kill leaves no half of it.

    Args:
        runs: Folder of all runs.
        record: The run.
        predictions: What it said of the test images; None for a run that failed.

    Returns:
        The record, with its folder.

    Raises:
        OSError: If the disk is full or not writable, or there is something else in the run's place; earlier runs stay
            as they were.
    """
    return unpack_record(runs, record.key, pack_record(record, predictions))


def pack_record(record: Record, predictions: Predictions | None = None) -> dict[str, bytes]:
    """The files of a run, by name, to be sent from the process or machine where it ran."""
    files = {}
    if predictions:
        record = replace(record, test_set=predictions.fingerprint)
        files = _pack_predictions(predictions)
    content = {name: value for name, value in asdict(record).items() if name != "folder"}
    return {**files, "result.json": json.dumps(content, indent=1, allow_nan=False).encode()}


def unpack_record(runs: Path, key: Key, files: dict[str, bytes]) -> Record:
    """Write the files of :func:`pack_record` to the run's folder, in one step, and read them."""
    write_folder(runs / key.folder, files)
    return read_record(runs / key.folder)


def write_folder(folder: Path, files: dict[str, bytes]) -> None:
    """Write a folder of files, whole or not at all, in the place of what was there."""
    with replacing(folder) as partial:
        for name, content in files.items():
            (partial / name).write_bytes(content)


def read_record(folder: Path) -> Record:
    """Read a run; its predictions are read when asked for.

    Raises:
        ValueError: If ``result.json`` is cut off or no run's.
    """
    try:
        content = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        record = Record(**{**content, "key": Key(**content["key"]), "folder": folder})
        _check_types(record)
    except (OSError, TypeError, KeyError, ValueError) as error:
        raise _unreadable(folder, error) from error
    return record


def _check_types(record: Record) -> None:
    """Refuse what would fail only when the report is written."""
    expected = Record(Key("", ""))
    for name in ("config", "metrics", "curves", "costs", "overrides", "environment", "test_set", "error"):
        if not isinstance(value := getattr(record, name), type(getattr(expected, name))):
            msg = f"{name} is {value!r}"
            raise TypeError(msg)
    key = record.key
    texts = [key.category, key.model, *record.overrides.values()]
    whole = [key.seed] if key.shots is None else [key.seed, key.shots]
    numbers = [*record.metrics.values(), *record.costs.values()]
    # By the exact type, as truth values count as whole numbers.
    for values, kinds in ((texts, {str}), (whole, {int}), (numbers, {int, float})):
        if wrong := [value for value in values if type(value) not in kinds]:
            msg = f"it holds {wrong[0]!r}"
            raise TypeError(msg)


def read_records(runs: Path) -> list[Record]:
    """Read all runs of a folder, sorted by key.

    Raises:
        ValueError: If a file is cut off.
    """
    return sorted(map(read_record, run_folders(runs)), key=by_key)


def run_folders(runs: Path) -> list[Path]:
    """Folders of all runs, readable or not."""
    return [path.parent for path in runs.glob("*/*/*/result.json") if not path.parent.name.startswith(".")]


def by_key(record: Record) -> tuple[str, int, str, int]:
    """Sorts runs by category, number of training images, model and seed."""
    return record.key.category, record.key.shots or 0, record.key.model, record.key.seed


def _pack_predictions(predictions: Predictions) -> dict[str, bytes]:
    table = io.StringIO(newline="")
    writer = csv.writer(table)
    writer.writerow(_COLUMNS)
    columns = (predictions.images, predictions.kinds, predictions.labels.tolist())
    writer.writerows(zip(*columns, (f"{score:.9g}" for score in predictions.scores.tolist()), strict=True))
    files = {"images.csv": table.getvalue().encode()}
    arrays: dict[str, NDArray[Any]] = {}
    if predictions.maps is not None:
        # Half precision is for looking and for ensembles; the run's own metrics come from the maps before it.
        arrays["maps"] = predictions.maps.clip(-_HALF_MAX, _HALF_MAX).astype(np.float16)
    if predictions.truth is not None:
        arrays["truth"] = np.packbits(predictions.truth, axis=-1)
        arrays["width"] = np.array(predictions.truth.shape[-1])
    if arrays:
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)  # type: ignore[arg-type]  # the stub takes the names for its own arguments
        files["maps.npz"] = buffer.getvalue()
    return files


def _read_predictions(folder: Path) -> Predictions:
    with (folder / "images.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    maps = truth = None
    if (folder / "maps.npz").exists():
        with np.load(folder / "maps.npz") as arrays:
            maps = arrays.get("maps")
            if "truth" in arrays:
                truth = np.unpackbits(arrays["truth"], axis=-1, count=int(arrays["width"])).astype(bool)
    return Predictions(
        images=[row["image"] for row in rows],
        kinds=[row["kind"] for row in rows],
        labels=np.array([int(row["label"]) for row in rows]),
        scores=np.array([float(row["score"]) for row in rows], dtype=np.float32),
        maps=maps,
        truth=truth,
    )


def _unreadable(folder: Path, error: Exception) -> ValueError:
    return ValueError(f"the run in {folder} cannot be read ({error}); delete this folder to run it again")
