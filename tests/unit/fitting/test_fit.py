"""Arguments of a fit that are refused before anything is read or trained."""

import re
from importlib import import_module
from types import SimpleNamespace

import pytest
from PIL import Image

from anomalib_ot.files import claim
from anomalib_ot.fitting.fit import FILES, _candidates, _hand_over, _left_out, fit
from anomalib_ot.images.reading import Reading
from anomalib_ot.selection import CANDIDATES, on_backbones

module = import_module("anomalib_ot.fitting.fit")


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "parts"
    folder.mkdir()
    for index in range(3):
        Image.linear_gradient("L").rotate(90 * index).save(folder / f"{index}.png")
    return folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"false_alarm_rate": 1.0}, "false_alarm_rate must be between 0 and 1"),
        ({"seed": -1}, "seed must be"),
        ({"minutes": -1}, "minutes must be at least 0"),
        ({"engine": "cloud"}, "engine must be 'processes' or 'ray'"),
        ({"model": "Padin"}, "model must be one of Duo, Pradot, WtFlow, PaDiM, PatchCore, not 'Padin'"),
    ],
)
def test_an_invalid_argument_is_refused(images, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        fit(images, tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_few_images_and_missing_folders_are_refused(images, tmp_path):
    with pytest.raises(ValueError, match="3 usable images of 3, expected at least 10"):
        fit(images, tmp_path / "out", backbones=["test_resnet"])
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        fit(tmp_path / "none", tmp_path / "out", backbones=["test_resnet"])


def test_the_output_may_not_be_read_as_images(images):
    with pytest.raises(ValueError, match=r"is in the folder of the images, .* move it"):
        fit(images, images / "out")


def test_foreign_files_are_kept(images, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/model.ckpt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"model.ckpt, which anomalib-ot did not write"):
        fit(images, tmp_path / "out")
    assert (tmp_path / "out/model.ckpt").read_text() == "mine"


def test_hidden_images_which_anomalib_would_train_on_are_left_out(images):
    (images / "._0.png").write_bytes(b"no image")
    used = [images / "0.png", images / "1.png"]
    assert [path.name for path in _left_out(images, used)] == ["._0.png", "2.png"]


def test_the_model_of_another_folder_is_kept(images, tmp_path):
    (tmp_path / "out").mkdir()
    claim(tmp_path / "out", *FILES)
    (tmp_path / "out/config.yaml").write_text("data: {init_args: {root: /other/good}}")
    with pytest.raises(FileExistsError, match="has the model of /other/good; choose another output"):
        fit(images, tmp_path / "out")


def test_an_image_to_keep_must_be_there(images, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"keep names none.png, which is no file in"):
        fit(images, tmp_path / "out", keep=["0.png", "none.png"])


def look(deep=0):
    """A look at no images, some of which have more than 8 bits."""
    return SimpleNamespace(used=[], inspection=SimpleNamespace(deep=deep))


def test_a_model_that_was_asked_for_and_cannot_be_fitted_is_not_replaced_by_another(images, tmp_path, monkeypatch):
    others = [SimpleNamespace(candidate=each) for each in CANDIDATES[:1]]
    monkeypatch.setattr(module, "look_at", lambda *_: (look(), None))
    monkeypatch.setattr(module, "_trials", lambda *_: others)
    with pytest.raises(RuntimeError, match="PaDiM at 224 px cannot be fitted to these images"):
        fit(images, tmp_path / "out", "PaDiM", 5, ["test_resnet"])


def test_a_model_that_was_asked_for_is_trained_whatever_its_trial(images, tmp_path, monkeypatch):
    names = ("Duo at 224 px", "PaDiM at 224 px")
    tried = on_backbones([each for each in CANDIDATES if each.name in names], ["test_resnet"])
    assert tuple(each.name for each in tried) == names

    def configuration(candidate, *_):
        raise RuntimeError(candidate.name)

    monkeypatch.setattr(module, "look_at", lambda *_: (look(), None))
    monkeypatch.setattr(module, "_trials", lambda *_: [SimpleNamespace(candidate=each) for each in tried])
    monkeypatch.setattr(module, "configuration", configuration)
    for model, trained in ((None, "Duo at 224 px"), ("PaDiM", "PaDiM at 224 px")):
        with pytest.raises(RuntimeError, match=trained):
            fit(images, tmp_path / "out", model, 5, ["test_resnet"])


@pytest.mark.parametrize(
    ("value_range", "deep", "is_full_range"), [(None, 0, False), (None, 3, True), ((0, 4095), 0, True)]
)
def test_images_of_many_bits_are_trained_at_their_full_range(
    images, tmp_path, monkeypatch, value_range, deep, is_full_range
):
    (tried,) = on_backbones([each for each in CANDIDATES if each.name == "Duo at 224 px"], ["test_resnet"])

    def configuration(*given):
        raise RuntimeError(str(given[-1]))

    monkeypatch.setattr(module, "look_at", lambda *_: (look(deep), None))
    monkeypatch.setattr(module, "_trials", lambda *_: [SimpleNamespace(candidate=tried)])
    monkeypatch.setattr(module, "configuration", configuration)
    with pytest.raises(RuntimeError, match=re.escape(str(Reading(is_full_range, value_range)))):
        fit(images, tmp_path / "out", None, 0, ["test_resnet"], value_range=value_range)


def test_what_an_earlier_fit_handed_over_is_replaced_as_a_whole(tmp_path):
    output, new = tmp_path / "out", tmp_path / "new"
    new.mkdir()
    claim(output, *FILES)
    for name in ("report.html", "model.xml", "model_int8.xml", "config.yaml"):
        (output / name).write_text("old")
    (output / "mine.txt").write_text("mine")
    for name in ("model.xml", "config.yaml"):
        (new / name).write_text("new")
    _hand_over(sorted(new.iterdir()), output)
    found = {path.name: path.read_text() for path in output.iterdir() if not path.name.startswith(".")}
    assert found == {"model.xml": "new", "config.yaml": "new", "mine.txt": "mine"}


@pytest.mark.parametrize(("model", "first"), [(None, "Duo at 224 px"), ("PaDiM", "PaDiM at 224 px")])
def test_the_named_model_comes_before_the_others_that_it_is_compared_with(model, first):
    candidates = _candidates(model)
    assert candidates[0].name == first
    assert len({each.name for each in candidates}) == len(CANDIDATES)
