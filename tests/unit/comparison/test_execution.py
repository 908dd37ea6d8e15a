"""Tests of scheduling and stopping runs. The integration tests cover the whole command ``anomalib-ot compare``."""

import errno
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from anomalib_ot.comparison import Key, Plan, Record, compare, write_record
from anomalib_ot.comparison.engines import LocalEngine
from anomalib_ot.comparison.record import pack_record


@pytest.mark.parametrize(
    ("count", "visible", "expected"),
    [(0, None, {None}), (2, None, {"0", "1"}), (2, "4,7", {"4", "7"}), (3, None, {"0", "1"})],
)
def test_workers_take_turns_at_the_devices(monkeypatch, count, visible, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    both = threading.Barrier(2, timeout=10)
    call = LocalEngine(2, lambda job, device, _: (both.wait(), {device: job})[1]).run
    with ThreadPoolExecutor(2) as pool:
        for _ in range(2):
            seen = [device for result in pool.map(call, ["one", "two"]) for device in result]
            assert {*seen} == expected
            assert len(seen) == 2


@pytest.fixture
def plan(small_plan):
    model = small_plan["models"]["PaDiM"]
    return Plan(**{**small_plan, "models": {"A": model, "B": model}, "ensembles": ("A+B",)})


@pytest.fixture
def module():
    return sys.modules[compare.__module__]


def test_after_a_full_disk_no_run_goes_on(plan, module, tmp_path, monkeypatch):
    ends, both = [], threading.Barrier(2, timeout=60)

    def run_job(job, _, given_up):
        both.wait()
        if job.key.model == "B":
            ends.append(given_up.wait(60))
        return pack_record(Record(job.key, error="given up"))

    def unpack(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "run_job", run_job)
    monkeypatch.setattr(module, "unpack_record", unpack)
    with pytest.raises(OSError, match="No space left on device"):
        compare(plan, tmp_path, workers=2)
    assert ends == [True]


@pytest.mark.parametrize(
    "name", ["results.csv", "results.json", "runs/tray/A/seed-0/weights", "runs/tray/A+B/seed-0/notes.txt"]
)
def test_what_others_wrote_is_refused_before_anything_runs(plan, tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("work of days")
    with pytest.raises(FileExistsError, match=f"holds {path.name}, which anomalib-ot did not write"):
        compare(plan, tmp_path)
    assert [each for each in tmp_path.rglob("*") if each.is_file()] == [path]


def test_a_kept_run_of_another_label_is_not_replaced(plan, tmp_path):
    other = Plan(plan.models, {"tra:y": plan.data["tray"]}, plan.backbone, image_size=plan.image_size)
    write_record(tmp_path / "runs", Record(Key("tra/y", "B"), error="why"))
    with pytest.raises(ValueError, match="tra-y/B/seed-0 holds B on tra/y, seed 0; rename the label"):
        compare(other, tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [("threads", 0), ("threads", -1), ("time_limit", 0.0), ("time_limit", -1), ("total_time_limit", 0)],
)
def test_limits_out_of_range_are_refused_before_anything_runs(plan, tmp_path, name, value):
    with pytest.raises(ValueError, match=f"{name} must be"):
        compare(plan, tmp_path, **{name: value})


def test_a_comparison_stops_when_its_own_time_is_over_and_goes_on_the_next_time(plan, module, tmp_path, monkeypatch):
    began, ended = [], []

    def run_job(job, _, given_up):
        began.append(job.key.model)
        if job.key.model == "B":
            ended.append(given_up.wait(60))
        return pack_record(Record(job.key, job.config, error="why"))

    monkeypatch.setattr(module, "run_job", run_job)
    three = Plan(**{**vars(plan), "models": {**plan.models, "C": plan.models["A"]}, "ensembles": ()})
    # The data is made before, as the limit is short.
    module._check_data(three.jobs())
    records = compare(three, tmp_path, total_time_limit=0.02)
    assert (began, ended) == (["A", "B"], [True])
    late = "not finished within the total time limit of 0.02 minutes"
    assert [record.message for record in records] == ["why", late, late]
    monkeypatch.setattr(module, "run_job", lambda job, *_: pack_record(Record(job.key, job.config, error="done")))
    assert [record.message for record in compare(three, tmp_path)] == ["done"] * 3


class Stop(Exception):  # noqa: N818 - no error
    """Ends the comparison when the threads of the runs are known."""


@pytest.mark.parametrize(("available", "workers", "expected"), [(4, 2, 2), (4, 1, 4), (1, 2, 1), (5, 2, 2)])
def test_runs_share_the_threads_that_torch_may_use(plan, module, tmp_path, monkeypatch, available, workers, expected):
    seen = []

    def is_there(_, job):
        seen.append(job.threads)
        raise Stop

    monkeypatch.setattr(torch, "get_num_threads", lambda: available)
    monkeypatch.setattr(module, "_is_there", is_there)
    with pytest.raises(Stop):
        compare(plan, tmp_path, workers=workers)
    assert seen == [expected]


def test_omp_num_threads_decides_how_many_threads_a_run_has(tmp_path):
    script = (
        "import sys; from pathlib import Path; from anomalib_ot.comparison import Plan, compare\n"
        "sys.modules[compare.__module__]._is_there = lambda kept, job: sys.exit(print(job.threads))\n"
        "compare(Plan({'a': {'class_path': 'Padim'}}, {'b': {'class_path': 'Assembly'}}), Path('absent'))"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "1\n", done.stderr
