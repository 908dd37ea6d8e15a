"""``anomalib-ot fit`` on a folder, what it hands over, and the use of that as its report says."""

import csv
import io
import logging
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from contextlib import redirect_stdout
from html import unescape

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from anomalib_ot import Assembly
from anomalib_ot.cli import main
from anomalib_ot.decide.conformal import UnsupportedRateWarning
from anomalib_ot.edge import EdgeInferencer
from anomalib_ot.fitting import fit as fitting
from anomalib_ot.images.reading import Reading
from anomalib_ot.selection import Candidate

pytestmark = pytest.mark.slow
SIZE = (64, 64)
CANDIDATES = (
    Candidate("WtFlow at 64 px", "anomalib_ot.WtFlow", {"width": 16, "training_steps": 6, "batch_size": 8}, SIZE),
    Candidate("PaDiM at 64 px", "anomalib.models.Padim", {"n_features": 4}, SIZE),
)
WIDTHS = (400, 1400)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A folder of good images, with one that has no part, a copy, and one that is no image."""
    root = tmp_path_factory.mktemp("fit")
    Assembly(root / "data", n_train=24, n_validation=1, n_test=1, seed=1).prepare_data()
    folder = root / "parts"
    shutil.copytree(root / "data/tray/train/good", folder)
    first = Image.open(next(iter(sorted(folder.iterdir())))).convert("RGB")
    first.save(folder / "copy.png")
    Image.linear_gradient("L").resize(first.size).convert("RGB").save(folder / "strange.png")
    (folder / "broken.png").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("backbone") / "weights"
    timm.models.save_for_hf(timm.create_model("test_resnet"), str(folder), safe_serialization=True)
    return f"local-dir:{folder}"


@pytest.fixture(scope="module")
def run(parts, backbone):
    """Runs the command with small candidates, and returns what it prints."""

    def run(output, *arguments, images=parts):
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
            patch.setattr(fitting, "CANDIDATES", CANDIDATES)
            # It is in the log and in the report.
            warnings.simplefilter("error", UnsupportedRateWarning)
            with redirect_stdout(io.StringIO()) as printed:
                main(["fit", str(images), "--output", str(output), "--backbone", backbone, *arguments])
        return printed.getvalue().strip()

    return run


@pytest.fixture(scope="module")
def fitted(run, tmp_path_factory):
    """The folder that is handed over, and what the command prints."""
    folder = tmp_path_factory.mktemp("fitted") / "out"
    return folder, run(folder, "--minutes", "5")


def shell(command, folder):
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def blocks(folder):
    """The commands of the report, as a user copies them."""
    return [
        unescape(each) for each in re.findall(r"<pre[^>]*>(.*?)</pre>", (folder / "report.html").read_text(), re.DOTALL)
    ]


def test_all_files_are_there_and_the_bad_images_named(fitted, parts):
    folder, printed = fitted
    assert printed.splitlines()[-1] == str(folder / "report.html")
    assert {"report.html", "config.yaml", "images.csv", "model.ckpt", "model.xml", "model.bin"} <= {
        path.name for path in folder.iterdir()
    }
    with (folder / "images.csv").open(newline="") as file:
        rows = {row["path"].rpartition("/")[2]: row for row in csv.DictReader(file)}
    assert len(rows) == len([*parts.iterdir()])
    left_out = {name for name, row in rows.items() if row["used"] == "no"}
    assert {"copy.png", "strange.png", "broken.png"} <= left_out
    assert all(rows[name]["finding"] for name in left_out)
    used = [row for row in rows.values() if row["used"] == "yes"]
    assert min(float(row["p_value"]) for row in used) == pytest.approx(1 / len(used), abs=1e-3)


def test_the_stock_command_trains_the_same_model_to_the_bit(fitted, tmp_path):
    folder, _ = fitted
    command = shlex.split(blocks(folder)[2])
    assert command[:2] == ["anomalib", "train"]
    code = "from anomalib.cli.cli import main; main()"
    shell([sys.executable, "-c", code, *command[1:]], tmp_path)
    (again,) = tmp_path.glob("results/**/v0/weights/lightning/model.ckpt")
    states = [torch.load(path, weights_only=False)["state_dict"] for path in (folder / "model.ckpt", again)]
    assert states[0].keys() == states[1].keys()
    assert all(value.equal(states[1][name]) for name, value in states[0].items())


def test_the_lines_of_the_report_run_as_pasted(fitted, parts, tmp_path):
    folder, _ = fitted
    command, code, _ = blocks(folder)
    arguments = shlex.split(command.replace("NEW_IMAGES", str(parts)))[1:]
    shell([sys.executable, "-c", "from anomalib_ot.cli import main; main()", *arguments], tmp_path)
    with (tmp_path / "results/predict/predictions.csv").open(newline="") as file:
        labels = {row["path"].rpartition("/")[2]: row["label"] for row in csv.DictReader(file)}
    assert labels["strange.png"] == "anomalous"
    assert labels["broken.png"] == "unreadable"
    printed = shell([sys.executable, "-c", code.replace("NEW_IMAGE.png", str(parts / "strange.png"))], tmp_path)
    assert printed.startswith("anomalous ")


def test_a_repeated_fit_skips_its_steps_and_images_to_keep_must_be_there(fitted, run, monkeypatch, caplog):
    folder, printed = fitted
    before = (folder / "model.ckpt").stat().st_mtime_ns
    for step in ("looking.inspect_images", "looking.ImageExtractor", "stock._run", "exported.export_openvino"):
        monkeypatch.setattr(f"anomalib_ot.fitting.{step}", None)
    monkeypatch.setattr("anomalib_ot.selection.choosing.run_trial", None)
    with caplog.at_level(logging.INFO):
        assert run(folder, "--minutes", "5") == printed
    for step in ("look at the images", "training", "export"):
        assert f"The {step} is skipped: it is finished, and nothing has changed since." in caplog.text
    assert (folder / "model.ckpt").stat().st_mtime_ns > before
    with pytest.raises(SystemExit, match=r"keep names none.png, which is no file in"):
        run(folder, "--keep", "none.png")


def test_images_of_twelve_bits_give_the_model_of_eight(parts, run, tmp_path):
    shallow, deep = tmp_path / "shallow", tmp_path / "deep"
    for folder in (shallow, deep):
        folder.mkdir()
    for path in sorted(parts.glob("0*.png")):
        values = np.asarray(Image.open(path).convert("L"))
        Image.fromarray(values).save(shallow / path.name)
        Image.fromarray(values.astype(np.uint16) * 16).save(deep / path.name)
    scores = []
    for folder, options in ((shallow, []), (deep, ["--value_range", "[0, 4080]"])):
        run(tmp_path / "out" / folder.name, *options, images=folder)
        main(["predict", str(tmp_path / "out" / folder.name), str(folder), "--output", str(tmp_path / "said")])
        with (tmp_path / "said" / "predictions.csv").open(encoding="utf-8") as file:
            scores.append([float(row["score_raw"]) for row in csv.DictReader(file)])
    assert len(scores[0]) == 24
    assert scores[1] == pytest.approx(scores[0], rel=1e-3)
    page = (tmp_path / "out" / "deep" / "report.html").read_text(encoding="utf-8")
    assert "24, read with value_range [0, 4080]" in page
    assert "bits per channel" not in (tmp_path / "out" / "shallow" / "report.html").read_text(encoding="utf-8")
    # Checkpoints of anomalib's models do not record the range, but the files of the export do.
    run(tmp_path / "out" / "padim", "--model", "PaDiM", "--value_range", "[0, 4080]", images=deep)
    assert EdgeInferencer(tmp_path / "out" / "padim").reading == Reading(is_full_range=True, value_range=(0, 4080))


def test_a_model_of_anomalib_is_calibrated_on_held_out_images_and_exported(run, tmp_path):
    printed = run(tmp_path / "out", "--model", "PaDiM", "--false_alarm_rate", "0.3", "--minutes", "5")
    assert re.match(r"PaDiM at 64 px, from \d+ images of .*; promises 30 % false alarms", printed)
    assert "were held out" in (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert EdgeInferencer(tmp_path / "out").decision.false_alarm_rate == 0.3


def test_small_images_have_a_model_without_a_detection_curve(backbone, tmp_path, caplog):
    random = np.random.default_rng(0)
    (tmp_path / "parts").mkdir()
    for index in range(12):
        # Narrow, and too small for any of the defects.
        pixels = random.integers(90, 160, (4, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"parts/{index}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "CANDIDATES", CANDIDATES[:1])
        main(["fit", str(tmp_path / "parts"), "--output", str(tmp_path / "out"), "--backbone", backbone])
    assert "too small for defects of 0.1 % and 0.4 % and 1.6 % and 6.4 % of the image" in caplog.text
    page = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert "The images are too small to draw defects on them" in page
    assert "<polyline" not in page
    assert EdgeInferencer(tmp_path / "out").predict(tmp_path / "parts/0.png").label


def test_other_models_are_tried_on_a_cluster_and_on_several_backbones(parts, backbone, tmp_path, capsys):
    pytest.importorskip("ray", reason="Ray is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "CANDIDATES", CANDIDATES)
        backbones = f"[{backbone}, local-dir:{shutil.copytree(backbone.removeprefix('local-dir:'), tmp_path / 'b')}]"
        arguments = ["--minutes", "9", "--backbone", backbones, "--engine", "ray"]
        main(["fit", str(parts), "--output", str(tmp_path / "out"), *arguments])
    page = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    for name in (
        "WtFlow at 64 px on weights",
        "PaDiM at 64 px on weights",
        "WtFlow at 64 px on b",
        "PaDiM at 64 px on b",
    ):
        assert name in page
    assert capsys.readouterr().out.strip().startswith("WtFlow at 64 px on weights, from ")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_the_report_fits_its_window_and_can_be_read_with_the_keyboard(fitted, open_file, width, scheme):
    page = open_file(fitted[0] / "report.html", width, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    ground, text = (page.evaluate(f"getComputedStyle(document.body).{name}") for name in ("backgroundColor", "color"))
    dark, bright = sorted([ground, text], key=lambda colour: sum(map(int, re.findall(r"\d+", colour)[:3])))
    assert (ground, text) == ((dark, bright) if scheme == "dark" else (bright, dark))
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the use"
    page.keyboard.press("Enter")
    assert page.evaluate("location.hash") == "#use"
    # Tables and commands that are wider than the window scroll with the arrow keys.
    focused = set()
    for _ in range(12):
        page.keyboard.press("Tab")
        focused.add(page.evaluate("document.activeElement.tagName"))
    assert {"DIV", "PRE"} <= focused
