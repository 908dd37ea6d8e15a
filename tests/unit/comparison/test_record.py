"""Tests of the storage of runs, which are written completely or not at all."""

import errno
import json
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path, PureWindowsPath

import numpy as np
import pytest

from anomalib_ot.comparison import Key, Predictions, Record, Verdicts, read_records, write_record
from anomalib_ot.comparison.record import folder_name
from anomalib_ot.files import MARKER

RNG = np.random.default_rng(0)


def predictions(n=6, maps=True):
    labels = np.arange(n) % 2
    return Predictions(
        images=[f"/somewhere/test/{'crack' if label else 'good'}/{index:03}.png" for index, label in enumerate(labels)],
        kinds=["crack" if label else "good" for label in labels],
        labels=labels,
        scores=RNG.normal(size=n).astype(np.float32),
        maps=RNG.normal(size=(n, 5, 11)).astype(np.float32) if maps else None,
        truth=RNG.random((n, 5, 11)) > 0.5 if maps else None,
    )


RECORD = Record(
    Key("tray/breakfast", "a + b: 1 %", 2, 3),
    {"model": {"class_path": "Padim"}},
    {"image_AUROC": 90.5},
    {"ROC": [[0.0, 1.0], [0.0, 1.0]]},
    {"fit_s": 1.5},
    {"why": "so"},
    {"python": "3.11"},
)


@pytest.mark.parametrize("maps", [True, False])
def test_what_is_read_is_what_was_written(tmp_path, maps):
    said = predictions(maps=maps)
    write_record(tmp_path, RECORD, said)
    (record,) = read_records(tmp_path)
    assert (record.key, record.config, record.metrics, record.curves) == (
        RECORD.key,
        RECORD.config,
        RECORD.metrics,
        RECORD.curves,
    )
    assert (record.costs, record.overrides, record.environment) == (RECORD.costs, RECORD.overrides, RECORD.environment)
    assert record.folder.relative_to(tmp_path).parts == ("tray-breakfast", "a-+-b--1--", "2-shot-seed-3")
    again = record.predictions
    assert (again.images, again.kinds, again.labels.tolist()) == (said.images, said.kinds, said.labels.tolist())
    np.testing.assert_array_equal(again.scores, said.scores)
    if maps:
        np.testing.assert_array_equal(again.truth, said.truth)
        np.testing.assert_allclose(again.maps, said.maps, rtol=2**-11)
    else:
        assert again.maps is None
        assert again.truth is None


VERDICTS = Verdicts(0.01, 0.05, 19, "folds", 1, 3, 2, 3, calibrated_on_test=False)


def test_verdicts_and_p_values_are_read_as_they_were_written(tmp_path):
    p_values = np.array([1 / 3, 0.05, 1.0, 0.1, 0.25, 0.5])
    record = write_record(tmp_path, replace(RECORD, verdicts=VERDICTS), replace(predictions(), p_values=p_values))
    assert record.verdicts == VERDICTS
    np.testing.assert_allclose(record.predictions.p_values, p_values, rtol=1e-8)


def test_a_run_of_a_version_without_verdicts_is_read(tmp_path):
    folder = write_record(tmp_path, RECORD, predictions()).folder
    content = json.loads((folder / "result.json").read_text())
    del content["verdicts"]
    (folder / "result.json").write_text(json.dumps(content))
    (record,) = read_records(tmp_path)
    assert record.verdicts is None
    assert record.predictions.p_values is None


def test_a_map_beyond_half_precision_stays_finite(tmp_path):
    said = predictions()
    said.maps[0, 0, 0] = 1e9
    assert np.isfinite(write_record(tmp_path, RECORD, said).predictions.maps).all()


def test_test_sets_are_told_apart_by_their_images_and_labels_not_by_their_place():
    said = predictions()
    moved = predictions()
    moved.images[:] = [path.replace("/somewhere", "/else") for path in moved.images]
    other = predictions()
    other.images[0] = other.images[0].replace("000", "100")
    relabelled = predictions()
    relabelled.labels[0] = 1
    assert said.fingerprint == moved.fingerprint
    assert len({said.fingerprint, other.fingerprint, relabelled.fingerprint}) == 3


def test_full_disk_leaves_the_finished_runs_and_no_half_one(tmp_path, monkeypatch):
    write_record(tmp_path, RECORD, predictions())
    second = Record(Key("tray/breakfast", "other", 2, 3))
    full = OSError(errno.ENOSPC, "No space left on device")

    def write_a_little(path, content):
        if path.name == "maps.npz":
            raise full
        return Path(path).open("wb").write(content)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", write_a_little)
        for record in (second, RECORD):
            with pytest.raises(OSError, match="No space left"):
                write_record(tmp_path, record, predictions())
    (record,) = read_records(tmp_path)
    assert record.key == RECORD.key
    assert record.predictions.maps is not None
    assert {path.name for path in tmp_path.rglob(".*")} == {MARKER}


@pytest.mark.parametrize("name", ["result.json", "maps.npz", "images.csv"])
@pytest.mark.parametrize("share", [0, 0.5])
def test_file_that_is_cut_off(tmp_path, name, share):
    folder = write_record(tmp_path, RECORD, predictions()).folder
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"cannot be read .* delete this folder to run it again"):
        _ = read_records(tmp_path)[0].predictions


@pytest.mark.parametrize("kind", [b"\0\0cc", b"\0\0\b\0", b"\1\0\0\0"], ids=["unknown", "wrong", "encrypted"])
def test_maps_packed_in_another_way(tmp_path, kind):
    path = write_record(tmp_path, RECORD, predictions()).folder / "maps.npz"
    # Of each part, in the table of contents: signature, two versions, flags and the kind of compression.
    content = re.sub(rb"(PK\x01\x02.{4}).{4}", lambda part: part[1] + kind, path.read_bytes(), flags=re.DOTALL)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot be read .* delete this folder to run it again"):
        _ = read_records(tmp_path)[0].predictions


def test_runs_of_a_later_format_are_refused(tmp_path):
    folder = write_record(tmp_path, RECORD, predictions()).folder
    (folder / "result.json").write_text('{"key": {"category": "a", "model": "b"}, "unknown": 1}')
    with pytest.raises(ValueError, match="unknown"):
        read_records(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"environment": [1]},
        {"curves": 1},
        {"error": None},
        {"metrics": {"image_AUROC": "x"}},
        {"overrides": {"width": 1}},
        {"verdicts": [1]},
        {"verdicts": {"false_alarms": 1}},
        {"verdicts": {**asdict(VERDICTS), "supported_rate": "5 %"}},
        {"verdicts": {**asdict(VERDICTS), "calibrated_on_test": 1}},
        {"verdicts": {**asdict(VERDICTS), "detected": 4}},
        {"key": {"category": 1, "model": "b"}},
        {"key": {"category": "a", "model": "b", "shots": ""}},
        {"key": {"category": "a", "model": "b", "shots": False}},
        {"key": {"category": "a", "model": "b", "seed": 0.5}},
        {"key": {"category": "a", "model": "b", "seed": None}},
    ],
)
def test_values_of_another_form_are_refused_before_the_report(tmp_path, change):
    folder = write_record(tmp_path, RECORD, predictions()).folder
    content = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps({**content, **change}))
    with pytest.raises(ValueError, match="delete this folder to run it again"):
        read_records(tmp_path)


def test_a_run_takes_the_place_of_the_one_before(tmp_path):
    write_record(tmp_path, RECORD, predictions())
    failed = Record(RECORD.key, error="Traceback\nValueError: why\n")
    write_record(tmp_path, failed)
    (record,) = read_records(tmp_path)
    assert (record.failed, record.message) == (True, "ValueError: why")
    with pytest.raises(ValueError, match="cannot be read"):
        _ = record.predictions
    shutil.rmtree(record.folder)
    assert read_records(tmp_path) == []


@pytest.mark.parametrize(
    "label",
    [
        *(
            ".",
            "..",
            "...",
            "../../etc",
            "/etc/passwd",
            "a/../../b",
            "C:\\Windows",
            "c:x",
            "\\\\server\\share",
            "~root",
        ),
        *("con", "NUL", "aux.txt", "com1", "LPT9.x", "a.", "a ", " ", "\0", "a\nb", "\u202e", "\ud800"),
    ],
)
def test_a_label_leads_out_of_no_folder_on_any_system(tmp_path, label):
    name = folder_name(label)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / name).mkdir()
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [name]
    assert PureWindowsPath("runs", name).parts == ("runs", name)
    assert not PureWindowsPath(name).is_reserved()
    assert name.isprintable()
    assert name[-1] not in ". "


def test_usual_labels_keep_the_folders_that_they_had():
    labels = {"Foct, online": "Foct,-online", "a + b: 1 %": "a-+-b--1--", "v1.2": "v1.2", "tray/box": "tray-box"}
    assert {label: folder_name(label) for label in labels} == labels


def test_a_run_replaces_nothing_that_it_did_not_write(tmp_path):
    folder = write_record(tmp_path, RECORD, predictions()).folder
    (folder / "notes.txt").write_text("work of days")
    with pytest.raises(FileExistsError, match=r"holds notes\.txt, which anomalib-ot did not write"):
        write_record(tmp_path, RECORD, predictions())
    assert (folder / "notes.txt").read_text() == "work of days"
    assert read_records(tmp_path)[0].predictions
