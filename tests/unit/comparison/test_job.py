"""Tests of a run in a separate process: its measurements, and its files if it ends early."""

import json
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from anomalib.engine import Engine
from anomalib.metrics import AUROC, Evaluator
from lightning.pytorch import seed_everything

from anomalib_ot import Assembly
from anomalib_ot.comparison import Plan
from anomalib_ot.comparison.environment import environment
from anomalib_ot.comparison.record import unpack_record
from anomalib_ot.comparison.supervision import run_job

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def job(small_plan):
    (job,) = Plan(**small_plan).jobs(threads=1, accelerator="cpu")
    job.create_data().prepare_data()
    return job


@pytest.fixture(scope="module")
def record(job, tmp_path_factory):
    return unpack_record(tmp_path_factory.mktemp("runs"), job.key, run_job(job))


def test_metrics_are_those_of_the_hosts_engine(job, record, tmp_path):
    seed_everything(0, workers=True)
    model, data = job.create_model(), job.create_data()
    fields = {"image_": ["pred_score", "gt_label"], "pixel_": ["anomaly_map", "gt_mask"]}
    model.evaluator = Evaluator(test_metrics=[AUROC(fields=each, prefix=prefix) for prefix, each in fields.items()])
    engine = Engine(default_root_dir=tmp_path, accelerator="cpu", logger=False)
    engine.fit(model, datamodule=data)
    (expected,) = engine.test(model, datamodule=data)
    # The engine clips to the range of the validation images.
    assert record.metrics["pixel_AUROC"] == pytest.approx(100 * expected["pixel_AUROC"], abs=0.5)
    assert record.metrics["image_AUROC"] == pytest.approx(100 * expected["image_AUROC"], abs=1e-4)


def test_what_is_kept(job, record):
    assert not record.failed
    assert record.config == json.loads(json.dumps(job.config))
    assert set(record.costs) == {"fit_s", "ms_per_image", "peak_mib", "size_mib", "parameters"}
    assert min(record.costs.values()) > 0
    # Random-access memory of a process that has imported torch, and weights of a ResNet's first stage.
    assert record.costs["peak_mib"] > 200
    assert record.costs["size_mib"] * 2**20 > 4 * record.costs["parameters"]
    assert record.environment["packages"].keys() >= {"anomalib", "torch", "anomalib-ot"}
    assert record.environment["threads"] == 1
    said = record.predictions
    assert said.images == sorted(said.images)
    assert {*said.kinds} == {"good", "logical_anomalies", "structural_anomalies"}
    assert said.maps.shape == said.truth.shape == (len(said.images), 64, 64)
    normal = said.labels == 0
    assert not said.truth[normal].any()
    assert said.truth[~normal].any((1, 2)).all()


def test_a_seed_gives_the_same_again(job, record, tmp_path):
    again = unpack_record(tmp_path, job.key, run_job(job))
    np.testing.assert_array_equal(again.predictions.scores, record.predictions.scores)
    assert again.metrics == record.metrics


def test_all_models_and_seeds_meet_the_same_random_split(job, tmp_path):
    Assembly(tmp_path, n_train=4, n_validation=1, n_test=6).prepare_data()
    folder = {
        "class_path": "Folder",
        "init_args": {
            "name": "tray",
            "root": str(tmp_path / "tray"),
            "normal_dir": "train/good",
            "abnormal_dir": "test/logical_anomalies",
            "normal_test_dir": "test/good",
            "val_split_mode": "from_test",
            "num_workers": 0,
        },
    }
    patchcore = {"class_path": "Patchcore", "init_args": {"backbone": "resnet18", "pre_trained": False}}
    jobs = [
        replace(job, data=folder),
        replace(job, data=folder, key=replace(job.key, seed=1)),
        replace(job, data=folder, key=replace(job.key, model="PatchCore"), model=patchcore),
    ]
    records = [unpack_record(tmp_path / "runs", each.key, run_job(each)) for each in jobs]
    assert [len(record.predictions.images) for record in records] == [6, 6, 6]
    assert len({record.test_set for record in records}) == 1


def test_a_model_that_fails_leaves_its_traceback(job, tmp_path):
    failing = replace(job, model={"class_path": "Fastflow", "init_args": {"backbone": "resnet34"}})
    record = unpack_record(tmp_path, job.key, run_job(failing))
    assert record.message.startswith("ValueError: Backbone resnet34 is not supported")
    assert "Traceback" in record.error
    assert record.metrics == {}


def test_time_limit(job, tmp_path):
    record = unpack_record(tmp_path, job.key, run_job(replace(job, time_limit=0.005)))
    assert record.message == "not finished within the time limit of 0.005 minutes"


@pytest.mark.parametrize("times", [1, 2])
def test_a_killed_process_runs_once_more(job, record, tmp_path, kill_jobs, times):
    with kill_jobs(times):
        files = run_job(job)
    again = unpack_record(tmp_path, job.key, files)
    if times == 1:
        assert again.metrics == record.metrics
    else:
        assert again.message == "killed 2 times by signal 9; check the available memory"


def test_a_process_that_the_user_interrupts_does_not_run_once_more(job, tmp_path, monkeypatch):
    # Ctrl-C reaches the processes of a comparison too, and the command waits for them.
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho >> "$0-starts"\nkill -INT $$\n')
    python.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(python))
    # What a shell starts in the background ignores Ctrl-C, and so would what is started here.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        record = unpack_record(tmp_path / "runs", job.key, run_job(job))
    finally:
        signal.signal(signal.SIGINT, before)
    assert (tmp_path / "python-starts").read_text() == "\n"
    assert record.message == "interrupted"


def test_a_run_that_is_given_up_ends_at_once(job, tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec sleep 600\n")
    python.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(python))
    given_up = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        files = pool.submit(run_job, job, given_up=given_up)
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            time.sleep(0.01)
        given_up.set()
        record = unpack_record(tmp_path / "runs", job.key, files.result(10))
    assert record.message == "stopped before its end"
    assert not Path("/proc", (tmp_path / "pid").read_text().strip()).exists()


@pytest.mark.parametrize("name", ["cuda", "xpu", "mps"])
def test_the_device_that_ran_is_what_is_recorded(job, monkeypatch, name):
    # What torch has for each: a name for cards, nothing for mps.
    module = SimpleNamespace() if name == "mps" else SimpleNamespace(get_device_name=lambda it: f"a card, {it.type}")
    monkeypatch.setattr(torch, "get_device_module", lambda _: module)
    ran = environment(replace(job, accelerator="auto"), torch.device(name))
    assert (ran["device"], ran["accelerator"]) == ("mps" if name == "mps" else f"a card, {name}", name)


@pytest.mark.parametrize(("accelerator", "expected"), [("cpu", "cpu"), ("auto", "xpu"), ("xpu", "xpu")])
def test_a_run_that_failed_early_names_the_device_that_it_would_have_had(job, monkeypatch, accelerator, expected):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("xpu"))
    monkeypatch.setattr(torch, "get_device_module", lambda _: SimpleNamespace())
    assert environment(replace(job, accelerator=accelerator))["device"] == expected
