"""The command ``anomalib-ot predict``: its files, its watch and its errors."""

import csv
import json
import logging
import re
import shlex
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from anomalib_ot.cli import main
from anomalib_ot.edge import EdgeInferencer, Prediction, overlay
from anomalib_ot.edge import results as results_module
from anomalib_ot.edge.results import COLUMNS, overlay_name
from anomalib_ot.host import verdicts
from anomalib_ot.images import folder as folder_module


@pytest.fixture
def line(images, tmp_path):
    """A folder of images with a subfolder."""
    shutil.copytree(images / "bad", tmp_path / "line")
    shutil.copytree(images / "good_test", tmp_path / "line" / "good")
    return tmp_path / "line"


@pytest.fixture
def command(exported, line, tmp_path, capsys, caplog):
    """Runs the command and returns its standard output."""

    def run(*options, data=line):
        caplog.set_level(logging.INFO, "anomalib_ot")
        main(["predict", str(exported), str(data), "--output", str(tmp_path / "out"), *options])
        return capsys.readouterr().out

    return run


def table(folder):
    with (folder / "predictions.csv").open(newline="", encoding="utf-8") as file:
        return [*csv.DictReader(file)]


def listed(folder):
    return json.loads((folder / "predictions.json").read_text(encoding="utf-8"))


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_table_list_lines_and_summary_say_what_the_inferencer_says(command, exported, line, tmp_path, caplog):
    printed = command("--false_alarm_rate", "0.2")
    inferencer = EdgeInferencer(exported)
    rows = table(tmp_path / "out")
    content = listed(tmp_path / "out")
    paths = [str(line / name) for name in ("0.png", "1.png", "2.png", "good/0.png", "good/1.png")]
    assert [row["path"] for row in rows] == [each["path"] for each in content["predictions"]] == paths
    assert (content["model_class"], content["false_alarm_rate"]) == ("WtFlow", 0.2)
    for row, each in zip(rows, content["predictions"], strict=True):
        prediction = inferencer.predict(row["path"], rate=0.2)
        assert np.float32(row["score"]) == np.float32(prediction.score)
        assert np.float32(row["score_raw"]) == np.float32(prediction.raw_score)
        assert float(row["p_value"]) == pytest.approx(prediction.p_value)
        assert float(row["threshold"]) == pytest.approx(prediction.threshold, abs=1e-6)
        assert row["label"] == prediction.label
        assert {name: "" if each[name] is None else str(each[name]) for name in COLUMNS} == row
        assert f"{prediction.label:9} {row['path']}: score {prediction.score:.4f}, p-value" in caplog.text
    count = sum(row["label"] == "anomalous" for row in rows)
    assert 0 < count < 5
    assert printed == f"{tmp_path / 'out' / 'predictions.csv'}: {count} of 5 images are anomalous\n"


def test_columns_and_suffixes_are_those_of_anomalib_predict():
    assert COLUMNS == verdicts.COLUMNS
    assert results_module.TABLE == verdicts.TABLE
    assert {*folder_module.IMAGE_SUFFIXES} == {*IMG_EXTENSIONS}


@pytest.mark.parametrize("overlays", ["none", "anomalous", "all"])
def test_overlays_are_drawn_at_the_size_of_the_image(command, tmp_path, overlays):
    command("--overlays", overlays, "--false_alarm_rate", "0.2")
    drawn = [each for each in listed(tmp_path / "out")["predictions"] if each["overlay"]]
    expected = {"none": [], "anomalous": ["anomalous"], "all": ["anomalous", "normal"]}[overlays]
    assert sorted({each["label"] for each in drawn}) == expected
    assert files(tmp_path / "out")[1:-2] == sorted(each["overlay"] for each in drawn)
    for each in drawn:
        with Image.open(tmp_path / "out" / each["overlay"]) as image, Image.open(each["path"]) as original:
            assert image.size == original.size
            contour = (np.asarray(image) == (255, 0, 255)).all(2)
            assert contour.any() == (each["label"] == "anomalous")


def test_an_overlay_shows_heat_where_the_map_is_high_and_a_contour_around_the_mask():
    anomaly_map, mask = np.zeros((4, 4), np.float32), np.zeros((4, 4), bool)
    anomaly_map[:, 2:], mask[:, 2:] = 0.9, True
    prediction = Prediction(0.9, 0.5, is_anomalous=True, raw_score=1, p_value=0.1, anomaly_map=anomaly_map, mask=mask)
    drawn = np.asarray(overlay(np.full((40, 40, 3), 0.5), prediction))
    assert (drawn[5:35, 5] == 128).all()
    assert (drawn[5:35, 30, 0] > 150).all()
    is_contour = (drawn == (255, 0, 255)).all(2)
    border = np.zeros((40, 40), bool)
    border[:, 20:] = True
    border[1:-1, 21:-1] = False
    assert np.array_equal(is_contour, border)


@pytest.mark.parametrize("values", [np.array([[-3.0, 7.0]]), np.array([[0.2, np.nan]]), np.array([[2.0, 2.0]])])
def test_an_overlay_of_a_map_without_a_scale_is_stretched(values):
    prediction = Prediction(1.0, None, None, None, None, values.astype(np.float32), None)
    drawn = np.asarray(overlay(np.zeros((8, 8, 3), np.float32), prediction), float)
    assert drawn.shape == (8, 8, 3)
    if values[0, 0] != values[0, 1]:
        hottest = int(np.argmax(values))
        assert drawn[0, 7 * hottest].sum() > drawn[0, 7 * (1 - hottest)].sum()


def test_a_pixel_that_is_nan_is_drawn_as_the_highest():
    values = np.linspace(100, 200, 64, dtype=np.float32).reshape(8, 8)
    values[0, 0] = np.nan
    drawn = np.asarray(overlay(np.zeros((8, 8, 3), np.float32), Prediction(1.0, None, None, None, None, values, None)))
    assert (drawn[0, 0] == drawn[7, 7]).all()
    assert (drawn[0, 0] != drawn[0, 1]).any()


def test_overlays_of_images_of_the_same_name_do_not_replace_each_other():
    names = ["a/1.png", "a/1.PNG", "a/1.jpg", "a/1.jpg.png", "a/1.tiff", "b/1.png", "a/1.jpg.png.png"]
    found = {overlay_name(Path(name)) for name in names}
    assert len(found) == len(names)
    assert {path.suffix for path in found} == {".png"}


def test_results_of_an_earlier_run_are_moved_not_lost(command, tmp_path, caplog):
    command("--overlays", "all")
    first = {name: (tmp_path / "out" / name).read_bytes() for name in files(tmp_path / "out")[1:]}
    command("--false_alarm_rate", "0.5", "--overlays", "none")
    assert f"The results of an earlier run are now in {tmp_path / 'out' / 'earlier-1'}." in caplog.text
    assert {name: (tmp_path / "out" / "earlier-1" / name).read_bytes() for name in first} == first
    command("--overlays", "none")
    assert files(tmp_path / "out" / "earlier-2") == ["predictions.csv", "predictions.json"]
    assert listed(tmp_path / "out" / "earlier-2")["false_alarm_rate"] == 0.5


@pytest.mark.parametrize("name", ["predictions.csv", "predictions.json", "overlays/mine.png"])
def test_a_foreign_file_stays(command, tmp_path, name):
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    with pytest.raises(SystemExit) as stop:
        command()
    assert "which anomalib-ot did not write there" in stop.value.code
    assert files(tmp_path / "out") == [name]
    assert path.read_text() == "mine"


def test_an_image_that_cannot_be_read_has_a_row_and_the_others_a_verdict(command, line, tmp_path, caplog):
    (line / "1.png").write_bytes(b"not an image")
    printed = command()
    assert [row["label"] for row in table(tmp_path / "out")][1] == "unreadable"
    assert "1.png" in listed(tmp_path / "out")["predictions"][1]["remark"]
    assert f"unreadable {line / '1.png'}: " in caplog.text
    assert "of 4 images are anomalous, 1 could not be read" in printed


def test_a_blank_image_is_named(command, line, tmp_path, caplog):
    Image.new("RGB", (80, 80), "white").save(line / "blank.png")
    command(data=line / "blank.png")
    (row,) = listed(tmp_path / "out")["predictions"]
    assert row["remark"] == "white all over"
    assert "(white all over)" in caplog.text


def test_a_rate_that_the_calibration_does_not_support_is_said_once(command, caplog, recwarn):
    command()
    assert caplog.text.count("a false-alarm rate of 0.01 was asked for, but the scores of 9 good images") == 1
    assert not recwarn.list


def test_a_model_without_calibration_predicts_and_says_so(line, exported, tmp_path, caplog, monkeypatch):
    shutil.copytree(exported, tmp_path / "plain", ignore=shutil.ignore_patterns("*.json"))
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO, "anomalib_ot")
    main(["predict", "plain", str(line), "--output", "out"])
    assert "plain/model.xml has no calibration: its own threshold decides" in caplog.text
    assert {(row["threshold"], row["score_raw"], row["p_value"]) for row in table(tmp_path / "out")} == {("", "", "")}
    assert {row["label"] for row in table(tmp_path / "out")} <= {"anomalous", "normal"}


@pytest.mark.parametrize(
    ("options", "data", "reason"),
    [
        (["--false_alarm_rate", "1.5"], "line", "false_alarm_rate must be between 0 and 1"),
        (["--watch", "0"], "line", "watch must be a positive number of seconds"),
        (["--watch", "1"], "line/0.png", "there is no folder"),
        ([], "absent", "there is no folder"),
        ([], "empty", "there are no images in"),
        ([], ".", "is in the folder of the images"),
        ([], "text", "none of the 1 images of text can be predicted; the first error: cannot read text/a.png"),
        (["--value_range", "[4, 4]"], "line", "value_range must be two finite numbers"),
    ],
)
def test_bad_input_is_one_line(command, line, tmp_path, monkeypatch, options, data, reason):
    monkeypatch.chdir(line.parent)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.png").write_text("not an image")
    with pytest.raises(SystemExit) as stop:
        command(*options, data=data)
    assert reason in stop.value.code
    assert data == "text" or not (tmp_path / "out").exists()


def test_a_watched_folder_is_followed_until_it_is_interrupted(command, line, images, tmp_path, monkeypatch):
    looks = []

    def sleep(seconds):
        looks.append(seconds)
        if len(looks) == 3:
            # The files are complete while the command runs.
            assert len(table(tmp_path / "out")) == len(listed(tmp_path / "out")["predictions"]) == 5
            (line / "new.png").write_bytes(b"half")
        if len(looks) == 6:
            assert table(tmp_path / "out")[-1]["label"] == "unreadable"
            shutil.copy(images / "good" / "0.png", line / "new.png")
        if len(looks) == 9:
            raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", sleep)
    printed = command("--watch", "0.5")
    assert set(looks) == {0.5}
    rows = table(tmp_path / "out")
    assert [row["path"] for row in rows[5:]] == [str(line / "new.png")] * 2
    assert rows[-1]["label"] in {"anomalous", "normal"}
    assert len(listed(tmp_path / "out")["predictions"]) == 7
    assert "of 6 images are anomalous" in printed


def test_an_interruption_keeps_what_is_done(command, tmp_path, monkeypatch):
    predict = EdgeInferencer.predict

    def interrupted(self, image, *arguments):
        if len(table(tmp_path / "out")) == 2:
            raise KeyboardInterrupt
        return predict(self, image, *arguments)

    monkeypatch.setattr(EdgeInferencer, "predict", interrupted)
    with pytest.raises(SystemExit) as stop:
        command()
    assert stop.value.code == 130
    assert len(table(tmp_path / "out")) == len(listed(tmp_path / "out")["predictions"]) == 2


def test_a_watched_folder_may_be_empty(command, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()

    def sleep(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", sleep)
    assert "0 of 0 images are anomalous" in command("--watch", "1", data=tmp_path / "empty")
    assert listed(tmp_path / "out")["predictions"] == []


def test_the_code_and_the_command_of_the_guide_work_as_typed(exported, images, tmp_path, monkeypatch, capsys):
    guide = (Path(__file__).parents[3] / "docs/guides/deployment.md").read_text(encoding="utf-8")
    section = re.search(r"^## On an edge device$(.*?)^## ", guide, re.DOTALL | re.MULTILINE)[1]
    typed, code = re.findall(r"^```(?:shell|python)\n(.*?)^```", section, re.DOTALL | re.MULTILINE)[:2]
    (tmp_path / "results" / "weights").mkdir(parents=True)
    (tmp_path / "results" / "weights" / "openvino").symlink_to(exported)
    (tmp_path / "IMAGES").symlink_to(images / "bad")
    shutil.copy(images / "bad" / "0.png", tmp_path / "image.png")
    monkeypatch.chdir(tmp_path)
    program, *arguments = shlex.split(typed)
    assert program == "anomalib-ot"
    main(arguments)
    assert len(table(tmp_path / "results" / "predict")) == 3
    shown = {}
    exec(code, shown)
    assert capsys.readouterr().out.splitlines()[-1].split()[0] == shown["prediction"].label
