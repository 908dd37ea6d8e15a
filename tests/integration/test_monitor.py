"""``anomalib-ot monitor`` on a folder, and on a growing one until it is interrupted."""

import csv
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.engine import Engine
from anomalib.post_processing import PostProcessor
from lightning.pytorch import seed_everything
from PIL import Image, ImageEnhance

from anomalib_ot import Assembly, WtFlow
from anomalib_ot.cli import main
from anomalib_ot.decide import DriftMonitor
from anomalib_ot.host.calibration import TRAINED
from anomalib_ot.images.reading import Reading

pytestmark = pytest.mark.slow
SETTINGS = {
    "backbone": "test_resnet",
    "layers": ["layer2"],
    "pre_trained": False,
    "image_size": (64, 64),
    "training_steps": 4,
    "batch_size": 8,
    "whitened_channels": 8,
    "evaluator": False,
    "visualizer": False,
}
CHANGED = 60


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with 20 good images ``calm``, and 60 brighter ones after 10 others ``changed``, and a broken file."""
    root = tmp_path_factory.mktemp("monitor")
    Assembly(root / "stream", n_train=30 + CHANGED, n_validation=1, n_test=1, seed=1).prepare_data()
    good = sorted((root / "stream/tray/train/good").glob("*.png"))
    for number, path in enumerate(good):
        folder = root / ("calm" if number < 20 else "changed")
        folder.mkdir(exist_ok=True)
        image = Image.open(path).convert("RGB")
        if number >= 30:
            image = ImageEnhance.Brightness(image).enhance(1.5)
        image.save(folder / path.name)
    (root / "changed/broken.png").write_bytes(b"no image")
    return root


@pytest.fixture(scope="module")
def trained(root):
    """Trains a model with these settings, once."""
    made = {}

    def trained(**settings):
        key = tuple(map(str, settings.items()))
        if key not in made:
            folder = root / f"model{len(made)}"
            data = Assembly(root / "data", n_train=30, n_validation=30, n_test=1, val_split_mode="from_dir")
            engine = Engine(default_root_dir=folder, accelerator="cpu", logger=False, enable_progress_bar=False)
            seed_everything(0, workers=True, verbose=False)
            engine.fit(WtFlow(**SETTINGS, **settings), datamodule=data)
            made[key] = folder / "model.ckpt"
            engine.trainer.save_checkpoint(made[key])
        return str(made[key])

    return trained


def rows_of(folder):
    with (folder / "drift.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def refusal(arguments):
    with pytest.raises(SystemExit) as stop:
        main(["monitor", *map(str, arguments)])
    return stop.value.code


def test_good_images_raise_no_alarm_and_changed_ones_do(root, trained, tmp_path, capsys, caplog):
    arguments = ["--ckpt_path", trained(calibration_folds=0), "--output", str(tmp_path), "--appearance", "false"]
    caplog.clear()
    main(["monitor", *arguments, "--data", str(root / "calm")])
    # Of the threshold of the model, which 30 images set.
    assert "good images support no rate below" not in caplog.text
    output = capsys.readouterr().out
    assert output.splitlines()[-2].startswith("20 images: no drift (martingales: score ")
    assert output.splitlines()[-1] == str(tmp_path / "drift.html")
    assert "Watching for higher scores only" not in caplog.text
    main(["monitor", *arguments, "--data", str(root / "changed")])
    assert f"Skipping {root / 'changed/broken.png'}: cannot read" in caplog.text
    line = capsys.readouterr().out.splitlines()[-2]
    assert line.startswith(f"{10 + CHANGED} images, 1 skipped: drift to higher scores (")
    rows = rows_of(tmp_path)
    paths = sorted(path for path in (root / "changed").iterdir() if path.name != "broken.png")
    assert [row["path"] for row in rows] == [str(path) for path in paths]
    alarm = next(index for index, row in enumerate(rows) if row["alarm"] == "yes")
    assert alarm > 10
    assert line.endswith(f", alarm at {paths[alarm]}")
    began = paths.index(next(path for path in paths if f"since {path}," in line))
    assert abs(began - 10) <= 6
    content = WtFlow.load_from_checkpoint(trained(calibration_folds=0)).post_processor.image_calibration
    monitor = DriftMonitor(content.tolist())
    states = [monitor.update(float(row["score_raw"])) for row in rows]
    assert [float(row["p_value"]) for row in rows] == pytest.approx([state.p_value for state in states], rel=1e-5)
    assert [float(row["martingale"]) for row in rows] == pytest.approx([s.martingale for s in states], rel=1e-5)
    page = (tmp_path / "drift.html").read_text(encoding="utf-8")
    assert "http" not in page.replace('http-equiv="Content-Security-Policy"', "")
    for title in ("Course", "First image of the drift", "Images that changed most", "Places that changed", "Skipped"):
        assert title in page
    assert page.count("data:image/webp") == 9


def test_light_is_watched_beside_the_scores(root, trained, tmp_path, capsys):
    """Images are 1.5 times as bright after the tenth."""
    arguments = ["--ckpt_path", trained(calibration_folds=2), "--output", str(tmp_path)]
    main(["monitor", *arguments, "--data", str(root / "calm")])
    line = capsys.readouterr().out.splitlines()[-2]
    assert re.fullmatch(
        r"20 images: no drift \(martingales: score \S+ of 200, brightness \S+ of 400, sharpness \S+ of 400\)", line
    )
    main(["monitor", *arguments, "--data", str(root / "changed"), "--reference", str(root / "calm")])
    line = capsys.readouterr().out.splitlines()[-2]
    before, since = map(
        float, re.search(r"drift to higher brightness \((\S+) to (\S+)\), probably since ", line).groups()
    )
    assert since / before == pytest.approx(1.5, rel=0.1)
    rows = rows_of(tmp_path)
    paths = [Path(row["path"]) for row in rows]
    pixels = [np.asarray(Image.open(path).convert("RGB")) / 255 for path in paths]
    assert [float(row["brightness"]) for row in rows] == pytest.approx([each.mean() for each in pixels], rel=1e-4)
    known = [np.asarray(Image.open(path).convert("RGB")).mean() / 255 for path in sorted((root / "calm").iterdir())]
    monitor = DriftMonitor(known, 0.0025)
    states = [monitor.update(float(row["brightness"])) for row in rows]
    martingales = [float(row["martingale_brightness"]) for row in rows]
    assert martingales == pytest.approx([state.martingale for state in states], rel=1e-5)
    assert states[-1].is_alarm
    limits = {"martingale": 200, "martingale_brightness": 400, "martingale_sharpness": 400}
    first = next(i for i, row in enumerate(rows) if any(float(row[name]) >= limit for name, limit in limits.items()))
    assert [row["alarm"] for row in rows] == ["no"] * first + ["yes"] * (len(rows) - first)
    page = (tmp_path / "drift.html").read_text(encoding="utf-8")
    assert "that of the brightness at 400" in page


def test_images_of_twelve_bits_are_read_in_the_range_that_is_given(root, trained, tmp_path, caplog):
    deep, shallow = tmp_path / "deep", tmp_path / "shallow"
    for folder in (deep, shallow):
        folder.mkdir()
    for path in sorted((root / "calm").iterdir())[:4]:
        pixels = np.asarray(Image.open(path).convert("L"))
        Image.fromarray(pixels).save(shallow / path.name)
        Image.fromarray(pixels.astype(np.uint16) * 16).save(deep / path.name)
    arguments = ["monitor", "--ckpt_path", trained(calibration_folds=0)]
    main([*arguments, "--data", str(shallow), "--output", str(tmp_path / "8")])
    main([*arguments, "--data", str(deep), "--output", str(tmp_path / "12"), "--value_range", "[0, 4080]"])
    found, expected = rows_of(tmp_path / "12"), rows_of(tmp_path / "8")
    for column in ("score_raw", "brightness", "sharpness"):
        values = [float(row[column]) for row in found]
        assert values == pytest.approx([float(row[column]) for row in expected], rel=1e-4)
    # A checkpoint that was trained with this range needs no option.
    content = torch.load(arguments[2], weights_only=True)
    torch.save(
        content | {"reading": Reading(is_full_range=True, value_range=(0, 4080), is_deep=True).plain},
        tmp_path / "deep.ckpt",
    )
    trained_so = ["monitor", "--ckpt_path", str(tmp_path / "deep.ckpt"), "--data", str(deep)]
    main([*trained_so, "--output", str(tmp_path / "as trained")])
    assert rows_of(tmp_path / "as trained") == found
    assert "with value_range" not in caplog.text
    main([*trained_so, "--output", str(tmp_path / "16"), "--value_range", "[0, 65535]"])
    assert "with value_range [0, 65535], but the model was trained on images that were read with" in caplog.text
    assert rows_of(tmp_path / "16") != found
    arguments += ["--data", str(deep), "--output", str(tmp_path / "12")]
    assert "value_range must be two finite numbers" in refusal([*arguments[1:], "--value_range", "[1, 0]"])
    (deep / "broken.png").write_bytes(b"no image")
    main([*arguments, "--value_range", "[0, 4080]"])
    assert caplog.text.count("cannot read") == 1


def test_folds_are_watched_for_higher_scores_and_a_reference_for_both(root, trained, tmp_path, capsys, caplog):
    arguments = ["--ckpt_path", trained(calibration_folds=2), "--data", str(root / "calm"), "--output", str(tmp_path)]
    arguments += ["--appearance", "false"]
    main(["monitor", *arguments])
    text = "Watching for higher scores only: the calibration scores are those of good images that were each left out"
    assert text in caplog.text
    caplog.clear()
    assert "only higher scores are watched" in (tmp_path / "drift.html").read_text(encoding="utf-8")
    main(["monitor", *arguments, "--data", str(root / "changed"), "--reference", str(root / "calm")])
    assert "Watching" not in caplog.text
    assert "drift to higher scores (" in capsys.readouterr().out
    assert "only higher scores are watched" not in (tmp_path / "drift.html").read_text(encoding="utf-8")


def test_a_growing_folder_is_followed_until_the_command_is_interrupted(root, trained, tmp_path):
    line = tmp_path / "line"
    line.mkdir()
    script = "from anomalib_ot.cli import main; main()"
    options = ["--ckpt_path", trained(calibration_folds=0), "--data", line, "--output", tmp_path / "out"]
    command = [sys.executable, "-c", script, "monitor", *map(str, options), "--watch", "0.2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        paths = sorted((root / "calm").iterdir())[:5]
        for count in (2, 5):
            for path in paths[:count]:
                if not (line / path.name).exists():
                    shutil.copy(path, line / path.name)
            _wait(process, lambda count=count: len(rows_of(tmp_path / "out")) == count)
        process.send_signal(signal.SIGINT)
        output, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, said
    assert output.startswith("5 images: no drift")
    assert [row["path"] for row in rows_of(tmp_path / "out")] == [str(line / path.name) for path in paths]
    assert (tmp_path / "out/drift.html").exists()


def test_each_folder_has_an_output_of_its_own_and_a_skipped_image_is_read_again(
    root, trained, tmp_path, monkeypatch, capsys
):
    line = tmp_path / "line"
    line.mkdir()
    good = min((root / "calm").iterdir())
    (line / "001.png").write_bytes(good.read_bytes()[:200])
    looks = []

    def sleep(_seconds):
        looks.append(len(rows_of(output)) if (output / "drift.csv").exists() else None)
        if len(looks) == 3:
            shutil.copy(good, line / "001.png")
        if len(looks) == 6:
            raise KeyboardInterrupt

    output = tmp_path / "results/monitor/line"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("anomalib_ot.images.folder.time.sleep", sleep)
    main(["monitor", "--ckpt_path", trained(calibration_folds=0), "--data", "line", "--watch", "0.1"])
    assert looks == [None, 0, 0, 0, 1, 1]
    assert capsys.readouterr().out.startswith("1 images: no drift")
    assert "Skipped" not in (output / "drift.html").read_text(encoding="utf-8")
    # Another monitor replaces the whole table and not its first rows.
    earlier = (output / "drift.csv").stat().st_ino
    main(["monitor", "--ckpt_path", trained(calibration_folds=0), "--data", "line"])
    assert (output / "drift.csv").stat().st_ino != earlier


def _wait(process, is_done):
    for _ in range(600):
        try:
            if is_done():
                return
        except FileNotFoundError:
            pass
        assert process.poll() is None, process.communicate()
        time.sleep(0.2)
    pytest.fail("the command has not scored the images in two minutes")


def test_what_cannot_be_monitored_is_one_line(root, trained, tmp_path):
    good = ["--ckpt_path", trained(calibration_folds=0), "--data", root / "calm", "--output", tmp_path / "out"]
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "there are no images in" in refusal([*good, "--data", empty])
    assert "there are no images in" in refusal([*good, "--reference", empty])
    assert "there is no folder absent" in refusal([*good, "--data", "absent"])
    assert "there is no checkpoint absent" in refusal([*good, "--ckpt_path", "absent"])
    assert "false_alarm_rate must be between 0 and 1" in refusal([*good, "--false_alarm_rate", "1"])
    assert "watch must be a positive number of seconds" in refusal([*good, "--watch", "0"])
    assert not (tmp_path / "out").exists()
    (empty / "broken.png").write_bytes(b"no image")
    assert "none of the 1 images of" in refusal([*good, "--data", empty])
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/drift.csv").write_text("theirs")
    assert "holds drift.csv, which anomalib-ot did not write" in refusal([*good, "--output", tmp_path / "foreign"])
    assert (tmp_path / "foreign/drift.csv").read_text() == "theirs"


def test_a_checkpoint_with_the_post_processor_of_anomalib_needs_a_reference(root, trained, tmp_path, capsys):
    options = ["--ckpt_path", trained(post_processor=PostProcessor()), "--data", root / "changed"]
    options += ["--output", tmp_path, "--appearance", "false"]
    said = refusal(options)
    assert "has no scores of good images (its post_processor is " in said
    assert "set reference to a folder of good images" in said
    main(["monitor", *map(str, options), "--reference", str(root / "calm")])
    assert "drift to higher scores (" in capsys.readouterr().out


def test_scores_of_images_that_the_model_was_trained_on_are_refused(root, trained, tmp_path):
    content = torch.load(trained(calibration_folds=0), weights_only=True)
    (state,) = [each for each in _dictionaries(content) if "calibration_source" in each]
    state["calibration_source"] = TRAINED
    torch.save(content, tmp_path / "trained.ckpt")
    with pytest.raises(SystemExit) as stop:
        main(["monitor", "--ckpt_path", str(tmp_path / "trained.ckpt"), "--data", str(root / "calm")])
    assert "good images that the model was trained on" in stop.value.code


def _dictionaries(content):
    """A dictionary and all within it."""
    if isinstance(content, dict):
        yield content
        for each in content.values():
            yield from _dictionaries(each)
