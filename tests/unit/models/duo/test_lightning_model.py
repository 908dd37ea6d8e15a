"""Duo through anomalib's Engine, on small random images and a small random backbone."""

import logging

import pytest
import torch
from anomalib.post_processing import PostProcessor
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import SIGTERMException

from anomalib_ot import Duo
from anomalib_ot.data import GoodPictures
from anomalib_ot.models.pradot import PradotModel

EQUAL = torch.full((2,), 0.5)


def make(**arguments):
    torch.manual_seed(0)
    settings = {
        "backbone": "test_resnet",
        "layers": ["layer2", "layer3"],
        "pre_trained": False,
        "image_size": (64, 64),
        "batch_size": 4,
        "pradot": {"prototypes_per_cell": 2, "whitened_channels": 16, "epochs": 2},
        "wt_flow": {"width": 16, "whitened_channels": 16, "training_steps": 7},
        "calibration_folds": 2,
        "visualizer": False,
    }
    return Duo(**{**settings, **arguments})


def learned(model):
    return {name: value for name, value in model.model.state_dict().items() if "feature_extractor" not in name}


class AtStep(Callback):
    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self.step:
            self.action(trainer)


def fail(*_):
    msg = "out of memory"
    raise MemoryError(msg)


def terminate(trainer):
    # As its handler of SIGTERM does. Where another library has a handler of its own, the signal would end the process.
    trainer._signal_connector.received_sigterm = True


def test_finds_a_defect(data, engine):
    metrics = engine().train(make(), datamodule=data())[0]
    assert metrics["image_AUROC"] == 1
    assert metrics["pixel_AUROC"] > 0.9


def test_the_scores_of_left_out_images_weigh_the_parts(data, engine, monkeypatch):
    weighed = []
    monkeypatch.setattr(Duo, "_weigh", lambda _, scores: weighed.extend(scores))
    engine().fit(make(), datamodule=data())
    # Two folds of ten images; each gives two maps of Pradot, whose flow has one.
    assert sum(len(flow[0]) for _, flow in weighed) == 10
    assert {(len(prototypes), len(flow)) for prototypes, flow in weighed} == {(2, 1)}


@pytest.mark.parametrize(
    "given",
    [
        {"feature_cache": "none"},
        {"calibration_folds": 0},
        {"calibration_folds": 6},
        {"post_processor": PostProcessor()},
    ],
    ids=str,
)
def test_the_parts_are_weighed_where_folds_set_no_threshold(data, engine, given):
    model = make(**given)
    engine().fit(model, datamodule=data())
    assert model.calibration_scores is None
    assert model.model.weights.isfinite().all()
    assert not torch.equal(model.model.weights, EQUAL)


@pytest.mark.parametrize("count", [1, 2])
def test_one_or_two_images_weigh_the_parts(root, tmp_path, engine, count):
    (tmp_path / "good").mkdir()
    for path in sorted((root / "good").iterdir())[:count]:
        (tmp_path / "good" / path.name).write_bytes(path.read_bytes())
    model = make(batch_size=None)
    engine().fit(model, datamodule=GoodPictures(tmp_path, "good", held_out=0, num_workers=0))
    assert model.model.weights.isfinite().all()
    assert not torch.equal(model.model.weights, EQUAL)


def test_the_prototypes_see_the_images_in_the_same_random_order_with_and_without_a_cache(data, engine, monkeypatch):
    update, seen = PradotModel.update, []

    def watched(self, features):
        seen[-1] += features["layer2"].mean((1, 2, 3)).tolist()
        return update(self, features)

    monkeypatch.setattr(PradotModel, "update", watched)
    for cache in ("cpu", "none"):
        seen.append([])
        engine(limit_val_batches=0).fit(make(feature_cache=cache, extraction="torch"), datamodule=data())
    # Two epochs of ten images; later ones are those of folds, which weigh the parts.
    cached, uncached = (each[:20] for each in seen)
    assert uncached == pytest.approx(cached, rel=1e-5)
    first, second = cached[:10], cached[10:]
    assert first != second
    assert sorted(first) == pytest.approx(sorted(second), rel=1e-5)


def test_folds_that_fail_leave_equal_weights_and_say_so(data, engine, monkeypatch, caplog):
    monkeypatch.setattr(Duo, "fit_fold", fail)
    model = make()
    engine().fit(model, datamodule=data())
    assert "The parts have equal weights, as folds failed: MemoryError('out of memory')" in caplog.text
    assert torch.equal(model.model.weights, EQUAL)


def test_scores_of_folds_that_are_no_numbers_leave_equal_weights(data, engine, monkeypatch, caplog):
    fit_fold = Duo.fit_fold

    def fit_badly(self, features):
        fold = fit_fold(self, features)
        fold.pradot.weights = torch.full_like(fold.pradot.weights, torch.nan)
        return fold

    monkeypatch.setattr(Duo, "fit_fold", fit_badly)
    model = make()
    engine().fit(model, datamodule=data())
    assert "The parts have equal weights, as folds failed" in caplog.text
    assert torch.equal(model.model.weights, EQUAL)


def test_a_training_that_is_resumed_is_the_one_that_was_not_interrupted(data, engine, checkpoint):
    whole, broken, resumed = make(), make(), make()
    engine().fit(whole, datamodule=data())
    runner = engine(callbacks=[AtStep(6, fail)])
    with pytest.raises(MemoryError):
        runner.fit(broken, datamodule=data())
    engine().fit(resumed, datamodule=data(), ckpt_path=checkpoint(runner))
    for name, value in learned(whole).items():
        torch.testing.assert_close(learned(resumed)[name], value, atol=1e-4, rtol=1e-4, msg=name)


def test_a_terminated_training_fits_no_folds_and_can_be_resumed(data, engine, checkpoint, monkeypatch):
    runner = engine(callbacks=[AtStep(4, terminate)])
    with monkeypatch.context() as patch:
        patch.setattr(Duo, "fit_fold", lambda *_: pytest.fail("a fold was fitted"))
        with pytest.raises(SIGTERMException):
            runner.fit(make(), datamodule=data())
    resumed = make()
    engine().fit(resumed, datamodule=data(), ckpt_path=checkpoint(runner))
    assert not torch.equal(resumed.model.weights, EQUAL)


def test_a_resumed_training_takes_the_given_steps_and_the_recorded_scoring(data, engine, checkpoint):
    runner = engine(callbacks=[AtStep(4, fail)])
    with pytest.raises(MemoryError):
        runner.fit(make(), datamodule=data())
    rates = []

    class Rates(Callback):
        def on_train_batch_start(self, trainer, *_):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    resumed = make(wt_flow={"training_steps": 12, "width": 32, "whitened_channels": 16}, pradot=None)
    engine(callbacks=[Rates()]).fit(resumed, datamodule=data(), ckpt_path=checkpoint(runner))
    assert len(rates) >= 12 - 4
    assert min(rates) > 0
    flow, pradot = resumed.model.wt_flow.settings, resumed.model.pradot.settings
    assert (flow.training_steps, flow.width, pradot.whitened_channels) == (12, 16, 16)


def test_an_interrupted_fit_leaves_no_half_of_the_prototypes(data, engine, monkeypatch):
    model = make()
    with monkeypatch.context() as patch:
        patch.setattr(PradotModel, "finish", fail)
        with pytest.raises(MemoryError):
            engine().fit(model, datamodule=data())
    assert not model.model.pradot.is_initialised
    engine().fit(model, datamodule=data())
    assert model.model.pradot.is_initialised


def test_held_out_images_stop_the_flow(data, engine, caplog, monkeypatch):
    losses = iter([1.0, 2.0, 3.0])
    model = make(validation_fraction=0.3, patience=1, wt_flow={"width": 16, "training_steps": 200})
    monkeypatch.setattr(model, "_held_out_loss", lambda _: next(losses))
    runner = engine()
    with caplog.at_level(logging.INFO, "anomalib_ot"):
        runner.fit(model, datamodule=data())
    assert runner.trainer.global_step == 50
    assert "stopped falling after 50 steps" in caplog.text
