"""WtFlow through anomalib's Engine, on small random images and a small random backbone."""

import logging

import pytest
import torch
from lightning.pytorch.utilities.parsing import lightning_setattr

from anomalib_ot import WtFlow
from anomalib_ot.models.wt_flow import flow_training
from anomalib_ot.models.wt_flow.training import average_into, create_optimizer

SMALL = {
    "backbone": "test_resnet",
    "layers": ["layer2", "layer3"],
    "pre_trained": False,
    "image_size": (64, 64),
    "width": 16,
    "whitened_channels": 16,
    "training_steps": 7,
    "batch_size": 4,
    # The folds have tests of their own.
    "calibration_folds": 0,
}


@pytest.fixture
def model():
    def make(**arguments):
        torch.manual_seed(0)
        return WtFlow(**{**SMALL, "visualizer": False, **arguments})

    return make


def weights_of(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.model.velocities().parameters()])


@pytest.mark.parametrize("score", ["density", "log_density", "mismatch"])
def test_trains_and_scores_with_the_hosts_thresholds_and_metrics(data, engine, model, score):
    # A defect far larger than what differs between ten images also moves their mode, which lowers each cell's density.
    flow = model(score=score, global_modes=0 if score == "density" else 32)
    metrics = engine().train(flow, datamodule=data())[0]
    assert {"image_AUROC", "image_F1Score", "pixel_AUROC", "pixel_F1Score"} <= set(metrics)
    # Measured from the highest density of each image, the density does not compare between images.
    assert metrics["image_AUROC"] == 1 or score == "density"
    assert metrics["pixel_AUROC"] > 0.8
    assert flow.post_processor.image_threshold.isfinite()


def test_takes_all_steps_ends_in_the_midst_of_an_epoch_and_validates_once(data, engine, model, monkeypatch, checkpoint):
    calls = []
    flow, runner = model(), engine()
    step = flow.validation_step
    monkeypatch.setattr(flow, "validation_step", lambda batch, *args: calls.append(1) or step(batch, *args))
    runner.fit(flow, datamodule=data())
    # Ten images make three batches of an epoch.
    assert runner.trainer.global_step == 7
    assert len(calls) == 2
    saved = torch.load(checkpoint(runner), weights_only=True)
    assert saved["global_step"] == 7
    assert saved["state_dict"]["post_processor._image_threshold"].isfinite()


def test_the_model_has_the_moving_average_of_the_trained_weights(data, engine, model, monkeypatch):
    flow = model(ema_rate=0.8)
    steps = []

    def spy(averages, trained, *rest):
        steps.append([parameter.detach().clone() for parameter in trained.parameters()])
        average_into(averages, trained, *rest)

    monkeypatch.setattr(flow_training, "average_into", spy)
    engine().fit(flow, datamodule=data())
    expected = steps[0]
    for count, weights in enumerate(steps[1:], start=1):
        rate = min(0.8, (1 + count) / (10 + count))
        expected = [rate * old + (1 - rate) * new for old, new in zip(expected, weights, strict=True)]
    assert len(steps) == 7
    torch.testing.assert_close(weights_of(flow), torch.cat([each.flatten() for each in expected]))
    assert not torch.allclose(weights_of(flow), torch.cat([each.flatten() for each in steps[-1]]))


def test_only_the_velocity_fields_are_trained(data, engine, model):
    flow = model()
    before = {name: value.clone() for name, value in flow.model.feature_extractor.state_dict().items()}
    engine().fit(flow, datamodule=data())
    after = flow.model.feature_extractor.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert not any(parameter.requires_grad for parameter in flow.model.parameters())


def test_training_lowers_the_loss(data, engine, model):
    flow, runner = model(training_steps=80, width=32, learning_rate=1e-2), engine()
    losses = []
    flow.log = lambda name, value, **_: losses.append(value.item()) if name == "train_loss" else None
    runner.fit(flow, datamodule=data())
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


def test_learning_rate_rises_and_falls_to_zero(model):
    flow = model(training_steps=100)
    _, schedule = create_optimizer(flow.trained, flow.settings, 1.0)
    (share,) = schedule.lr_lambdas
    shares = [share(step) for step in range(101)]
    peak = shares.index(max(shares))
    assert peak == 10
    assert shares[:11] == sorted(shares[:11])
    assert shares[10:] == sorted(shares[10:], reverse=True)
    assert shares[100] == pytest.approx(0, abs=1e-9)
    assert share(500) == pytest.approx(0, abs=1e-9)


def test_the_learning_rate_finder_of_lightning_changes_the_rate(model):
    flow = model(learning_rate=0.1)
    lightning_setattr(flow, "learning_rate", 0.5)
    assert flow.configure_optimizers()["optimizer"].defaults["lr"] == 0.5


def test_same_seed_same_weights(data, engine, model, monkeypatch):
    trained = []
    for seed in ("1", "1", "2"):
        monkeypatch.setenv("PL_GLOBAL_SEED", seed)
        flow = model()
        torch.manual_seed(len(trained))
        engine().fit(flow, datamodule=data())
        trained.append(weights_of(flow))
    assert torch.equal(trained[0], trained[1])
    assert not torch.equal(trained[0], trained[2])


def test_training_that_was_broken_off_resumes_as_if_it_had_not_been(data, engine, model, checkpoint):
    class Interrupt(Exception):  # noqa: N818
        pass

    whole, first, second = model(), model(), model()
    engine().fit(whole, datamodule=data())

    def fail_in_the_second_epoch():
        if first.current_epoch == 1:
            raise Interrupt

    first.on_train_epoch_start = fail_in_the_second_epoch
    runner, resumed = engine(), engine()
    with pytest.raises(Interrupt):
        runner.fit(first, datamodule=data())
    assert torch.load(checkpoint(runner), weights_only=True)["global_step"] == 3
    torch.manual_seed(123)
    resumed.fit(second, datamodule=data(), ckpt_path=checkpoint(runner))
    assert resumed.trainer.global_step == 7
    torch.testing.assert_close(weights_of(second), weights_of(whole), atol=1e-6, rtol=1e-5)
    assert not torch.allclose(weights_of(first), weights_of(whole))


def test_stops_when_the_loss_of_held_out_images_falls_no_longer(data, engine, model, monkeypatch, caplog):
    flow, runner = model(training_steps=1000, validation_fraction=0.2, patience=2), engine()
    losses, states = iter([0.4, 0.1, 0.3, 0.2]), []
    monkeypatch.setattr(flow, "_held_out_loss", lambda _: states.append(weights_of(flow).clone()) or next(losses))
    with caplog.at_level(logging.INFO):
        runner.fit(flow, datamodule=data())
    assert runner.trainer.global_step == 100
    assert "The loss of held-out images stopped falling after 100 steps" in caplog.text
    assert torch.equal(weights_of(flow), states[1])
    assert not torch.equal(states[1], states[3])
    assert flow.post_processor.image_threshold.isfinite()


def test_a_training_that_has_ended_does_not_go_on_from_its_checkpoint(data, engine, model, checkpoint, monkeypatch):
    settings = {"training_steps": 1000, "validation_fraction": 0.2, "patience": 1}
    first, second, runner, resumed = model(**settings), model(**settings), engine(), engine()
    losses = iter([0.1, 0.2])
    monkeypatch.setattr(first, "_held_out_loss", lambda _: next(losses))
    runner.fit(first, datamodule=data())
    resumed.fit(second, datamodule=data(), ckpt_path=checkpoint(runner))
    assert resumed.trainer.global_step == runner.trainer.global_step == 50
    assert torch.equal(weights_of(second), weights_of(first))


def test_held_out_images_are_normal_and_not_trained_on(data, engine, model):
    flow, runner = model(training_steps=25, validation_fraction=0.2), engine()
    seen = {}
    fit = flow.model.fit_normalization

    def spy(batches):
        kept = list(batches)
        seen["trained_on"] = sum(len(batch["layer2"]) for batch in kept)
        seen["held_out"] = sum(len(batch.features["layer2"]) for batch in flow.training_features.held_out)
        fit(kept)

    flow.model.fit_normalization = spy
    runner.fit(flow, datamodule=data())
    assert seen == {"trained_on": 8, "held_out": 2}
    assert runner.trainer.callback_metrics["val_loss"].isfinite()


def test_a_loss_that_is_not_finite_stops_with_the_last_good_weights(data, engine, model, caplog):
    flow, runner = model(), engine()
    kept = {}

    def poison(*_):
        if flow.global_step == 4 and not kept:
            kept["weights"] = weights_of(flow).clone()
            next(flow.trained[1].parameters()).data.fill_(torch.nan)

    flow.on_train_batch_start = poison
    with caplog.at_level(logging.ERROR):
        runner.fit(flow, datamodule=data())
    assert "the loss of layer layer3 is not finite at step 4 (epoch 1)" in caplog.text
    assert runner.trainer.global_step == 5
    assert torch.equal(weights_of(flow), kept["weights"])
    assert weights_of(flow).isfinite().all()
    assert flow.post_processor.image_threshold.isfinite()


def test_a_first_loss_that_is_not_finite_is_an_error(data, engine, model):
    flow = model()
    next(flow.trained[0].parameters()).data.fill_(torch.inf)
    with pytest.raises(RuntimeError, match="the loss of layer layer2 is not finite at step 0"):
        engine().fit(flow, datamodule=data())


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_bfloat16(data, engine, model, precision):
    flow = model(training_steps=20)
    metrics = engine(precision=precision).train(flow, datamodule=data())[0]
    assert weights_of(flow).isfinite().all()
    assert metrics["image_AUROC"] == 1


@pytest.mark.parametrize("arguments", [{"feature_cache": "none"}, {"coupling": "optimal", "scope": "maps"}])
def test_other_ways_to_train(data, engine, model, arguments):
    assert engine().train(model(**arguments), datamodule=data())[0]["image_AUROC"] == 1


def test_cached_features_are_let_go_after_training(data, engine, model):
    flow = model()
    engine().fit(flow, datamodule=data())
    assert list(flow.training_features.trained_on) == []


def test_checkpoint_round_trip_gives_the_same_scores(data, engine, model, checkpoint):
    flow, runner = model(), engine()
    runner.fit(flow, datamodule=data())
    loaded = WtFlow.load_from_checkpoint(checkpoint(runner), visualizer=False).eval()
    images = torch.rand(3, 3, 90, 70)
    flow.eval()
    torch.testing.assert_close(loaded(images).anomaly_map, flow(images).anomaly_map)
    assert torch.equal(loaded(images).pred_label, flow(images).pred_label)


@pytest.mark.parametrize("arguments", [{"layers": ["layer2"]}, {"width": 32}, {"depth": 0}, {"normalization": "layer"}])
def test_settings_in_python_that_do_not_fit_the_checkpoint_are_refused(data, engine, model, arguments, checkpoint):
    runner = engine()
    runner.fit(model(), datamodule=data())
    with pytest.raises(ValueError, match="the checkpoint is of another architecture"):
        WtFlow.load_from_checkpoint(checkpoint(runner), **arguments)


def test_a_block_size_that_does_not_divide_is_refused_before_training(data, engine, model):
    with pytest.raises(ValueError, match="block_size 3 does not divide the 4 maps of a batch"):
        engine().fit(model(coupling="worst", scope="maps", block_size=3), datamodule=data())
    # The last batch of an epoch has two images.
    with pytest.raises(ValueError, match="block_size 4 does not divide the 2 maps of a batch"):
        engine().fit(model(coupling="worst", scope="maps", block_size=4), datamodule=data())
    # Eight images are trained on, two are held out.
    with pytest.raises(ValueError, match="block_size 4 does not divide the 2 maps of a batch"):
        engine().fit(model(scope="maps", block_size=4, validation_fraction=0.2), datamodule=data())


def test_maps_smaller_than_the_depth_are_refused(data, engine, model):
    with pytest.raises(ValueError, match="feature maps of 4 x 4 cells cannot be halved 3 times"):
        engine().fit(model(depth=3), datamodule=data())


def test_default_pre_processor_uses_the_papers_size_and_the_backbones_statistics():
    resize, normalize = WtFlow.configure_pre_processor().transform.transforms
    assert resize.size == [256, 256]
    assert normalize.mean == pytest.approx([0.485, 0.456, 0.406])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"training_steps": 0}, "training_steps must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"weight_decay": -1.0}, "weight_decay must be at least 0"),
        ({"ema_rate": 1.0}, r"ema_rate must be in \[0, 1\)"),
        ({"patience": 0}, "patience must be at least 1"),
        ({"coupling": "best"}, "coupling must be 'independent' or 'optimal' or 'worst', not 'best'"),
        ({"euler_steps": 0}, "euler_steps must be at least 1"),
        ({"score": "entropy"}, "score must be 'density'"),
    ],
)
def test_bad_arguments_are_refused_early(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model(**arguments)
