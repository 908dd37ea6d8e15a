"""Trainings that stop when a measured value no longer falls, and what checkpoints keep of it."""

from types import SimpleNamespace

import pytest
from torch import nn

from anomalib_ot import Duo, Pradot, WtFlow
from anomalib_ot.host.early_stopping import StopsEarly
from anomalib_ot.host.feature_cache import TrainingFeatures

SHARED = {"backbone": "test_resnet", "layers": ["layer3"], "pre_trained": False, "image_size": (64, 64)}
# As all versions wrote them: the entry of the checkpoint, and its keys.
KEYS = {
    Pradot: ("pradot", "lowest_cost", "epochs_since", "best_prototypes"),
    WtFlow: ("wt_flow", "lowest_loss", "looks_since", "best_weights"),
    Duo: ("wt_flow", "lowest_loss", "looks_since", "best_weights"),
}


class Learner(StopsEarly):
    settings = SimpleNamespace(patience=2)

    def __init__(self, held_out):
        self.training_features = TrainingFeatures((), held_out)
        self.part = nn.Linear(1, 1, bias=False)

    def finished_part(self):
        return self.part

    def measure(self, value, fall=0.0):
        """The weight is the value."""
        nn.init.constant_(self.part.weight, value)
        return self.stopped_falling(value, fall)


def test_stops_after_as_many_measurements_as_patience_and_restores_the_lowest():
    learner = Learner(held_out=())
    assert [learner.measure(value) for value in (5, 3, 4, 2, 2, 3)] == [False, False, False, False, False, True]
    assert learner.has_converged
    learner.restore_best()
    assert learner.part.weight.item() == 2


def test_a_fall_that_is_too_small_counts_as_none():
    learner = Learner(held_out=())
    assert [learner.measure(value, 0.1) for value in (1.0, 0.95, 0.91)] == [False, False, True]


def test_no_state_is_kept_if_no_images_are_held_out():
    learner = Learner(held_out=None)
    for value in (1, 2):
        learner.measure(value)
    learner.restore_best()
    assert learner.part.weight.item() == 2


@pytest.mark.parametrize("kind", KEYS)
def test_checkpoints_of_all_versions_have_the_same_keys(kind):
    entry, *keys = KEYS[kind]
    model, loaded = (kind(**SHARED) for _ in range(2))
    content = {"state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams)}
    model.on_save_checkpoint(content)
    assert [*content[entry]] == keys
    best = {name: value + 1 for name, value in model.finished_part().state_dict().items()}
    content[entry] = dict(zip(keys, (0.25, model.settings.patience, best), strict=True))
    loaded.on_load_checkpoint(content)
    assert loaded.has_converged
    again = {"hyper_parameters": {}}
    loaded.on_save_checkpoint(again)
    assert again[entry] == content[entry]
