"""What the page says of a folder with every problem, and of one with none."""

import math
import re

import numpy as np
import pytest
from PIL import Image

from anomalib_ot.decide.promise import Promise
from anomalib_ot.edge.inferencer import Prediction
from anomalib_ot.fitting import report
from anomalib_ot.fitting.calibration import Calibration
from anomalib_ot.fitting.exported import Exported
from anomalib_ot.fitting.handed_over import HandedOver
from anomalib_ot.fitting.looking import Look
from anomalib_ot.host.calibration import FOLDS, HELD_OUT, TRAINED
from anomalib_ot.inspection import Finding, Inspection, Suspect
from anomalib_ot.selection import Candidate, Detected, Trial
from anomalib_ot.synthetic import KINDS


class FakeInferencer:
    def __init__(self, path):
        assert path.name == "model.xml"

    def predict(self, pixels):
        anomaly_map = np.full(pixels.shape[:2], 0.3, np.float32)
        return Prediction(0.2, 0.5, None, 1.0, 0.5, anomaly_map, anomaly_map > 1)


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "<parts>"
    folder.mkdir()
    for index in range(6):
        Image.new("RGB", (40, 32), (40 * index, 90, 200)).save(folder / f"{index}.png")
    return folder


def trial(name, mean, detection):
    candidate = Candidate(name, f"anomalib_ot.{name}")
    auroc = dict.fromkeys(KINDS, mean) if detection else {}
    return Trial(candidate, auroc, mean if auroc else math.nan, 12.0, 34.0, 0.05, detection)


def text_of(page):
    page = re.sub(r"<style>.*?</style>|<head>.*?</head>", "", page, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]*>", " ", page).split())


@pytest.fixture
def page(images, monkeypatch):
    """The page of a fit; the arguments can be changed."""
    monkeypatch.setattr(report, "EdgeInferencer", FakeInferencer)
    paths = sorted(images.iterdir())
    usual = (Detected(0.004, 0.5, 0.25, 14), Detected(0.064, 1.0, 1.0, 14))

    def make(suspects=(), dropped=(), findings=(), groups=None, trials=2, rate=0.2, source=HELD_OUT, detection=usual):
        inspection = Inspection(paths, list(findings))
        look = Look(inspection, list(suspects), list(dropped), groups or [paths])
        promise = Promise(rate, max(rate, 1 / 7), 6, source)
        calibration = Calibration(promise, [(path, 0.5) for path in paths])
        exported = (Exported(images / "model.xml", 12.3, 4.5), Exported(None, 10.0, 2.0, "it is slower"))
        tried = [trial("Duo", 91.0, detection), trial("WtFlow", 90.0, detection)][:trials]
        return report.report_page(
            HandedOver(images, images.parent / "out", look, tried, calibration, exported, 61.0, 0)
        )

    return make


def test_a_clean_folder(page, images):
    made = page()
    text = text_of(made)
    assert "Duo, from 6 good images; 0 others were left out. It rejects about 20 %" in text
    assert "Check first" not in text
    assert "No image looks unlike the others" in text
    assert "All images can be read, and none is blank, saturated or doubled." in text
    assert "Duo, in the first row, was trained." in text
    assert "On nine products, Duo had 10 to 31 points more for real defects than for drawn ones." in text
    assert "contrast 0.4 % 6.4 % 1 100 0.5 25" in text
    assert 'points="1,1 "' in made
    assert 'points="0,0.25 "' in made
    assert "Defects of 0.1 % and 1.6 % of the image are left out, as the images are too small for them." in text
    assert "Defects of 0.4 % of the image, at contrast 1." in text
    assert "no defect cut paste scratch stain blur missing exchanged moved" in text
    assert (
        "model.xml 12.3 4.5 the same as torch on the good images model_int8.xml 10.0 2.0 not kept: it is slower" in text
    )
    assert f"anomalib-ot predict {images.parent / 'out'} NEW_IMAGES" in text
    assert f"anomalib train --config {images.parent / 'out/config.yaml'}" in text
    # The name of the folder is text.
    assert "<parts>" not in made
    assert made.count("<img ") == 6 + 1 + len(KINDS)


def test_images_without_room_for_defects_have_no_curve(page):
    made = page(detection=(), trials=1)
    text = text_of(made)
    assert "The images are too small to draw defects on them, so it is not known" in text
    assert "<polyline" not in made
    assert "AUROC" not in text
    assert "nan" not in text.lower()
    assert "ms per image fit in s Duo 34 12" in text


def test_every_problem_is_named_and_what_to_do(page, images):
    paths = sorted(images.iterdir())
    suspect = Suspect(paths[5], 9.0, 2.0, np.array([[1.0, 3.0]], np.float32))
    made = page(
        suspects=[suspect],
        dropped=[paths[5]],
        findings=[Finding(images / "x.png", "unreadable", "It is damaged."), Finding(paths[0], "size", "It is big.")],
        groups=[paths[:4], paths[4:]],
        rate=0.01,
        trials=1,
    )
    text = text_of(made)
    assert "look like two products, of 4 and 2 images, such as 0.png and 4.png" in text
    assert "1 images may be bad and were left out" in text
    assert "repeat the command with --keep" in text
    assert (
        "from 6 good images, which support a rate of false alarms of 14 %, not of 1 %. For that, at least 99 are needed"
        in text
    )
    assert "the rate of false alarms may be 17 percentage points higher than promised" in text
    assert "5.png left out" in text
    assert "x.png It is damaged. no" in text
    assert "0.png It is big. yes" in text
    assert "was not compared with other models" in text


def test_suspects_that_are_kept_are_said_to_be_used(page, images):
    paths = sorted(images.iterdir())
    flat = Suspect(paths[5], 9.0, 2.0, np.ones((1, 2), np.float32))
    text = text_of(page(suspects=[flat]))
    assert "1 of them are used, as asked for." in text
    assert "5.png used" in text


def test_what_the_verdicts_promise_depends_on_the_images_behind_them(page):
    assert "new good images on average" in text_of(page(source=HELD_OUT))
    assert "new good images approximately" in text_of(page(source=FOLDS))
    text = text_of(page(source=TRAINED))
    assert "expect far more false alarms than promised" in text


def test_a_model_that_no_seed_repeats_is_not_said_to_be_trained_again(page, monkeypatch):
    assert "anomalib train --config" in text_of(page())
    monkeypatch.setattr(HandedOver, "is_repeatable", False)
    assert "anomalib train" not in text_of(page())
