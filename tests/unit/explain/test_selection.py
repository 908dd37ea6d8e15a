from dataclasses import replace
from pathlib import Path

import pytest
from anomalib.data import Folder, PredictDataset
from PIL import Image

from anomalib_ot.data import FewShot, FullRange
from anomalib_ot.drawing.data import Data, labels_of, paths_of
from anomalib_ot.drawing.pictures import name_of
from anomalib_ot.explain.data import data_of
from anomalib_ot.explain.selection import informative, requested
from anomalib_ot.explain.views import ScoredSubject
from anomalib_ot.models.pradot.views import MODEL_VIEWS


def draw(path, colour=9):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (80, 72), (colour, 0, 0)).save(path)


@pytest.fixture
def folder(tmp_path):
    for number, name in enumerate(("a/000.png", "a/001.png", "b/000.png")):
        draw(tmp_path / "pictures" / name, number)
    return tmp_path / "pictures"


@pytest.fixture
def module(tmp_path):
    """A folder that is split by a seed: eight training images, one held out, one good and two bad test images."""
    for number in range(10):
        draw(tmp_path / "plant" / "good" / f"{number:03}.png", number)
    for number in range(2):
        draw(tmp_path / "plant" / "bad" / f"{number:03}.png", 99 + number)
    data = Folder("plant", root=tmp_path / "plant", normal_dir="good", abnormal_dir="bad", test_split_ratio=0.2, seed=3)
    data.setup()
    return data


def test_pictures_are_found_by_name_stem_and_path(folder):
    data = Data("folder", PredictDataset(folder))
    paths = paths_of(data.shown)
    for names, expected in (
        (["b/000", "001"], ["b/000", "a/001"]),
        ([str(folder / "a" / "000.png"), "a/000"], ["a/000"]),
    ):
        found = requested(data, names)
        assert [name_of(paths[each.index]) for each in found] == expected
        assert all(each.items is data.shown for each in found)


def test_a_picture_from_the_line_is_taken_beside_a_data_module(module, tmp_path, monkeypatch):
    draw(tmp_path / "line" / "x.png")
    draw(tmp_path / "line" / "y.png")
    monkeypatch.chdir(tmp_path)
    for names in (["line/x.png", "line/y.png"], ["line"], [str(tmp_path / "line")], ["line/x.png", "line"]):
        found = requested(data_of(module), names)
        assert [name_of(each.read().image_path) for each in found] == ["line/x", "line/y"]
        assert {each.reason for each in found} == {"requested"}
        assert found[0].read().gt_label is None


def test_a_file_of_the_data_module_is_taken_with_what_that_knows_of_it(module, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = data_of(module)
    for items, reason in (
        (data.shown, "requested"),
        (data.held_out, "requested, a held-out normal image"),
        (data.training, "requested, a training image"),
    ):
        path = paths_of(items)[0]
        (chosen,) = requested(data, [str(Path(path).relative_to(tmp_path))])
        assert chosen.reason == reason
        assert chosen.read().image_path == path
        assert chosen.read().gt_label is not None


def test_a_picture_that_the_model_was_trained_on_has_no_p_value(fitted, module):
    model, data = fitted("WtFlow", 5.0), data_of(module)
    subject = ScoredSubject(model, data)
    (chosen,) = requested(data, [paths_of(data.training)[0]])
    (picture,) = subject.prepared([chosen.read()])
    assert subject.evidence(picture).p_value_in_words() == "no p-value, because the model was trained on this image"


def test_an_unreadable_picture_from_the_line_is_refused_by_name(module, tmp_path):
    draw(tmp_path / "line" / "x.png")
    broken = tmp_path / "line" / "y.png"
    broken.write_bytes((tmp_path / "line" / "x.png").read_bytes()[:60])
    for name in ("line/y.png", "line"):
        with pytest.raises(ValueError, match=r"cannot read .*line/y\.png: "):
            requested(data_of(module), [str(tmp_path / name)])


def test_a_name_of_neither_a_picture_nor_a_file_is_refused_with_names_that_would_do(module):
    with pytest.raises(
        ValueError, match=r"'bad/002' is neither an image of the data, such as .*bad/00., .* nor a file or a folder"
    ):
        requested(data_of(module), ["bad/002"])


@pytest.mark.parametrize("wrap", [lambda data: data, lambda data: FewShot(data, 2)])
def test_a_picture_from_the_line_is_read_at_the_full_range_of_the_data_module(module, tmp_path, wrap):
    data = wrap(FullRange(module, (0, 4095)))
    data.setup()
    path = tmp_path / "line" / "x.png"
    path.parent.mkdir()
    Image.new("I;16", (80, 72), 2048).save(path)
    (chosen,) = requested(data_of(data), [str(path)])
    assert float(chosen.read().image.mean()) == pytest.approx(2048 / 4095)


def test_telling_pictures_are_chosen_by_turns(fitted, folder):
    model = fitted("WtFlow", 5.0)
    data = Data("folder", PredictDataset(folder))
    scores = dict(zip(paths_of(data.shown), (1.0, 4.9, 9.0), strict=True))
    chosen = {each.index: each.reason for each in informative(model, data, scores, 3)}
    assert chosen == {2: "highest score", 1: "nearest to the threshold", 0: "a typical normal image"}
    assert [each.index for each in informative(model, data, scores, 9)] == [2, 1, 0]


def test_what_only_anomalous_pictures_without_masks_do_not_show_is_left_out_before_anything_is_drawn(fitted, module):
    data = data_of(module)
    lacks = MODEL_VIEWS["projection"].missing
    assert not lacks(ScoredSubject(fitted("Pradot"), data))
    abnormal = [index for index, label in enumerate(labels_of(data.shown)) if label]
    bad = replace(data, shown=data.shown.subsample(abnormal))
    assert "neither normal test images nor masks" in lacks(ScoredSubject(fitted("Pradot"), bad))
