"""The finished trials in their file."""

import os

import pytest

from anomalib_ot.selection import Candidate, Trial
from anomalib_ot.selection.record import TrialRecord, trial_key


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "network" / "model.safetensors"
    path.parent.mkdir()
    path.write_text("weights")
    return path


def trial_on(backbone):
    candidate = Candidate("A", "WtFlow", {}, (64, 64), backbone)
    return Trial(candidate, {"blur": 70.0}, 70.0, 1.0, 1.0, 0.05, ())


def test_trials_on_changed_weights_are_forgotten_and_those_on_others_stay(tmp_path, paths, weights):
    trials = [trial_on(f"local-dir:{weights.parent}"), trial_on("resnet18")]

    def record():
        return TrialRecord(tmp_path / "trials.json", trial_key(paths, 0), [each.candidate for each in trials])

    for trial in trials:
        record().add(trial)
    assert record().trials == trials
    os.utime(weights, ns=(0, 10**9))
    assert record().trials == trials[1:]
    assert record().waiting() == [trials[0].candidate]
    weights.unlink()
    weights.parent.rmdir()
    assert record().trials == trials[1:]
