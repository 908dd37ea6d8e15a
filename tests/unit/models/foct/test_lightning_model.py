"""Foct through anomalib's Engine, on small random images and a small random backbone."""

import logging

import pytest
import torch
from anomalib.data import PredictDataset

from anomalib_ot import FewShot, Foct
from anomalib_ot.host.calibration import HELD_OUT, SUPPORT

SMALL = {
    "backbone": "test_resnet",
    "layers": ["layer2", "layer3"],
    "pre_trained": False,
    "image_size": (64, 64),
    "rotations": 2,
    "support_steps": 3,
}


@pytest.fixture
def model():
    def make(**arguments):
        torch.manual_seed(0)
        return Foct(**{**SMALL, "visualizer": False, **arguments})

    return make


@pytest.fixture
def few(data):
    return lambda shots=2: FewShot(data(), shots)


def remembered(model):
    return model.model.episodic.features


def test_trains_and_scores_with_the_hosts_thresholds_and_metrics(few, engine, model):
    foct = model()
    metrics = engine().train(foct, datamodule=few())[0]
    assert {"image_AUROC", "image_F1Score", "pixel_AUROC", "pixel_F1Score"} <= set(metrics)
    assert metrics["image_AUROC"] == 1
    assert metrics["pixel_AUROC"] > 0.8
    assert foct.post_processor.image_threshold.isfinite()


def test_support_set_is_the_training_images(few, engine, model):
    foct = model()
    engine().fit(foct, datamodule=few(3))
    assert foct.model.semantic.features.shape[:2] == (3, 2)


def test_validation_leaves_no_trace(few, engine, model):
    foct = model(online=True, query_steps=1)
    engine().fit(foct, datamodule=few())
    assert not remembered(foct).numel()
    state = {name: value.clone() for name, value in foct.model.navigator.state_dict().items()}
    assert all(torch.equal(value, state[name]) for name, value in foct.model.support_navigator.state_dict().items())


def test_memory_starts_afresh_unless_it_is_kept(few, engine, model):
    scores = {}
    for keep in (False, True):
        foct, runner = model(keep_memory=keep, online=True, query_steps=1), engine()
        runner.fit(foct, datamodule=few())
        runs = []
        for _ in range(2):
            predictions = runner.predict(foct, datamodule=few(), return_predictions=True)
            runs.append(torch.cat([batch.pred_score for batch in predictions]))
        scores[keep] = runs
        assert len(remembered(foct))
    assert torch.equal(*scores[False])
    assert not torch.equal(*scores[True])


def test_checkpoint_keeps_the_memory(few, engine, model, tmp_path):
    foct, runner = model(keep_memory=True, online=True, query_steps=1), engine()
    runner.fit(foct, datamodule=few())
    runner.test(foct, datamodule=few(), verbose=False)
    runner.trainer.save_checkpoint(tmp_path / "taught.ckpt")
    loaded = Foct.load_from_checkpoint(tmp_path / "taught.ckpt", visualizer=False)
    assert len(remembered(loaded))
    assert torch.equal(remembered(loaded), remembered(foct))
    # Into a model that has a memory of its own.
    engine().predict(foct, datamodule=few(), ckpt_path=tmp_path / "taught.ckpt")


def test_checkpoint_round_trip_gives_the_same_scores(few, engine, model, checkpoint):
    foct, runner = model(), engine()
    runner.fit(foct, datamodule=few())
    first = runner.predict(foct, datamodule=few())
    second = engine().predict(model(), datamodule=few(), ckpt_path=checkpoint(runner))
    for ours, theirs in zip(first, second, strict=True):
        assert torch.equal(ours.pred_score, theirs.pred_score)


def test_same_seed_gives_the_same_scores(few, engine, model):
    runs = []
    for noise in (1, 2):
        foct, runner = model(), engine()
        torch.manual_seed(noise)
        runner.fit(foct, datamodule=few())
        runs.append(torch.cat([batch.pred_score for batch in runner.predict(foct, datamodule=few())]))
    torch.testing.assert_close(*runs)


def test_predicts_a_folder(root, few, engine, model):
    foct, runner = model(), engine()
    runner.fit(foct, datamodule=few())
    predictions = runner.predict(foct, dataset=PredictDataset(root / "bad", image_size=(64, 64)))
    assert sum(len(batch.pred_score) for batch in predictions) == 4


def test_foreground_sees_the_pixels_before_normalisation(few, engine, model, monkeypatch):
    seen = []
    foct = model()
    find = foct.foreground.masks
    monkeypatch.setattr(
        foct.foreground, "masks", lambda images, features: seen.append(images) or find(images, features)
    )
    engine().fit(foct, datamodule=few())
    (images,) = seen
    # Grey squares between 90 and 110.
    assert 80 / 255 < float(images.min()) < float(images.max()) < 120 / 255


def test_many_support_images_are_warned_of(data, engine, model, caplog, monkeypatch):
    monkeypatch.setattr("anomalib_ot.models.foct.lightning_model._MANY", 5)
    with caplog.at_level(logging.WARNING):
        engine(limit_val_batches=0).fit(model(), datamodule=data())
    assert "each of 10 support images" in caplog.text


def test_validating_without_a_support_set_says_what_to_do(few, engine, model):
    with pytest.raises(RuntimeError, match="no support set yet: fit it, or load"):
        engine().validate(model(), datamodule=few())


def test_weights_that_are_not_finite_are_refused(few, engine, model):
    foct = model()
    torch.nn.init.constant_(next(foct.model.feature_extractor.parameters()), torch.nan)
    with pytest.raises(ValueError, match="NaN or infinite values for"):
        engine().fit(foct, datamodule=few())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": ["layer3", "layer4"]}, "model.*layer4"),
        ({"backbone": "resnet34"}, "model.*conv1"),
        ({"position_weight": 0.0}, "navigator"),
    ],
)
def test_settings_in_python_that_do_not_fit_the_checkpoint_are_refused(
    few, engine, model, checkpoint, arguments, message
):
    runner = engine()
    runner.fit(model(), datamodule=few())
    with pytest.raises(ValueError, match=rf"of another architecture: .*{message}"):
        Foct.load_from_checkpoint(checkpoint(runner), **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"foreground": "otsu"}, "foreground must be"),
        ({"capacity": 10}, "capacity must be at least"),
        ({"rotations": 0}, "rotations must be at least 1"),
    ],
)
def test_bad_settings(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model(**arguments)


def test_exported_torch_model_is_not_taught(few, engine, model, tmp_path):
    foct = model(online=True, query_steps=1)
    engine().fit(foct, datamodule=few())
    path = foct.to_torch(tmp_path)
    exported = torch.load(path, weights_only=False)["model"].eval()
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    together = exported(images)
    single = exported(images[2:])
    assert not together.anomaly_map.requires_grad
    torch.testing.assert_close(together.anomaly_map[2:], single.anomaly_map, atol=1e-4, rtol=1e-4)
    assert not remembered(exported).numel()
    assert not foct.model.is_frozen


def test_missing_sam_checkpoint_is_noticed_before_any_image_is_looked_at(few, engine, model, tmp_path):
    foct = model(foreground="sam", sam_checkpoint=tmp_path / "missing.pth")
    with pytest.raises(FileNotFoundError, match="download one"):
        engine().fit(foct, datamodule=few())
    assert not foct._support


def test_a_stream_of_bad_parts_is_taken_back_in_one_call(few, engine, model):
    foct, runner = model(keep_memory=True, online=True, query_steps=1), engine()
    runner.fit(foct, datamodule=few())
    runner.predict(foct, datamodule=few())
    taught = remembered(foct).clone()
    predictions = runner.predict(foct, datamodule=few())
    # Validation leaves what can be taken back as it was.
    runner.validate(foct, datamodule=few(), verbose=False)
    foct.rollback(sum(len(batch.pred_score) for batch in predictions))
    assert torch.equal(remembered(foct), taught)
    with pytest.raises(ValueError, match="queries must be"):
        foct.rollback(1000)


def test_a_validation_that_is_broken_off_leaves_what_was_taught_before(few, engine, model, monkeypatch):
    foct, runner = model(keep_memory=True, online=True, query_steps=1), engine()
    runner.fit(foct, datamodule=few())
    for _ in range(2):
        runner.predict(foct, datamodule=few())
    taught, count = foct.model.taught(), len(foct.model.earlier)
    with monkeypatch.context() as patch:
        patch.setattr(foct.evaluator, "on_validation_epoch_end", lambda *_: (_ for _ in ()).throw(InterruptedError))
        with pytest.raises(InterruptedError):
            runner.validate(foct, datamodule=few(), verbose=False)
    assert torch.equal(remembered(foct), taught.memory.features[0])
    assert all(torch.equal(value, foct.model.navigator.state_dict()[name]) for name, value in taught.navigator.items())
    assert len(foct.model.earlier) == count
    # The next validation has nothing to do with it.
    runner.validate(foct, datamodule=few(), verbose=False)
    assert torch.equal(remembered(foct), taught.memory.features[0])


def test_a_frozen_model_stays_frozen_after_an_export_that_fails(model):
    foct = model()
    with foct.frozen():
        with pytest.raises(InterruptedError), foct.frozen():
            raise InterruptedError
        assert foct.model.is_frozen
    assert not foct.model.is_frozen


def test_a_loaded_memory_cannot_be_rolled_back_beyond_the_file(few, engine, model, tmp_path):
    foct, runner = model(keep_memory=True, online=True), engine()
    runner.fit(foct, datamodule=few())
    runner.predict(foct, datamodule=few())
    runner.trainer.save_checkpoint(tmp_path / "taught.ckpt")
    runner.predict(foct, datamodule=few(), ckpt_path=tmp_path / "taught.ckpt")
    foct.rollback(8)
    with pytest.raises(ValueError, match="from 1 to 0"):
        foct.rollback(1)


def test_support_images_set_the_threshold_where_fewer_are_held_out(few, data, engine, model):
    with_four_held_out, few_held_out = model(), model()
    engine().fit(with_four_held_out, datamodule=few(3))
    assert with_four_held_out.post_processor.image_calibration.numel() == 4
    assert with_four_held_out.post_processor.calibration_source == HELD_OUT
    engine().fit(few_held_out, datamodule=FewShot(data(), 5))
    processor = few_held_out.post_processor
    assert processor.image_calibration.tolist() == pytest.approx(list(few_held_out.calibration_scores.images))
    assert processor.calibration_source == SUPPORT
    assert processor.image_threshold == processor.image_calibration.max()


def test_one_support_image_has_no_other_to_be_compared_with(few, engine, model):
    foct = model()
    engine().fit(foct, datamodule=few(1))
    assert foct.calibration_scores is None
    assert foct.post_processor.image_calibration.numel() == 4


def test_support_images_that_cannot_be_compared_do_not_cost_the_training(few, engine, model, monkeypatch, caplog):
    def fails(*_):
        raise MemoryError

    foct = model()
    monkeypatch.setattr(foct.model, "score_left_out", fails)
    engine().fit(foct, datamodule=few(3))
    assert "as comparing the support images failed: MemoryError()" in caplog.text
    assert foct.post_processor.calibration_source == HELD_OUT
