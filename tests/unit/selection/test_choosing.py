"""The choice: its order, its time, its file, and bad input."""

import json
import logging
import math
import os
import threading
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from anomalib_ot.comparison.engines import RayEngine
from anomalib_ot.selection import Candidate, Trial, choose, choosing, trial_features
from anomalib_ot.synthetic import KINDS
from anomalib_ot.synthetic.images import read_reduced

SIZE = (64, 64)
SMALL = (
    Candidate("PaDiM", "anomalib.models.Padim", {"n_features": 10}, SIZE),
    Candidate("PatchCore", "anomalib.models.Patchcore", {"coreset_sampling_ratio": 0.1}, (96, 96)),
)
THREE = tuple(Candidate(name, "Padim", {"which": name}, SIZE, "resnet18") for name in ("default", "A", "B"))


@pytest.fixture
def start(paths, backbone, tmp_path, monkeypatch):
    """Chooses; the arguments can be changed."""
    # For few images no graph of the backbone is made, which takes longer than a choice.
    monkeypatch.setattr(choosing, "SYNTHETIC", 0)

    def call(images=paths, candidates=THREE, **changed):
        arguments = {"minutes": 5, "state": tmp_path / "new" / "trials.json", **changed}
        return choose(images, [each if each.backbone else each.on(backbone) for each in candidates], **arguments)

    return call


@pytest.fixture
def noise(tmp_path):
    """Ten images of noise of a size."""

    def noise(size):
        folder = tmp_path / "noise"
        folder.mkdir(exist_ok=True)
        random = np.random.default_rng(0)
        for index in range(10):
            Image.fromarray(random.integers(0, 256, size[::-1], dtype=np.uint8)).save(folder / f"{index}.png")
        return sorted(folder.iterdir())

    return noise


class FakeOutcome:
    """Of a candidate whose synthetic AUROC is in its arguments."""

    def __init__(self, candidate):
        mean = candidate.init_args.get("mean", 50.0)
        self.trial = lambda features: Trial(candidate, {"blur": mean}, mean, 1.0, 1.0, 0.05, ()) if features else None


@pytest.fixture
def tried(monkeypatch):
    """Names of the candidates that were tried, without extraction and fit."""
    names = []

    def run_trial(candidate, features, seed):
        del seed
        assert (features.backbone, features.image_size) == (candidate.backbone, candidate.image_size)
        if "error" in candidate.init_args:
            raise ValueError(candidate.init_args["error"])
        names.append(candidate.name)
        return FakeOutcome(candidate)

    def extracted(images, files):
        del images
        return files

    monkeypatch.setattr(choosing, "run_trial", run_trial)
    monkeypatch.setattr(choosing, "TrialFeatures", SimpleNamespace(extracted=extracted))
    monkeypatch.setattr(choosing, "files_for", lambda candidates, *_: candidates[0])
    monkeypatch.setattr(choosing, "trial_set", lambda *_: SimpleNamespace(labels=["a label"]))
    return names


def names_of(trials):
    return [trial.candidate.name for trial in trials]


def test_real_candidates_are_tried_and_the_finished_ones_shown(start, monkeypatch):
    # As few images as have all kinds, areas and contrasts.
    monkeypatch.setattr(trial_features, "SYNTHETIC", 84)
    shown = []
    trials = start(progress=lambda finished, trying: shown.append((names_of(finished), trying)), candidates=SMALL)
    assert {*names_of(trials)} == {each.name for each in SMALL}
    assert [trying and trying.name for _, trying in shown] == [*(each.name for each in SMALL), None]
    assert [len(finished) for finished, _ in shown] == [0, 1, 2]
    assert shown[-1][0] == names_of(trials)
    for trial in trials:
        assert [*trial.auroc] == [*KINDS]
        assert trial.mean == pytest.approx(sum(trial.auroc.values()) / len(KINDS))
        assert trial.fit_s > 0
        assert trial.ms_per_image > 0
        assert trial.false_alarm_rate == pytest.approx(1 / 3), "two held-out images support no lower rate"
        assert sum(row.count for row in trial.detection) == 84


def test_a_choice_continues_after_an_interruption(start, tried):
    def interrupt(finished, trying):
        del trying
        if len(finished) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        start(progress=interrupt)
    assert tried == ["default", "A"]
    trials = start()
    assert tried == ["default", "A", "B"]
    assert start() == trials
    assert len(tried) == 3


def test_without_time_the_default_alone_is_tried_and_more_time_tries_the_others(start, tried, caplog):
    with caplog.at_level(logging.INFO):
        assert names_of(start(minutes=1e-9)) == tried == ["default"]
    assert "1 of 3 candidates were tried" in caplog.text
    assert len(start()) == 3


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("engine", ["processes", "ray"])
def test_another_default_is_tried_even_without_time_and_without_defects(start, tried, monkeypatch, engine):
    start(candidates=THREE[:1])
    assert names_of(start(candidates=THREE[::-1], minutes=1e-9, engine=engine))[0] == "B"
    monkeypatch.setattr(choosing, "trial_set", lambda *_: SimpleNamespace(labels=[]))
    assert names_of(start(candidates=[THREE[1], THREE[0]], engine=engine))[0] == "A"
    assert tried == ["default", "B", "A"]


def test_a_trial_under_another_name_is_not_repeated(start, tried):
    start(candidates=THREE[:1])
    (trial,) = start(candidates=[replace(THREE[0], name="default on a backbone")])
    assert (trial.candidate.name, tried) == ("default on a backbone", ["default"])


def test_no_trial_starts_that_would_not_end_in_time(start, tried, monkeypatch):
    """Each takes 60 s of the clock, so that two of them leave too little of 2.5 minutes."""
    clock = iter(range(0, 10**6, 30))
    monkeypatch.setattr(choosing, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    start(minutes=2.5)
    assert tried == ["default", "A"]


def test_trials_of_other_candidates_stay_in_the_file(start, tried):
    start(candidates=THREE[:2])
    assert names_of(start(candidates=THREE[1:])) == ["A", "B"]
    assert len(start()) == len(tried) == 3


def test_trials_of_changed_images_are_forgotten(start, tried, paths):
    start(candidates=THREE[:1])
    state = paths[0].stat()
    try:
        os.utime(paths[0], ns=(state.st_atime_ns, state.st_mtime_ns + 10**9))
        start(candidates=THREE[:1])
    finally:
        os.utime(paths[0], ns=(state.st_atime_ns, state.st_mtime_ns))
    assert tried == ["default", "default"]


def test_a_damaged_file_starts_the_trials_again(start, tried, tmp_path, caplog):
    state = tmp_path / "trials.json"
    state.write_text('{"key": ')
    assert len(start(state=state, candidates=THREE[:1])) == len(tried) == 1
    assert "cannot be read" in caplog.text
    assert len(json.loads(state.read_text())["trials"]) == 1


@pytest.mark.usefixtures("tried")
def test_a_candidate_that_fails_is_left_out(start, caplog):
    broken = Candidate("broken", "Padim", {"error": "no scores"}, SIZE, "resnet18")
    assert names_of(start(candidates=[THREE[0], broken])) == ["default"]
    assert "broken is left out" in caplog.text
    with pytest.raises(RuntimeError, match="no candidate could be fitted: broken: no scores"):
        start(candidates=[broken])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"minutes": 0}, "minutes must be above 0, not 0"),
        ({"candidates": []}, "candidates must be at least one, with different names"),
        ({"candidates": [THREE[0], THREE[0]]}, "with different names, not .'default', 'default'."),
        ({"engine": "cloud"}, "engine must be 'processes' or 'ray'"),
    ],
)
def test_a_wrong_argument_is_refused(start, changed, message):
    with pytest.raises(ValueError, match=message):
        start(**changed)


def test_few_images_are_refused(start, paths):
    with pytest.raises(ValueError, match="needs at least 8 good images, got 3; add images"):
        start(paths[:3])


@pytest.mark.parametrize(("size", "areas"), [((16, 16), {0.016, 0.064}), ((200, 12), {0.004, 0.016, 0.064})])
def test_of_small_images_the_areas_that_they_cannot_have_are_left_out(start, noise, caplog, size, areas):
    (trial,) = start(noise(size), candidates=SMALL[:1])
    assert {each.area for each in trial.detection} == areas
    assert [*trial.auroc] == [*KINDS]
    assert "too small for defects of 0.1 %" in caplog.text


def test_on_images_without_room_for_defects_the_default_is_tried_alone(start, noise, caplog):
    with caplog.at_level(logging.INFO):
        (trial,) = start(noise((7, 7)), candidates=SMALL)
    assert (trial.candidate.name, trial.auroc, trial.detection) == ("PaDiM", {}, ())
    assert math.isnan(trial.mean)
    assert "No synthetic defects tell models apart: 1 of 2 candidates were tried" in caplog.text
    # Of an earlier call, too.
    assert len(start(noise((7, 7)), candidates=SMALL)) == 1


def test_known_features_of_good_images_are_not_extracted_again(start, paths, backbone, tmp_path, monkeypatch):
    monkeypatch.setattr(trial_features, "SYNTHETIC", 84)
    candidates = [each.on(backbone) for each in SMALL[:1]]
    (expected,) = start(candidates=candidates)
    read = []
    files = choosing.files_for(candidates)
    files.remember(paths, tmp_path / "features", 0)
    monkeypatch.setattr(files, "read", lambda path: read.append(path) or read_reduced(path))
    (trial,) = start(candidates=candidates, known=files, state=tmp_path / "other.json")
    assert len(read) == 1, "one image for the time of the backbone"
    assert trial.auroc == pytest.approx(expected.auroc)


@pytest.fixture
def cluster(monkeypatch):
    """Stands for Ray: runs jobs in this process; those whose number is in ``late`` never end."""
    submitted = []

    class Cluster:
        def __init__(self, threads, accelerator, work):
            assert threads == 1
            assert accelerator == "cpu"
            self.work, self.end = work, threading.Event()

        def run(self, job):
            submitted.append(job[0].name)
            if submitted.count(job[0].name) <= cluster.late.get(job[0].name, 0):
                self.end.wait(60)
            return self.work(job)

        def give_up(self):
            self.end.set()

    monkeypatch.setattr(choosing, "_Cluster", Cluster)
    cluster = SimpleNamespace(submitted=submitted, late={})
    return cluster


def test_candidates_of_the_same_input_are_tried_at_once_on_a_cluster(start, tried, cluster, caplog):
    broken = Candidate("broken", "Padim", {"error": "no scores"}, SIZE, "resnet18")
    other = Candidate("C", "Padim", {"mean": 90.0}, SIZE, "resnet34")
    trials = start(candidates=[*THREE, broken, other], engine="ray")
    assert names_of(trials)[:2] == ["default", "C"]
    assert {*names_of(trials)} == {"default", "A", "B", "C"}
    assert {*cluster.submitted[:4]} == {"default", "A", "B", "broken"}
    assert "broken is left out, as its trial failed: no scores" in caplog.text
    assert len(tried) == 4


@pytest.mark.usefixtures("tried")
def test_trials_on_a_cluster_that_exceed_the_time_are_given_up_but_for_the_default(start, cluster, caplog):
    cluster.late = {"default": 1, "B": 1}
    with caplog.at_level(logging.INFO):
        trials = start(engine="ray", minutes=0.02)
    assert trials[0].candidate.name == "default"
    assert "B" not in names_of(trials)
    assert cluster.submitted.count("default") == 2
    assert "The time is used: " in caplog.text


def test_a_trial_that_the_cluster_cannot_end_has_failed(monkeypatch):
    class RayError(Exception):
        pass

    def lost(self, job):
        raise self.errors(job)

    monkeypatch.setattr(RayEngine, "run", lost)
    cluster = choosing._Cluster.__new__(choosing._Cluster)
    cluster.errors = RayError
    assert cluster.run("no memory") == "no memory"
