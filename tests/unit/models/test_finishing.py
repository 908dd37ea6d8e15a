"""Trainings that end in all the ways that a trainer knows leave a finished model in the last checkpoint."""

import logging
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from anomalib.callbacks.checkpoint import ModelCheckpoint
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, Timer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from anomalib_ot import FewShot, Foct, Pradot, WtFlow

SHARED = {
    "backbone": "test_resnet",
    "layers": ["layer3"],
    "pre_trained": False,
    "image_size": (64, 64),
    "visualizer": False,
}
# Three batches an epoch, and more epochs than any of the tests lets pass.
MODELS = {
    "Pradot": (
        Pradot,
        {"prototypes_per_cell": 4, "whitened_channels": 16, "epochs": 50, "patience": 50, "compress_tolerance": 0.5},
    ),
    "WtFlow": (WtFlow, {"width": 16, "whitened_channels": 16, "training_steps": 150}),
}
FULL = 2 * 4 * 4 * 4


def make(name="Pradot", **arguments):
    torch.manual_seed(0)
    kind, settings = MODELS[name]
    # The folds have tests of their own.
    return kind(**{**SHARED, "batch_size": 4, "calibration_folds": 0, **settings, **arguments})


def ending(name, end):
    """A model for one of ``ENDS``; of steps, the flow's own number counts."""
    model, steps = make(name), ENDS[end](name).get("max_steps")
    if name == "WtFlow" and steps:
        model.flow.settings = replace(model.flow.settings, training_steps=steps)
    return model


class At(Callback):
    """Does something in a hook, once so many steps are done."""

    def __init__(self, hook, step, action):
        def run(trainer, *_):
            if trainer.global_step >= step:
                action(trainer)

        setattr(self, hook, run)


def stop(trainer):
    trainer.should_stop = True


def terminate(trainer):
    # As its handler of SIGTERM does. Where another library has a handler of its own, the signal would end the process.
    trainer._signal_connector.received_sigterm = True


def fail(_):
    msg = "out of memory"
    raise MemoryError(msg)


def stops_at_once(monitor):
    return EarlyStopping(monitor, stopping_threshold=1e9, check_on_train_epoch_end=True)


LOSS = {"Pradot": "train_transport_cost", "WtFlow": "train_loss"}
# Arguments of the engine, of which some are made for each model.
ENDS = {
    "steps in the midst of an epoch": lambda _: {"max_steps": 4},
    "steps at an epoch's end": lambda _: {"max_steps": 6},
    "time": lambda _: {"callbacks": [Timer(timedelta(seconds=0.2))]},
    "time at an epoch's end": lambda _: {"callbacks": [Timer(timedelta(milliseconds=1), interval="epoch")]},
    "before a batch": lambda _: {"callbacks": [At("on_train_batch_start", 4, stop)]},
    "after a batch": lambda _: {"callbacks": [At("on_train_batch_end", 4, stop)]},
    "before an epoch": lambda _: {"callbacks": [At("on_train_epoch_start", 3, stop)]},
    "after an epoch": lambda _: {"callbacks": [At("on_train_epoch_end", 6, stop)]},
    "a metric": lambda name: {"callbacks": [stops_at_once(LOSS[name])]},
    "few batches": lambda name: {"limit_train_batches": 2, "callbacks": [stops_at_once(LOSS[name])]},
    "steps, saved each": lambda _: {"max_steps": 5, "callbacks": [ModelCheckpoint(every_n_train_steps=1)]},
    "a metric, saved twice": lambda name: {
        "callbacks": [stops_at_once(LOSS[name]), ModelCheckpoint(monitor=LOSS[name], save_top_k=2, save_last=True)]
    },
    "after a validation": lambda _: {"check_val_every_n_epoch": 2, "callbacks": [At("on_validation_end", 6, stop)]},
    "steps without a validation till then": lambda _: {"max_steps": 4, "check_val_every_n_epoch": 7},
    "termination in the midst of an epoch": lambda _: {"callbacks": [At("on_train_batch_start", 4, terminate)]},
    "termination in an epoch's last batch": lambda _: {"callbacks": [At("on_train_batch_start", 5, terminate)]},
}


def fit(runner, model, module, **arguments):
    """Fit, with the termination that the trainer passes on."""
    try:
        runner.fit(model, datamodule=module, **arguments)
    except SIGTERMException:
        return True
    return False


def assert_finished(model):
    assert model.is_finished
    assert model.post_processor.image_threshold.isfinite()
    assert model.post_processor.pixel_threshold.isfinite()
    if isinstance(model, Pradot):
        assert model.model.count < FULL
        assert not torch.equal(model.model.weights, torch.full((1, 2), 0.5))


@pytest.mark.in_turn
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("end", ENDS)
def test_however_training_ends_the_last_checkpoint_is_a_finished_model(data, engine, checkpoint, caplog, name, end):
    arguments = ENDS[end](name)
    model, runner = ending(name, end), engine(**arguments)
    assert fit(runner, model, data()) is end.startswith("termination")
    assert 0 < runner.trainer.global_step < 150
    assert_finished(model)
    for callback in runner.trainer.checkpoint_callbacks:
        for path in {callback.best_model_path, callback.last_model_path} - {""}:
            assert_finished(type(model).load_from_checkpoint(path))
    assert runner.trainer.check_val_every_n_epoch == arguments.get("check_val_every_n_epoch", 1)
    with caplog.at_level(logging.WARNING):
        engine().test(make(name), datamodule=data(), ckpt_path=checkpoint(runner))
    assert "was interrupted" not in caplog.text


class Bomb:
    """What a pickle file may do to the process that loads it."""

    def __init__(self, path):
        self._path = path

    def __reduce__(self):
        return Path.touch, (self._path,)


def test_a_file_that_a_foreign_checkpoint_names_is_not_loaded(data, engine, tmp_path):
    exploded, foreign = tmp_path / "exploded", tmp_path / "foreign.ckpt"
    torch.save({"global_step": 3, "finishing": {"is_finished": False}, "it": Bomb(exploded)}, foreign)

    def restore(trainer):
        trainer.checkpoint_callback.last_model_path = str(foreign)

    callbacks = [stops_at_once(LOSS["Pradot"]), At("on_train_start", 0, restore)]
    engine(callbacks=callbacks).fit(make(), datamodule=data())
    assert not exploded.exists()


@pytest.mark.parametrize("name", MODELS)
def test_an_unfinished_model_is_warned_of_once(data, engine, checkpoint, caplog, root, name):
    runner = engine(callbacks=[At("on_train_epoch_start", 6, fail)])
    with pytest.raises(MemoryError):
        runner.fit(make(name), datamodule=data())
    broken = make(name)
    with caplog.at_level(logging.WARNING):
        engine().test(broken, datamodule=data(), ckpt_path=checkpoint(runner))
        engine().predict(broken, data_path=root / "bad")
    assert caplog.text.count(f"training of this {name} was interrupted") == 1
    caplog.clear()
    resumed = engine(callbacks=[At("on_train_epoch_end", 9, stop)])
    with caplog.at_level(logging.WARNING):
        resumed.fit(broken, datamodule=data(), ckpt_path=checkpoint(runner))
        resumed.test(broken, datamodule=data())
    assert "was interrupted" not in caplog.text
    assert_finished(broken)


def learned(model):
    return {name: value for name, value in model.model.state_dict().items() if "feature_extractor" not in name}


@pytest.mark.in_turn
@pytest.mark.parametrize(
    "end", ["a metric", "after an epoch", "time at an epoch's end", "termination in the midst of an epoch"]
)
@pytest.mark.parametrize("name", MODELS)
def test_training_goes_on_from_a_finished_model_as_if_it_had_not_ended(data, engine, checkpoint, name, end):
    last = {"callbacks": [At("on_train_epoch_end", 12, stop)]}
    whole, ended, resumed = make(name), ending(name, end), make(name)
    engine(**last).fit(whole, datamodule=data())
    runner = engine(**ENDS[end](name))
    fit(runner, ended, data())
    engine(**last).fit(resumed, datamodule=data(), ckpt_path=checkpoint(runner))
    assert learned(resumed).keys() == learned(whole).keys()
    for key, value in learned(whole).items():
        # Sums are rounded by where a tensor lies in memory.
        torch.testing.assert_close(learned(resumed)[key], value, atol=1e-4, rtol=1e-4, msg=key)


LIMITS = ["steps in the midst of an epoch", "steps at an epoch's end", "time"]


@pytest.mark.in_turn
@pytest.mark.parametrize("end", LIMITS)
@pytest.mark.parametrize("name", MODELS)
def test_resuming_what_its_limit_has_ended_changes_nothing(data, engine, checkpoint, caplog, name, end):
    runner = engine(**ENDS[end](name))
    runner.fit(ending(name, end), datamodule=data())
    expected = learned(MODELS[name][0].load_from_checkpoint(checkpoint(runner)))
    resumed, again = ending(name, end), engine(**ENDS[end](name))
    with caplog.at_level(logging.WARNING):
        again.fit(resumed, datamodule=data(), ckpt_path=checkpoint(runner))
        again.test(resumed, datamodule=data())
    assert "was interrupted" not in caplog.text
    assert again.trainer.global_step == runner.trainer.global_step
    assert_finished(resumed)
    for key, value in expected.items():
        assert torch.equal(learned(resumed)[key], value), key
    assert list(resumed.training_features.trained_on) == []


@pytest.mark.in_turn
@pytest.mark.parametrize("end", [*LIMITS, "before a batch"])
@pytest.mark.parametrize("name", MODELS)
def test_training_goes_on_where_its_limit_ended_it(data, engine, checkpoint, name, end):
    runner = engine(**ENDS[end](name))
    runner.fit(ending(name, end), datamodule=data())
    counts, resumed = [], make(name)
    seen = At("on_train_batch_start", 0, lambda _: counts.append(getattr(resumed.model, "count", None)))
    step = runner.trainer.global_step + 5
    again = engine(callbacks=[seen, At("on_train_batch_end", step, stop)])
    again.fit(resumed, datamodule=data(), ckpt_path=checkpoint(runner))
    assert again.trainer.global_step == step
    assert set(counts) == ({FULL} if name == "Pradot" else {None})
    assert_finished(resumed)
    assert_finished(type(resumed).load_from_checkpoint(checkpoint(again)))


def test_a_second_fit_goes_on_with_all_prototypes(data, engine):
    pradot = make(epochs=2)
    engine().fit(pradot, datamodule=data())
    counts = []
    engine(callbacks=[At("on_train_batch_start", 0, lambda _: counts.append(pradot.model.count))]).fit(
        pradot, datamodule=data()
    )
    assert set(counts) == {FULL}
    assert pradot.model.count < FULL


def validations(runner, model, module):
    """Epochs in which a fit validates."""
    epochs = []
    model.on_validation_start = lambda: epochs.append(runner.trainer.current_epoch)
    runner.fit(model, datamodule=module)
    return epochs


@pytest.mark.parametrize(
    ("arguments", "epochs"),
    [
        ({}, [4]),
        ({"check_val_every_n_epoch": 2}, [1, 3, 4]),
        ({"check_val_every_n_epoch": 5}, [4]),
        ({"check_val_every_n_epoch": 7}, [4]),
        ({"val_check_interval": 2, "check_val_every_n_epoch": 3}, [2, 4]),
        ({"val_check_interval": 7, "check_val_every_n_epoch": None}, [2, 4, 4]),
        ({"val_check_interval": timedelta(hours=1)}, [4]),
        ({"limit_val_batches": 0}, []),
        ({"fast_dev_run": 2}, [0]),
    ],
)
def test_validates_when_the_user_says_and_once_at_the_end(data, engine, arguments, epochs):
    runner, pradot = engine(**arguments), make(epochs=5)
    assert validations(runner, pradot, data()) == epochs
    assert pradot.is_finished
    expected = {"check_val_every_n_epoch": 1, **arguments}["check_val_every_n_epoch"]
    assert runner.trainer.check_val_every_n_epoch == expected


def test_the_support_set_is_validated_whatever_the_schedule(data, engine):
    foct = Foct(rotations=1, support_steps=1, **SHARED)
    engine(check_val_every_n_epoch=3).fit(foct, datamodule=FewShot(data(), 2))
    assert foct.post_processor.image_threshold.isfinite()


def test_a_second_fit_takes_its_own_support_set(data, engine):
    foct = Foct(rotations=1, support_steps=1, **SHARED)
    for shots in (2, 3):
        engine().fit(foct, datamodule=FewShot(data(), shots))
        assert len(foct.model.semantic.features) == shots


def test_a_fit_that_failed_lets_the_features_go(data, engine):
    pradot = make()
    with pytest.raises(MemoryError):
        engine(callbacks=[At("on_train_batch_end", 4, fail)]).fit(pradot, datamodule=data())
    assert list(pradot.training_features.trained_on) == []
    assert not pradot.model.workspace._buffers
