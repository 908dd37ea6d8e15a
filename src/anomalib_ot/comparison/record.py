"""Storage of runs. Each run has a folder, which is written completely or not at all.

::

    RESULTS/runs/tray-breakfast_box/Pradot/seed-0/
    ├── result.json      configuration, environment, and metrics or the error
    ├── images.csv       a line for each test image: path, kind, label, score, and the p-value if it is known
    └── maps.npz         anomaly maps and merged masks, if there are any

A hidden file in the folder lists these names. A folder with any other file is never replaced.
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

from anomalib_ot.files import DAMAGED_ARCHIVE, replacing

from .verdicts import Verdicts

Curve = list[list[float]]

_COLUMNS = ("image", "kind", "label", "score")
_P_VALUE = "p_value"
_HALF_MAX = float(np.finfo(np.float16).max)
_UNSAFE = re.compile(r'[/\\:*?"<>| %]|^\.|\.$')
# Device names that Windows reserves, with any suffix.
_DEVICE = re.compile(r"^(con|prn|aux|nul|com\d|lpt\d)(?=\.|$)", re.IGNORECASE)


def folder_name(label: str) -> str:
    """A label as a valid folder name on all systems, without path separators."""
    printable = "".join(character if character.isprintable() else "-" for character in label)
    return _DEVICE.sub(r"\1-", _UNSAFE.sub("-", printable), count=1)


def name_of(category: str, shots: int | None) -> str:
    """A category, with the number of training images if not all are used."""
    return category if shots is None else f"{category}, {shots} shot{'s' * (shots > 1)}"


@dataclass(frozen=True, order=True)
class Key:
    """Identifies a run of a comparison.

    Args:
        category: Label of the data, with the category if there are several, such as ``tray/breakfast_box``.
        model: Label of the model.
        shots: Number of training images, or None for all.
        seed: Seed of all random numbers.
    """

    category: str
    model: str
    shots: int | None = None
    seed: int = 0

    @property
    def folder(self) -> Path:
        """Folder of the run, relative to the folder of all runs."""
        draw = f"seed-{self.seed}" if self.shots is None else f"{self.shots}-shot-seed-{self.seed}"
        return Path(folder_name(self.category), folder_name(self.model), draw)

    def __str__(self) -> str:
        return f"{self.model} on {name_of(self.category, self.shots)}, seed {self.seed}"


@dataclass(frozen=True)
class Predictions:
    """Predictions of a model for the test images, ordered by path.

    Scores and maps are normalised by the validation images like those of anomalib's post-processor, with the threshold
    at 0.5. They are not clipped to [0, 1], so that defects do not tie.

    Args:
        images: Path of each of the N images.
        kinds: Kind of anomaly, the name of the image's folder; ``good`` for normal images.
        labels: Integers (N,), 0 normal, 1 anomalous.
        scores: Floats (N,).
        maps: Floats (N, H, W), or None if the model has no maps.
        truth: Merged ground-truth masks, booleans (N, H, W), or None if there are none.
        p_values: Conformal p-values (N,) of the raw scores, or None if the model is not calibrated.
    """

    images: list[str]
    kinds: list[str]
    labels: NDArray[np.int64]
    scores: NDArray[np.float32]
    maps: NDArray[np.floating[Any]] | None = None
    truth: NDArray[np.bool_] | None = None
    p_values: NDArray[np.float64] | None = None

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the test set. It is equal for runs that tested the same images with the same labels."""
        lines = (f"{kind}/{name} {label}" for (kind, name), label in zip(self.names, self.labels.tolist(), strict=True))
        return sha256("\n".join(lines).encode()).hexdigest()[:16]

    @property
    def names(self) -> list[tuple[str, str]]:
        """Kind and file name of each image. They match the images of different models."""
        return [(kind, Path(image).name) for kind, image in zip(self.kinds, self.images, strict=True)]

    def name_order(self) -> list[int]:
        """Indices that sort the images by kind and file name. Images that share both keep their order."""
        names = self.names
        return sorted(range(len(names)), key=lambda index: names[index])


@dataclass(frozen=True)
class Record:
    """One run.

    Args:
        key: Key of the run.
        config: Model, data, image size and the other settings of the job.
        metrics: Metrics in percent by name, such as ``image_AUROC``; those that could not be measured are absent.
        curves: Curves by name, ``ROC`` or ``PRO``, as two lists of numbers in [0, 1]: false-positive rate, and rate of
            true positives or overlap.
        costs: ``fit_s``, ``ms_per_image``, ``openvino_ms_per_image``, ``peak_mib``, ``size_mib``, ``parameters``.
        overrides: Settings in which the model differs from the shared ones, with the reason.
        environment: Versions, hardware, threads, revision, time.
        test_set: The predictions' fingerprint.
        error: Error of a failed run with its traceback; empty if the run succeeded.
        verdicts: Promised and realised false alarms; None if the model promises no rate, or an earlier version ran it.
        folder: Folder of the run.
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
    verdicts: Verdicts | None = None
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
        """Predictions for the test images. They are read on first use.

        Raises:
            ValueError: If the files are truncated or missing.
        """
        if self.folder is None:
            msg = f"{self.key} has no predictions, because it was not written to a folder"
            raise ValueError(msg)
        try:
            predictions = _read_predictions(self.folder)
        except (OSError, KeyError, TypeError, ValueError, *DAMAGED_ARCHIVE) as error:
            raise _unreadable(self.folder, error) from error
        if predictions.fingerprint != self.test_set:
            raise _unreadable(self.folder, ValueError("images.csv does not match the tested images"))
        return predictions


def write_record(runs: Path, record: Record, predictions: Predictions | None = None) -> Record:
    """Write a run. It is written to a temporary folder and then moved, so that no incomplete run can remain.

    Args:
        runs: Folder of all runs.
        record: The run.
        predictions: Predictions for the test images; None for a failed run.

    Returns:
        The record, with its folder.

    Raises:
        OSError: If the disk is full or not writable, or the run's folder contains other files. Earlier runs do not
            change.
    """
    return unpack_record(runs, record.key, pack_record(record, predictions))


def pack_record(record: Record, predictions: Predictions | None = None) -> dict[str, bytes]:
    """The files of a run by name, to be sent from the process or machine of the run."""
    files = {}
    if predictions:
        record = replace(record, test_set=predictions.fingerprint)
        files = _pack_predictions(predictions)
    content = {name: value for name, value in asdict(record).items() if name != "folder"}
    return {**files, "result.json": json.dumps(content, indent=1, allow_nan=False).encode()}


def unpack_record(runs: Path, key: Key, files: dict[str, bytes]) -> Record:
    """Write the files of :func:`pack_record` to the folder of the run in one step, and read them."""
    write_folder(runs / key.folder, files)
    return read_record(runs / key.folder)


def write_folder(folder: Path, files: dict[str, bytes]) -> None:
    """Write a folder of files completely or not at all. It replaces an earlier folder of the same path."""
    with replacing(folder) as partial:
        for name, content in files.items():
            (partial / name).write_bytes(content)


def read_record(folder: Path) -> Record:
    """Read a run. Its predictions are read on first use.

    Raises:
        ValueError: If ``result.json`` is truncated or does not belong to a run.
    """
    try:
        content = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        verdicts = content.get("verdicts")
        parts = {"key": Key(**content["key"]), "verdicts": None if verdicts is None else Verdicts(**verdicts)}
        record = Record(**{**content, **parts, "folder": folder})
        _check_types(record)
    except (OSError, TypeError, KeyError, ValueError) as error:
        raise _unreadable(folder, error) from error
    return record


def _check_types(record: Record) -> None:
    """Refuse values that would fail later, when the report is written."""
    expected = Record(Key("", ""))
    for name in ("config", "metrics", "curves", "costs", "overrides", "environment", "test_set", "error"):
        if not isinstance(value := getattr(record, name), type(getattr(expected, name))):
            msg = f"{name} is {value!r}"
            raise TypeError(msg)
    key = record.key
    texts = [key.category, key.model, *record.overrides.values()]
    whole = [key.seed] if key.shots is None else [key.seed, key.shots]
    numbers = [*record.metrics.values(), *record.costs.values()]
    flags: list[bool] = []
    # The verdicts check their counts themselves.
    if it := record.verdicts:
        texts.append(it.calibration_source)
        numbers += [it.false_alarm_rate, it.supported_rate]
        flags.append(it.calibrated_on_test)
    # Exact types, because bool is a subclass of int.
    for values, kinds in ((texts, {str}), (whole, {int}), (numbers, {int, float}), (flags, {bool})):
        if wrong := [value for value in values if type(value) not in kinds]:
            msg = f"it holds {wrong[0]!r}"
            raise TypeError(msg)


def read_records(runs: Path) -> list[Record]:
    """Read all runs of a folder, sorted by key.

    Raises:
        ValueError: If a file is truncated.
    """
    return sorted(map(read_record, run_folders(runs)), key=by_key)


def run_folders(runs: Path) -> list[Path]:
    """Folders of all runs, including unreadable ones."""
    return [path.parent for path in runs.glob("*/*/*/result.json") if not path.parent.name.startswith(".")]


def by_key(record: Record) -> tuple[str, int, str, int]:
    """Sort key of runs: category, number of training images, model and seed."""
    return record.key.category, record.key.shots or 0, record.key.model, record.key.seed


def _pack_predictions(predictions: Predictions) -> dict[str, bytes]:
    table = io.StringIO(newline="")
    writer = csv.writer(table)
    p_values = [] if predictions.p_values is None else [predictions.p_values]
    numbers: list[NDArray[np.floating[Any]]] = [predictions.scores, *p_values]
    writer.writerow((*_COLUMNS, _P_VALUE) if p_values else _COLUMNS)
    columns = (predictions.images, predictions.kinds, predictions.labels.tolist())
    writer.writerows(zip(*columns, *([f"{each:.9g}" for each in some.tolist()] for some in numbers), strict=True))
    files = {"images.csv": table.getvalue().encode()}
    arrays: dict[str, NDArray[Any]] = {}
    if predictions.maps is not None:
        # Half precision suffices for figures and ensembles. The metrics of the run use the maps before conversion.
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
    p_values = [float(row[_P_VALUE]) for row in rows if _P_VALUE in row]
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
        p_values=np.array(p_values) if p_values else None,
    )


def _unreadable(folder: Path, error: Exception) -> ValueError:
    return ValueError(f"the run in {folder} cannot be read ({error}); delete this folder to run it again")
