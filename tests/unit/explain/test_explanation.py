import json
import os
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from anomalib.data import PredictDataset
from anomalib.models import Padim
from PIL import Image

import anomalib_ot
from anomalib_ot import MODELS, Duo, Foct, Pradot, WtFlow
from anomalib_ot.drawing.data import Data, labels_of, paths_of
from anomalib_ot.drawing.pictures import extent_of, name_of
from anomalib_ot.explain.data import read_data
from anomalib_ot.explain.explanation import explain, summary, write_views
from anomalib_ot.explain.views import ScoredSubject, views_of
from anomalib_ot.files import MARKER
from anomalib_ot.host.checkpoint_class import recorded_name
from anomalib_ot.host.checkpoint_files import read_checkpoint
from anomalib_ot.images.reading import EIGHT_BITS, Reading


@pytest.fixture
def folder(tmp_path):
    for name in ("a/000.png", "a/001.png", "b/000.png"):
        path = tmp_path / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (80, 72), (len(name), ord(name[0]), 9)).save(path)
    return tmp_path / "pictures"


@pytest.fixture
def checkpoint(tmp_path):
    def make(model, **entries):
        content = {
            "state_dict": model.state_dict(),
            "pytorch-lightning_version": "2",
            "hyper_parameters": {},
            **entries,
        }
        torch.save(content, tmp_path / "model.ckpt")
        return tmp_path / "model.ckpt"

    return make


def test_every_model_has_evidence_and_views_of_its_own():
    views = {kind: [*views_of(kind).all] for kind in (Pradot, Foct, WtFlow, Duo)}
    assert views[Pradot] == ["evidence", "assignments", "restoration", "prototypes", "projection", "cells"]
    assert views[Foct] == ["evidence", "transport", "foreground", "growth"]
    assert views[WtFlow] == ["evidence", "flow"]
    assert {*views[Duo]} == {*views[Pradot], *views[WtFlow]}
    assert [*views_of(Foct, ["growth", "evidence"]).all] == ["evidence", "growth"]


def test_a_model_has_the_views_of_the_class_that_it_extends():
    class MyPradot(Pradot):
        pass

    assert views_of(MyPradot).all == views_of(Pradot).all


def test_an_unknown_view_lists_those_there_are():
    with pytest.raises(ValueError, match="WtFlow has no views assignments; it has evidence, flow"):
        views_of(WtFlow, ["evidence", "assignments"])


def test_other_models_have_no_views():
    with pytest.raises(ValueError, match="Padim has no views; models with views are Duo, Foct, Pradot, WtFlow"):
        views_of(Padim)


@pytest.mark.parametrize("name", ["Foct", "Pradot", "WtFlow"])
def test_the_model_is_found_from_a_checkpoint_that_does_not_record_it(fitted, checkpoint, name):
    path = checkpoint(fitted(name))
    assert recorded_name(read_checkpoint(path), path) == name


@pytest.mark.parametrize("name", ["Duo", "Foct", "Pradot", "WtFlow"])
def test_the_model_that_a_checkpoint_records_is_taken(checkpoint, name):
    # Its tensors may have any names.
    path = checkpoint(torch.nn.Linear(1, 1), anomalib_ot={"format": 2, "model": name})
    assert recorded_name(read_checkpoint(path), path) == name


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (
            {"format": 2, "model": "MyPradot"},
            "is a checkpoint of MyPradot; only Duo, Foct, Pradot, WtFlow can be loaded",
        ),
        ({"format": 6, "model": "Pradot"}, "format 6, .* up to 5; run: pip install --upgrade anomalib-ot"),
    ],
)
def test_a_checkpoint_that_records_something_unknown_is_refused_by_name(
    fitted, checkpoint, folder, tmp_path, entry, reason
):
    path = checkpoint(fitted("Pradot"), anomalib_ot=entry)
    with pytest.raises(ValueError, match=reason):
        explain(path, str(folder), tmp_path)


def test_class_and_split_are_read_at_once(fitted, checkpoint, folder, tmp_path, monkeypatch):
    path = checkpoint(fitted("Pradot"))
    read = Mock(side_effect=read_checkpoint)
    monkeypatch.setattr("anomalib_ot.explain.explanation.read_checkpoint", read)
    # The file of this test has no settings.
    with pytest.raises(ValueError, match="lacks the settings"):
        explain(path, str(folder), tmp_path / "out")
    assert read.call_count == 1


def test_the_checkpoint_of_another_model_is_refused(checkpoint, folder, tmp_path):
    with pytest.raises(ValueError, match="is a checkpoint of an unknown model; only Duo, Foct, Pradot, WtFlow"):
        explain(checkpoint(torch.nn.Linear(1, 1)), str(folder), tmp_path)


@pytest.mark.parametrize(
    ("changes", "error", "reason"),
    [
        ({"ckpt_path": "absent.ckpt"}, FileNotFoundError, "there is no checkpoint absent.ckpt"),
        ({"count": 0}, ValueError, "count must be at least 1"),
        ({"model": "Padim"}, ValueError, "model must be 'Duo' or 'Foct' or 'Pradot' or 'WtFlow', not 'Padim'"),
        ({"formats": ["gif"]}, ValueError, "each of formats must be 'png' or 'svg' or 'pdf', not 'gif'"),
        ({"views": ["flow"]}, ValueError, "Foct has no views flow; it has evidence, transport"),
        ({"data": "Nowhere"}, ValueError, "data must be a data module, an image or a folder"),
        ({"pictures": ["c/000"]}, ValueError, "'c/000' is neither an image of the data, such as"),
        ({"pictures": []}, ValueError, "pictures must be at least one, or left out"),
        (
            {"post_processing": {"image_sensitivity": 1.4}},
            ValueError,
            r"image_sensitivity must be in \[0, 1\], not 1.4",
        ),
        ({"pictures": ["000"]}, ValueError, "'000' matches a/000, b/000; give one of these names"),
    ],
)
def test_what_is_wrong_is_said_before_the_model_is_loaded(fitted, checkpoint, folder, tmp_path, changes, error, reason):
    arguments = {"ckpt_path": checkpoint(fitted("Foct")), "data": str(folder), "output": tmp_path / "out", **changes}
    arguments["ckpt_path"] = Path(arguments["ckpt_path"])
    with pytest.raises(error, match=reason):
        explain(**arguments)
    assert not (tmp_path / "out").exists()


def test_a_folder_and_a_single_picture_are_data(folder):
    data = read_data(str(folder))
    assert sorted(map(name_of, paths_of(data.shown))) == ["a/000", "a/001", "b/000"]
    assert labels_of(data.shown) == [None] * 3
    assert data.why_none == "the held-out good images are known only for a data module"
    assert len(read_data(str(folder / "a" / "000.png")).shown) == 1


@pytest.mark.parametrize(
    ("reading", "brightness"),
    [
        (EIGHT_BITS, 1.0),
        (Reading(is_full_range=True), 2048 / 65535),
        (Reading(is_full_range=True, value_range=(0, 4096)), 0.5),
    ],
)
def test_a_bare_folder_is_read_as_in_the_training(tmp_path, reading, brightness):
    Image.new("I;16", (80, 72), 2048).save(tmp_path / "x.png")
    data = read_data(str(tmp_path), reading=reading)
    for items in (data.shown, data.outside(tmp_path / "x.png")):
        assert float(items[0].image.mean()) == pytest.approx(brightness)


@pytest.mark.parametrize(("is_deep", "warned"), [(True, True), (False, False)])
def test_a_data_module_that_reads_otherwise_than_the_training_is_named(tmp_path, caplog, is_deep, warned):
    for folder in ("good", "bad"):
        (tmp_path / folder).mkdir()
        for index in range(4):
            Image.new("I;16", (80, 72), 2048 + index).save(tmp_path / folder / f"{index}.png")
    settings = {"name": "camera", "root": str(tmp_path), "normal_dir": "good", "abnormal_dir": "bad", "num_workers": 0}
    trained = Reading(is_full_range=True, value_range=(0, 4095), is_deep=is_deep)
    read_data({"class_path": "Folder", "init_args": settings}, reading=trained)
    assert ("camera reads images with more than 8 bits per channel as if they had 8 bits" in caplog.text) == warned


@pytest.mark.parametrize("damaged", [{"value_range": [1]}, {"a": 1}, 5, {"value_range": [5, 1]}])
def test_a_damaged_record_of_the_reading_is_refused(damaged):
    with pytest.raises(ValueError, match=r"damaged|value_range must be two"):
        Reading.from_plain(damaged)


def test_a_view_that_cannot_be_drawn_is_left_out_unless_it_is_asked_for(fitted, folder, tmp_path):
    subject = ScoredSubject(fitted("WtFlow", 5.0), Data("folder", PredictDataset(folder)))
    pictures = list(subject.prepared(subject.data.shown))
    page, (explained,) = write_views(subject, [(pictures[0], "requested")], tmp_path / "out", formats=["png"])
    files = {path.name for path in (tmp_path / "out" / pictures[0].name).iterdir()}
    assert files == {"evidence.json", "evidence.png", MARKER}
    assert "flow: there are no normal images" in page.read_text()
    assert summary(explained).startswith(f"{pictures[0].name}: anomalous, score 1, ")
    assert ", threshold 0.5 (raw " in summary(explained)
    assert ", threshold 5)" in summary(explained)
    assert f"{explained.evidence.score:.4g}, threshold 0.5 (raw" in page.read_text()
    with pytest.raises(ValueError, match="the view flow cannot be drawn: there are no normal images"):
        write_views(subject, [(pictures[0], "requested")], tmp_path / "out", ["flow"])


def test_an_error_leaves_the_earlier_output_alone(fitted, folder, tmp_path, monkeypatch):
    subject = ScoredSubject(fitted("WtFlow", 5.0), Data("folder", PredictDataset(folder)))
    pictures = [(picture, "requested") for picture in subject.prepared(subject.data.shown)]
    write_views(subject, pictures[:1], tmp_path, formats=["png"])
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def fail(*_):
        msg = "half way"
        raise RuntimeError(msg)

    monkeypatch.setattr("anomalib_ot.explain.explanation.save", fail)
    for several in (pictures[:1], pictures[1:]):
        with pytest.raises(RuntimeError, match="half way"):
            write_views(subject, several, tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_folder_with_work_of_others_is_refused_before_the_model_is_loaded(fitted, checkpoint, folder, tmp_path):
    path = tmp_path / "results" / "Foct" / "tray" / "v0" / "weights" / "model.ckpt"
    path.parent.mkdir(parents=True)
    path.write_text("work of days")
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "index.html").write_text("work of days")
    arguments = {"ckpt_path": checkpoint(fitted("Foct")), "data": str(folder), "pictures": ["a/000"]}
    with pytest.raises(FileExistsError, match="Foct holds tray, which anomalib-ot did not write there"):
        explain(**arguments, output=tmp_path / "results")
    with pytest.raises(FileExistsError, match=r"page holds index\.html, which"):
        explain(**arguments, output=tmp_path / "page")
    assert path.read_text() == (tmp_path / "page" / "index.html").read_text() == "work of days"


def test_the_folder_of_a_picture_with_notes_in_it_stays(fitted, folder, tmp_path):
    subject = ScoredSubject(fitted("WtFlow", 5.0), Data("folder", PredictDataset(folder)))
    pictures = [(picture, "requested") for picture in subject.prepared(subject.data.shown)]
    notes = tmp_path / "out" / pictures[0][0].name / "notes.txt"
    for _ in range(2):
        write_views(subject, pictures[:1], tmp_path / "out", formats=["png"])
    notes.write_text("work of days")
    with pytest.raises(FileExistsError, match=r"holds notes\.txt"):
        write_views(subject, pictures[:1], tmp_path / "out", formats=["png"])
    assert notes.read_text() == "work of days"
    assert notes.with_name("evidence.json").is_file()


@pytest.mark.parametrize("name", ["Pradot/000", pytest.param("index.html/000", marks=pytest.mark.slow)])
def test_a_picture_takes_the_place_of_neither_the_model_nor_the_page(fitted, pictures, tmp_path, name):
    model = fitted("Pradot", 5.0)
    subject = ScoredSubject(model, Data("folder", ()))
    named = [(replace(each, name=name), "requested") for each in pictures(model, 2)]
    for _ in range(2):
        page, _ = write_views(subject, named, tmp_path, ["evidence", "cells"], ["png"])
    folder = name.replace("/", "-")
    assert page.is_file()
    assert (tmp_path / "Pradot" / "cells.html").is_file()
    assert {path.parent.name for path in tmp_path.rglob("evidence.json")} == {folder, f"{folder}-2"}


@pytest.mark.parametrize("path", ["../x.png", "x.png", "/x.png", "a/../x.png", "...png", "a/..png", "../../..png"])
def test_the_name_of_a_picture_leads_to_nowhere_else(tmp_path, monkeypatch, path):
    (tmp_path / "b" / "c").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "b" / "c")
    name = Path(name_of(path))
    assert not name.is_absolute()
    assert name.parts
    assert ".." not in name.parts
    assert name.name.strip(".")


def test_pictures_explained_before_stay_and_are_listed(fitted, folder, tmp_path):
    subject = ScoredSubject(fitted("WtFlow", 5.0), Data("folder", PredictDataset(folder)))
    pictures = [(picture, "requested") for picture in subject.prepared(subject.data.shown)]
    write_views(subject, pictures[:1], tmp_path / "out", formats=["png"])
    page, _ = write_views(subject, pictures[1:2] * 2, tmp_path / "out", formats=["png"])
    first, second = pictures[0][0].name, pictures[1][0].name
    for name in (first, second, f"{second}-2"):
        assert (tmp_path / "out" / name / "evidence.json").is_file()
    assert f'<a href="{first}/evidence.json">{first}</a>' in page.read_text()


def test_a_picture_whose_name_is_no_text_is_explained(fitted, tmp_path):
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (80, 72), (9, 8, 7)).save(tmp_path / "pictures" / os.fsdecode(b"caf\xe9.png"))
    subject = ScoredSubject(fitted("WtFlow", 5.0), Data("folder", PredictDataset(tmp_path / "pictures")))
    (picture,) = subject.prepared(subject.data.shown)
    page, (explained,) = write_views(subject, [(picture, "requested")], tmp_path / "out", formats=["png"])
    (written,) = (tmp_path / "out").rglob("evidence.json")
    numbers = json.loads(written.read_text())
    assert numbers == {**numbers, **explained.evidence.to_dict()}
    assert page.is_file()


@pytest.mark.parametrize("size", [(72, 80), (500, 300)])
def test_extent_of_a_resized_picture_is_all_of_it(fitted, size):
    assert extent_of(fitted("WtFlow"), size) == pytest.approx((0, 0, size[1], size[0]), abs=0.05)


def test_every_view_says_what_it_shows():
    views = [view for name in MODELS for view in views_of(getattr(anomalib_ot, name)).all.values()]
    assert all(len(view.about) > 20 for view in views)
