"""``anomalib-ot compare`` from end to end, on small pictures."""

import csv
import errno
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from anomalib_ot import Assembly
from anomalib_ot.cli import main
from anomalib_ot.comparison import Plan, compare, read_plan, read_records

pytestmark = pytest.mark.slow

SMALL = {"layers": ["layer1"], "pre_trained": False}
CONFORMAL = "anomalib_ot.decide.ConformalPostProcessor"
MODELS = {
    "PaDiM": {"class_path": "Padim", "init_args": {**SMALL, "n_features": 10}},
    "PatchCore": {
        "class_path": "Patchcore",
        "init_args": {**SMALL, "coreset_sampling_ratio": 0.05, "post_processor": {"class_path": CONFORMAL}},
    },
    "FastFlow": {"class_path": "Fastflow", "why": "it takes no such backbone"},
}


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    data = {"root": str(folder / "data"), "n_train": 4, "n_validation": 1, "n_test": 2, "num_workers": 0}
    content = {
        "title": "Small pictures",
        "backbone": "resnet34",
        "image_size": [64, 64],
        "models": MODELS,
        "data": {"tray": {"class_path": "Assembly", "init_args": data}},
        "baseline": "PaDiM",
    }
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="module")
def results(plan, tmp_path_factory):
    output = tmp_path_factory.mktemp("results")
    command = [sys.executable, "-c", "from anomalib_ot.cli import main; main()", "compare", "--plan", str(plan)]
    arguments = ["--ensemble", "PaDiM+PatchCore", "--output", str(output), "--accelerator", "cpu", "--threads", "1"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return output, done


def test_one_command_compares_and_reports(results):
    output, done = results
    assert done.stdout == (output / "report.md").read_text() + "\n"
    assert "FastFlow on tray, seed 0: FAILED, ValueError: Backbone resnet34 is not supported" in done.stderr
    assert "[3/3] " in done.stderr
    for model in ("PaDiM", "PatchCore", "PaDiM+PatchCore"):
        assert f"\n| {model} |" in done.stdout
    assert "Backbone resnet34 is not supported" in done.stdout
    page = (output / "report.html").read_text()
    assert "Small pictures" in page
    assert "data:image/" in page


def test_the_command_fails_if_all_models_do(plan, tmp_path):
    with pytest.raises(SystemExit) as stop:
        main(["compare", "--plan", str(plan), "--models", "[FastFlow]", "--output", str(tmp_path)])
    assert stop.value.code.startswith(
        "anomalib-ot: all runs failed; the first error is that of FastFlow on tray, seed 0: ValueError: Backbone"
    )
    assert "FastFlow" in (tmp_path / "report.html").read_text()


def test_every_raw_number_is_kept(results):
    output, _ = results
    with (output / "results.csv").open(newline="") as file:
        rows = {row["model"]: row for row in csv.DictReader(file)}
    content = {each["key"]["model"]: each for each in json.loads((output / "results.json").read_text())}
    assert rows.keys() == content.keys() == {*MODELS, "PaDiM+PatchCore"}
    for name in ("PaDiM", "PatchCore"):
        metrics = content[name]["metrics"]
        assert float(rows[name]["image_AUROC"]) == pytest.approx(metrics["image_AUROC"], abs=1e-4)
        assert {"image_AUROC_logical_anomalies", "pixel_AUPRO", "image_F1Max", "pixel_AUROC"} <= metrics.keys()
        assert content[name]["config"]["model"]["init_args"]["backbone"] == "resnet34"
        assert content[name]["environment"]["packages"]["anomalib"]
    assert rows["FastFlow"]["error"].startswith("ValueError: Backbone resnet34")
    assert rows["FastFlow"]["image_AUROC"] == ""


def test_verdicts_are_kept(results):
    output, done = results
    with (output / "results.csv").open(newline="") as file:
        rows = {row["model"]: row for row in csv.DictReader(file)}
    # The good test images are the validation images too.
    assert "calibrated on test images" in done.stdout
    assert [rows["PatchCore"][name] for name in ("calibration_source", "calibrated_on_test")] == ["held_out", "True"]
    good = int(rows["PatchCore"]["good_images"])
    assert int(rows["PatchCore"]["calibration_images"]) == good
    assert rows["PaDiM"]["good_images"] == rows["PaDiM+PatchCore"]["good_images"] == ""
    (record,) = [each for each in read_records(output / "runs") if each.key.model == "PatchCore"]
    p_values, labels = record.predictions.p_values, record.predictions.labels
    # Each good image is one of those that calibrate.
    assert p_values.min() >= 1 / (good + 1)
    assert np.allclose(sorted(p_values[labels == 0]), np.arange(2, good + 2) / (good + 1))


def test_it_goes_on_where_it_stopped(results, plan, tmp_path, caplog):
    output = shutil.copytree(results[0], tmp_path / "copy")
    shutil.rmtree(output / "runs" / "tray" / "PatchCore")
    (output / "runs" / "tray" / "PaDiM+PatchCore" / "seed-0" / "result.json").unlink()
    kept = output / "runs" / "tray" / "PaDiM" / "seed-0" / "result.json"
    before = kept.stat().st_mtime_ns
    with caplog.at_level("INFO"):
        chosen = read_plan(plan, ["PaDiM", "PatchCore"], ensembles=["PaDiM+PatchCore"])
        records = compare(chosen, output, threads=1, accelerator="cpu")
    assert "1 of 2 runs are already finished" in caplog.text
    assert kept.stat().st_mtime_ns == before
    first = {record.key: record.metrics for record in read_records(results[0] / "runs")}
    assert {record.key: record.metrics for record in records}.items() <= first.items()


def test_a_run_that_is_cut_off_runs_again(results, plan, tmp_path, caplog):
    output = shutil.copytree(results[0], tmp_path / "copy")
    file = output / "runs" / "tray" / "PaDiM" / "seed-0" / "result.json"
    content = file.read_text()
    file.write_text(content[:100])
    # It waits until another has run and been kept.
    shutil.rmtree(output / "runs" / "tray" / "PatchCore")
    _, record = compare(read_plan(plan, ["PatchCore", "PaDiM"]), output, threads=1, accelerator="cpu")
    assert "cannot be read" in caplog.text
    assert record.metrics == json.loads(content)["metrics"]


def test_results_with_other_settings_are_refused(results, plan):
    with pytest.raises(ValueError, match="with settings that differ from the plan; choose another output"):
        compare(read_plan(plan, ["PaDiM"], image_size=[32, 32]), results[0])


def test_two_workers_give_the_same_although_one_is_killed(results, plan, tmp_path, kill_jobs):
    with kill_jobs(1):
        chosen = read_plan(plan, ensembles=["PaDiM+PatchCore"])
        records = compare(chosen, tmp_path, workers=2, accelerator="cpu")
    first = {record.key: (record.metrics, record.message) for record in read_records(results[0] / "runs")}
    assert {record.key: (record.metrics, record.message) for record in records} == first


def test_runs_end_with_the_command(plan, tmp_path):
    endless = {"class_path": "WtFlow", "init_args": {**SMALL, "training_steps": 10**6, "batch_size": 2}}
    models = ["--models", json.dumps([endless])]
    arguments = ["compare", "--plan", str(plan), *models, "--output", str(tmp_path), "--accelerator", "cpu"]
    command = subprocess.Popen([sys.executable, "-c", "from anomalib_ot.cli import main; main()", *arguments])
    children = Path(f"/proc/{command.pid}/task")

    def runs():
        pids = {pid for each in children.glob("*/children") for pid in each.read_text().split()}
        return {pid for pid in pids if b"comparison.job" in _command_line(pid)}

    while not (started := runs()):
        time.sleep(0.1)
        assert command.poll() is None
    command.terminate()
    command.wait()
    deadline = time.monotonic() + 60
    while any(_command_line(pid) for pid in started):
        assert time.monotonic() < deadline, "a run goes on although the command has ended"
        time.sleep(0.2)


def _command_line(pid):
    path = Path(f"/proc/{pid}/cmdline")
    return path.read_bytes() if path.exists() else b""


def test_ray_gives_the_same(results, plan, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray", reason='Ray is an extra: pip install "anomalib-ot[ray]"')
    # Else its workers give way to whatever else runs.
    monkeypatch.setenv("RAY_worker_niceness", "0")
    try:
        records = compare(read_plan(plan, ["PaDiM", "PatchCore"]), tmp_path, 2, "ray", threads=1, accelerator="cpu")
    finally:
        ray.shutdown()
    first = {record.key: record.metrics for record in read_records(results[0] / "runs")}
    assert {record.key: record.metrics for record in records}.items() <= first.items()


def test_full_disk(results, plan, tmp_path, monkeypatch):
    output = shutil.copytree(results[0], tmp_path / "copy")
    shutil.rmtree(output / "runs" / "tray" / "PatchCore")

    def write(path, _):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", write)
    with pytest.raises(SystemExit) as stop:
        main(
            [
                "compare",
                "--plan",
                str(plan),
                "--models",
                "[PaDiM, PatchCore]",
                "--output",
                str(output),
                "--accelerator",
                "cpu",
            ]
        )
    assert "No space left on device" in stop.value.code
    assert {record.key.model for record in read_records(output / "runs")} >= {"PaDiM"}
    with (output / "results.csv").open(newline="") as file:
        assert "PaDiM" in {row["model"] for row in csv.DictReader(file)}


@pytest.mark.parametrize("label", ["good", "anomalous"])
def test_data_without_one_of_both_is_refused_before_anything_runs(plan, tmp_path, label):
    absent, there = ("normal", "broken") if label == "good" else ("anomalous", "fine")
    config = yaml.safe_load(plan.read_text())["data"]["tray"]["init_args"]
    test = Path(config["root"]) / "tray" / "test"
    init_args = {
        "name": there,
        "root": str(test.parent),
        "normal_dir": "train/good",
        "abnormal_dir": "test/logical_anomalies" if label == "good" else None,
        "normal_test_dir": "test/good" if label == "anomalous" else None,
        "test_split_mode": "from_dir",
        "val_split_mode": "none",
    }
    chosen = Plan({"PaDiM": MODELS["PaDiM"]}, {there: {"class_path": "Folder", "init_args": init_args}})
    with pytest.raises(ValueError, match=f"{there} has no {absent} test images"):
        compare(chosen, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"workers": 0}, "workers must be at least 1"), ({"engine": "cloud"}, "engine must be 'processes' or 'ray'")],
)
def test_unknown_ways_to_run(plan, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        compare(read_plan(plan), tmp_path, **changes)


def test_own_folder_is_compared_by_one_command_without_a_plan(backbone, tmp_path):
    source = Assembly(tmp_path / "data", n_train=8, n_validation=1, n_test=4)
    source.prepare_data()
    tray = tmp_path / "data" / "tray"
    shutil.copytree(tray / "train" / "good", tmp_path / "line" / "good")
    for kind in ("logical_anomalies", "structural_anomalies"):
        shutil.copytree(tray / "test" / kind, tmp_path / "line" / "bad" / kind)
    command = [sys.executable, "-c", "from anomalib_ot.cli import main; main()", "compare", "--backbone", backbone]
    folder = "{class_path: Folder, init_args: {name: line, root: line, normal_dir: good, abnormal_dir: bad}}"
    arguments = ["--models", "[WtFlow, Padim, Patchcore]", "--data", folder, "--image_size", "[64, 64]"]
    done = subprocess.run([*command, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "3 runs, 0 of them failed" in done.stdout
    page = (tmp_path / "results" / "compare" / "report.html").read_text()
    assert "<h3>bad/logical_anomalies/" in page
