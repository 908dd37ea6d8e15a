"""Pradot through anomalib's Engine, on small random images and a small random backbone."""

import logging
import subprocess
import sys

import pytest
import torch
from anomalib.data import ImageBatch, ImageItem, PredictDataset
from anomalib.engine import Engine
from anomalib.pre_processing import PreProcessor
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchvision.transforms.v2 import Compose, RandomHorizontalFlip, Resize

from anomalib_ot import Pradot

SMALL = {
    "backbone": "test_resnet",
    "layers": ["layer2", "layer3"],
    "pre_trained": False,
    "image_size": (64, 64),
    "prototypes_per_cell": 1,
    "whitened_channels": 16,
    "epochs": 3,
    "batch_size": 4,
    # The folds have tests of their own.
    "calibration_folds": 0,
}


@pytest.fixture
def model():
    def make(**arguments):
        torch.manual_seed(0)
        return Pradot(**{**SMALL, "visualizer": False, **arguments})

    return make


def prototypes_of(model):
    return torch.cat([each.features.flatten() for _, each in model.model.by_layer()])


def test_trains_and_scores_with_the_hosts_thresholds_and_metrics(data, engine, model):
    pradot, runner = model(), engine()
    metrics = runner.train(pradot, datamodule=data())[0]
    assert {"image_AUROC", "image_F1Score", "pixel_AUROC", "pixel_F1Score"} <= set(metrics)
    assert metrics["image_AUROC"] == 1
    assert metrics["pixel_AUROC"] > 0.8
    assert pradot.post_processor.image_threshold.isfinite()
    assert pradot.post_processor.pixel_threshold.isfinite()


def test_backbone_sees_each_training_image_once(data, engine, model):
    pradot = model(epochs=4)
    seen = []
    pradot.model.feature_extractor.register_forward_pre_hook(lambda _, images: seen.append(len(images[0])))
    engine(limit_val_batches=0).fit(pradot, datamodule=data())
    assert sum(seen) == 10


@pytest.mark.parametrize("place", ["cpu", "disk", "device"])
def test_where_the_features_are_kept_does_not_matter(data, engine, model, place, caplog):
    with caplog.at_level(logging.INFO):
        kept, chosen = model(feature_cache=place), model()
        for each in (kept, chosen):
            torch.manual_seed(1)
            engine().fit(each, datamodule=data())
    assert f"place {place}" in caplog.text
    assert torch.equal(prototypes_of(kept), prototypes_of(chosen))


def test_budget_sends_the_cache_to_disk(data, engine, model, caplog):
    with caplog.at_level(logging.INFO):
        engine().fit(model(cache_budget=1e-9), datamodule=data())
    assert "place disk" in caplog.text


def test_without_the_cache_the_same_batches_give_the_same_prototypes(data, engine, model, caplog):
    cached, plain = model(batch_size=10), model(batch_size=10, feature_cache="none")
    with caplog.at_level(logging.INFO):
        for each in (cached, plain):
            torch.manual_seed(1)
            features = each.model.extract(torch.rand(2, 3, 64, 64))
            each.model.fit_whitening([features])
            each.model.initialise(features)
            engine().fit(each, datamodule=data(train_batch_size=10))
    assert "Feature cache off: feature_cache is none" in caplog.text
    # One batch of all images, in another order.
    torch.testing.assert_close(prototypes_of(cached), prototypes_of(plain), atol=1e-3, rtol=1e-3)


def test_augmentation_switches_the_cache_off(data, engine, model, caplog):
    with caplog.at_level(logging.INFO):
        engine().fit(model(), datamodule=data(train_augmentations=RandomHorizontalFlip()))
    assert "Feature cache off: training images are augmented" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO):
        engine().fit(model(), datamodule=data(train_augmentations=Resize((70, 70))))
    assert "Caching the features of 10 images" in caplog.text


def test_a_random_pre_processor_switches_the_cache_off(data, engine, model, caplog):
    transform = Compose([Resize((64, 64)), RandomHorizontalFlip()])
    pradot, seen = model(pre_processor=PreProcessor(transform), epochs=2), []
    extract = pradot.model.feature_extractor.forward
    pradot.model.feature_extractor.forward = lambda images: seen.append(images) or extract(images)
    with caplog.at_level(logging.INFO):
        engine(limit_val_batches=0).fit(pradot, datamodule=data(train_batch_size=10))
    assert "Feature cache off: the pre-processor has a random transform (RandomHorizontalFlip" in caplog.text
    # In each epoch the backbone sees all pictures, of which some have turned.
    assert len({float(images[:, :, :, 0].sum()) for images in seen}) > 2


class Squares(Dataset):
    """Pictures that nobody has listed, flipped at random or not readable at will."""

    def __init__(self, flips=False, error=None):
        self.flips = flips
        self.error = error

    def __len__(self):
        return 10

    def __getitem__(self, index):
        if self.error and index == 9:
            raise self.error
        image = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(index))
        return ImageItem(
            image=image.flip(-1) if self.flips and torch.rand(1) < 0.5 else image, gt_label=torch.tensor(0)
        )


def squares(**arguments):
    return DataLoader(Squares(**arguments), 5, collate_fn=ImageBatch.collate)


def test_a_data_set_that_is_random_by_itself_switches_the_cache_off(engine, model, caplog):
    torch.manual_seed(0)
    with caplog.at_level(logging.INFO):
        engine().fit(model(batch_size=5), train_dataloaders=squares(flips=True))
        assert "Feature cache off: training images are not the same when they are read again" in caplog.text
        engine().fit(model(batch_size=5), train_dataloaders=squares())
        assert "Caching the features of 10 images" in caplog.text


def test_a_data_set_without_a_list_of_files_fails_with_the_readers_own_error(engine, model):
    with pytest.raises(OSError, match="the camera is off"):
        engine().fit(model(), train_dataloaders=squares(error=OSError("the camera is off")))


def test_no_pictures_at_all_are_refused_in_words(engine, model, monkeypatch):
    monkeypatch.setattr(Squares, "__len__", lambda _: 0)
    with pytest.raises(ValueError, match="the training set is empty"):
        engine().fit(model(batch_size=None), train_dataloaders=squares())


def test_a_stream_of_pictures_is_trained_on_without_the_cache(engine, model, caplog):
    class Stream(IterableDataset):
        def __iter__(self):
            return map(Squares().__getitem__, range(10))

    with caplog.at_level(logging.INFO):
        engine().fit(model(batch_size=5), train_dataloaders=DataLoader(Stream(), 5, collate_fn=ImageBatch.collate))
    assert "Feature cache off: training data come from a Stream, whose length is unknown" in caplog.text


def test_the_last_incomplete_batch_is_used(data, engine, model, monkeypatch):
    pradot = model(epochs=1)
    sizes = []
    update = pradot.model.update
    monkeypatch.setattr(
        pradot.model, "update", lambda features: sizes.append(len(features["layer2"])) or update(features)
    )
    engine().fit(pradot, datamodule=data())
    assert sorted(sizes) == [2, 4, 4]


def test_stops_when_the_cost_falls_no_longer_and_still_validates(data, engine, model, checkpoint):
    pradot, runner = model(epochs=200, patience=2, ema_rate=0.5), engine()
    runner.fit(pradot, datamodule=data())
    assert 2 < runner.trainer.current_epoch < 200
    assert pradot.post_processor.image_threshold.isfinite()
    saved = torch.load(checkpoint(runner), weights_only=True)
    assert saved["state_dict"]["post_processor._image_threshold"].isfinite()


def test_validates_once(data, engine, model, monkeypatch):
    calls = []
    pradot = model(epochs=3)
    step = pradot.validation_step
    monkeypatch.setattr(pradot, "validation_step", lambda batch, *args: calls.append(1) or step(batch, *args))
    engine().fit(pradot, datamodule=data())
    assert len(calls) == 2


def test_held_out_cost_is_logged_and_the_best_prototypes_are_kept(data, engine, model, monkeypatch):
    pradot, runner = model(validation_fraction=0.2, epochs=4, patience=4), engine()
    costs = iter([0.4, 0.1, 0.3, 0.2])
    states = []
    monkeypatch.setattr(pradot, "_held_out_cost", lambda _: states.append(prototypes_of(pradot).clone()) or next(costs))
    runner.fit(pradot, datamodule=data())
    assert runner.trainer.callback_metrics["val_transport_cost"] == pytest.approx(0.2)
    assert torch.equal(prototypes_of(pradot), states[1])
    assert not torch.equal(states[1], states[3])


def test_held_out_images_are_not_trained_on(data, engine, model):
    pradot, runner = model(validation_fraction=0.2, epochs=1), engine()
    runner.fit(pradot, datamodule=data())
    assert len(runner.trainer.train_dataloader.dataset) == 8
    assert runner.trainer.callback_metrics["val_transport_cost"] > 0


@pytest.mark.parametrize("cache", ["auto", "none"])
def test_whitening_and_weights_come_from_the_images_trained_on(data, engine, model, cache):
    pradot = model(feature_cache=cache, batch_size=10)
    engine(limit_val_batches=0).fit(pradot, datamodule=data(train_batch_size=10))
    module = data()
    module.setup()
    images = pradot.pre_processor.transform(torch.stack([item.image for item in module.train_data]))
    fresh = model().model
    fresh.load_state_dict(pradot.model.state_dict())
    for whitening in fresh.whitening.values():
        whitening.matrices = torch.empty(0)
    features = fresh.extract(images)
    fresh.fit_whitening([features])
    for name, whitening in fresh.whitening.items():
        torch.testing.assert_close(whitening.matrices, pradot.model.whitening[name].matrices, atol=1e-3, rtol=1e-3)
    fresh.calibrate(fresh.highest_scores([features]))
    torch.testing.assert_close(fresh.weights, pradot.model.weights, atol=1e-3, rtol=1e-3)
    for name, deviation in fresh.deviations.items():
        expected = pradot.model.deviations[name]
        assert float(deviation.share) == pytest.approx(float(expected.share), abs=1e-4)
        torch.testing.assert_close(deviation.centre, expected.centre, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(fresh.weights, torch.tensor([[0.25, 0.25, 0.0]] * 2))


def test_without_whitening_calibration_and_compression_it_is_the_papers_model(data, engine, model):
    pradot = model(whitened_channels=0, calibrate=False, compress=False)
    engine(limit_val_batches=0).fit(pradot, datamodule=data())
    assert not pradot.model.whitening
    assert pradot.model.count == 2 * (8 * 8 + 4 * 4)
    assert torch.equal(pradot.model.weights, torch.full((2, 2), 0.25))


def test_compression_drops_prototypes_and_says_how_scores_changed(data, engine, model, caplog):
    full = model(prototypes_per_cell=4, compress=False)
    small = model(prototypes_per_cell=4, calibration_folds=2)
    with caplog.at_level(logging.INFO):
        metrics = [runner.train(each, datamodule=data())[0] for each, runner in ((full, engine()), (small, engine()))]
    assert small.model.count < full.model.count == 2 * 4 * (8 * 8 + 4 * 4)
    assert f"Kept {small.model.count} of {full.model.count} prototypes" in caplog.text
    # Not for the models of folds.
    assert caplog.text.count("Kept") == 1
    assert metrics[1]["image_AUROC"] == metrics[0]["image_AUROC"] == 1


def test_a_larger_tolerance_leaves_fewer_prototypes(data, engine, model):
    exact, rough = (
        model(prototypes_per_cell=4, compress_tolerance=0.0),
        model(prototypes_per_cell=4, compress_tolerance=0.5),
    )
    for each in (exact, rough):
        engine(limit_val_batches=0).fit(each, datamodule=data())
    assert rough.model.count < exact.model.count


def test_extraction_with_openvino_gives_the_same_prototypes(data, engine, model, caplog):
    pytest.importorskip("openvino")
    fast, plain = model(extraction="openvino"), model(extraction="torch")
    with caplog.at_level(logging.INFO):
        for each in (fast, plain):
            torch.manual_seed(1)
            engine(limit_val_batches=0).fit(each, datamodule=data())
    assert "Extracting features with OpenVINO" in caplog.text
    torch.testing.assert_close(prototypes_of(fast), prototypes_of(plain), atol=1e-3, rtol=1e-3)


def fit_in_processes(root, folder, processes):
    """Prototypes and weights of a training shared by processes, on its own so that Lightning can start more of it."""
    script = f"""
import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from lightning.pytorch import seed_everything
from anomalib_ot import Pradot

if __name__ == "__main__":
    torch.set_num_threads(1)
    seed_everything(0, workers=True)
    data = Folder(name="squares", root={str(root)!r}, normal_dir="good", abnormal_dir="bad",
                  normal_test_dir="good_test", train_batch_size=4, eval_batch_size=4, num_workers=0,
                  val_split_mode="same_as_test")
    # Ten images in batches of three: the last batch has one image, so one process has none. Rounding may decide when
    # iterations stop and which prototypes are dropped, so neither is left to it.
    model = Pradot(**{{**{SMALL!r}, "batch_size": 3, "sinkhorn_tolerance": 0.0, "compress": False}}, visualizer=False)
    engine = Engine(default_root_dir={str(folder)!r}, accelerator="cpu", devices={processes}, logger=False,
                    strategy="ddp" if {processes} > 1 else "auto", enable_progress_bar=False)
    engine.train(model, datamodule=data)
    if engine.trainer.is_global_zero:
        torch.save((model.model.state_dict(), engine.trainer.world_size), {str(folder / "state.pt")!r})
"""
    folder.mkdir()
    (folder / "train.py").write_text(script)
    subprocess.run([sys.executable, "-W", "ignore", str(folder / "train.py")], check=True, timeout=300)
    return torch.load(folder / "state.pt")


@pytest.mark.slow
def test_two_processes_train_what_one_does(root, tmp_path):
    (alone, one), (together, two) = (fit_in_processes(root, tmp_path / str(count), count) for count in (1, 2))
    assert (one, two) == (1, 2)
    assert alone.keys() == together.keys()
    for name, value in alone.items():
        torch.testing.assert_close(together[name], value, atol=2e-3, rtol=1e-3, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("cache", ["auto", "none"])
def test_progress_is_shown_beside_the_trainers(data, model, tmp_path, cache):
    # A second live display would stop the first, or raise.
    runner = Engine(default_root_dir=tmp_path, accelerator="cpu", logger=False)
    pradot = model(feature_cache=cache)
    runner.fit(pradot, datamodule=data())
    assert pradot.model.is_initialised


def test_cached_features_are_let_go_after_training(data, engine, model):
    pradot = model()
    engine(limit_val_batches=0).fit(pradot, datamodule=data())
    assert list(pradot.training_features.trained_on) == []
    assert not pradot.model.workspace._buffers


def test_checkpoint_round_trip_gives_the_same_scores(data, engine, model, checkpoint):
    pradot, runner = model(), engine()
    runner.fit(pradot, datamodule=data())
    loaded = Pradot.load_from_checkpoint(checkpoint(runner), visualizer=False).eval()
    images = torch.rand(3, 3, 90, 70)
    pradot.eval()
    torch.testing.assert_close(loaded(images).anomaly_map, pradot(images).anomaly_map)
    assert torch.equal(loaded(images).pred_label, pradot(images).pred_label)


def test_resumed_training_equals_uninterrupted_training(data, engine, model, checkpoint):
    whole = model(epochs=4)
    engine().fit(whole, datamodule=data())
    first, runner = model(epochs=2), engine()
    runner.fit(first, datamodule=data())
    second = model(epochs=4)
    torch.manual_seed(123)
    engine().fit(second, datamodule=data(), ckpt_path=checkpoint(runner))
    # Not to the bit: sums are rounded by where a tensor lies in memory.
    torch.testing.assert_close(prototypes_of(second), prototypes_of(whole), atol=1e-4, rtol=1e-4)


def test_a_training_that_has_ended_does_not_go_on_from_its_checkpoint(data, engine, model, checkpoint):
    settings = {"epochs": 30, "patience": 1, "compress": True}
    first, second, runner, resumed = model(**settings), model(**settings), engine(), engine()
    runner.fit(first, datamodule=data())
    assert runner.trainer.current_epoch < 29
    resumed.fit(second, datamodule=data(), ckpt_path=checkpoint(runner))
    assert torch.equal(prototypes_of(second), prototypes_of(first))
    # A model that goes on without a checkpoint learns on.
    steps = [int(each.steps) for _, each in first.model.by_layer()]
    engine().fit(first, datamodule=data())
    assert [int(each.steps) for _, each in first.model.by_layer()] > steps


def test_a_training_that_has_ended_does_not_go_on_from_a_checkpoint_of_the_first_format(data, engine, model, tmp_path):
    settings = {"epochs": 30, "patience": 1, "compress": True}
    first, second, runner = model(**settings), model(**settings), engine()
    runner.fit(first, datamodule=data())
    content = torch.load(runner.trainer.checkpoint_callback.best_model_path, weights_only=True)
    del content["anomalib_ot"], content["finishing"]
    # It had the post-processor of anomalib.
    for level in ("image", "pixel"):
        del content["state_dict"][f"post_processor.{level}_calibration"]
    torch.save(content, tmp_path / "old.ckpt")
    engine().fit(second, datamodule=data(), ckpt_path=tmp_path / "old.ckpt")
    assert torch.equal(prototypes_of(second), prototypes_of(first))


def test_every_epoch_leaves_a_checkpoint(data, engine, model, checkpoint):
    class Interrupt(Exception):  # noqa: N818
        pass

    pradot, runner = model(epochs=5), engine()

    def fail_in_the_third_epoch():
        if pradot.current_epoch == 2:
            raise Interrupt

    pradot.on_train_epoch_start = fail_in_the_third_epoch
    with pytest.raises(Interrupt):
        runner.fit(pradot, datamodule=data())
    assert torch.load(checkpoint(runner), weights_only=True)["epoch"] == 1


def test_same_seed_same_prototypes(data, engine, model):
    one, other = model(), model()
    for each in (one, other):
        torch.manual_seed(7)
        engine().fit(each, datamodule=data())
    assert torch.equal(prototypes_of(one), prototypes_of(other))


def test_predicts_a_folder_a_file_and_a_data_module(root, data, engine, model):
    pradot = model()
    engine().fit(pradot, datamodule=data())
    runner = engine()
    folder = runner.predict(pradot, data_path=root / "bad")
    file = engine().predict(pradot, data_path=root / "bad" / "0.png")
    dataset = engine().predict(pradot, dataset=PredictDataset(root / "bad"))
    module = engine().predict(pradot, datamodule=data())
    assert sum(len(batch.image) for batch in folder) == 4
    assert sum(len(batch.image) for batch in module) == 8
    assert file[0].pred_score == folder[0].pred_score == dataset[0].pred_score
    assert file[0].anomaly_map.shape[-2:] == (64, 64)
    good = engine().predict(pradot, data_path=root / "good_test")
    assert min(batch.pred_score.min() for batch in folder) > max(batch.pred_score.max() for batch in good)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_bfloat16(data, engine, model, precision):
    pradot = model()
    metrics = engine(precision=precision).train(pradot, datamodule=data())[0]
    assert metrics["image_AUROC"] == 1
    assert prototypes_of(pradot).dtype == torch.float32


def test_default_pre_processor_uses_the_papers_size_and_the_backbones_statistics():
    resize, normalize = Pradot.configure_pre_processor().transform.transforms
    assert resize.size == [224, 224]
    assert normalize.mean == pytest.approx([0.485, 0.456, 0.406])
    normalize = Pradot.configure_pre_processor((64, 64), "tf_efficientnet_lite0").transform.transforms[1]
    assert normalize.mean == pytest.approx([0.5, 0.5, 0.5])


@pytest.mark.parametrize(
    ("name", "message"), [("nowhere", "does not exist"), ("empty", "Found 0 .* images in .*empty")]
)
def test_missing_and_empty_folders_are_named(root, data, engine, model, name, message):
    (root / "empty").mkdir(exist_ok=True)
    with pytest.raises((FileNotFoundError, RuntimeError), match=message):
        engine().fit(model(), datamodule=data(normal_dir=name))


def test_fewer_images_than_the_batch_are_refused(data, engine, model):
    with pytest.raises(
        ValueError, match=r"10 training images are fewer than the batch of 64; set --model.batch_size 10"
    ):
        engine().fit(model(batch_size=64), datamodule=data())


def test_fewer_images_than_the_usual_batch_are_one(data, engine, model, caplog):
    usual, given = model(batch_size=None), model(batch_size=10)
    with caplog.at_level("INFO"):
        engine().fit(usual, datamodule=data())
    assert "All 10 training images make one batch; the usual size is 32." in caplog.text
    engine().fit(given, datamodule=data())
    torch.testing.assert_close(usual.model.state_dict(), given.model.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("shown", [True, False])
def test_progress_is_shown_where_the_trainer_shows_it(data, model, monkeypatch, tmp_path, shown):
    tasks = []

    def track(batches, task, *, disable, **_):
        tasks.append((task, disable))
        return batches

    for module in ("image_features", "feature_training"):
        monkeypatch.setattr(f"anomalib_ot.host.{module}.track", track)
    runner = Engine(default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_progress_bar=shown)
    runner.fit(model(), datamodule=data())
    assert ("Extracting features", not shown) in tasks
    assert len(tasks) > 1
    assert all(hidden is not shown for _, hidden in tasks)


def test_holding_out_all_images_is_refused(data, engine, model):
    with pytest.raises(ValueError, match=r"10 of 10 images leaves 0, .* smaller --model.validation_fraction"):
        engine().fit(model(batch_size=None, validation_fraction=0.99), datamodule=data())


def test_unreadable_image_is_named(root, data, engine, model, tmp_path):
    broken = tmp_path / "good"
    broken.mkdir()
    for index in range(4):
        (broken / f"{index}.png").write_bytes((root / "good" / f"{index}.png").read_bytes())
    (broken / "2.png").write_bytes((root / "good" / "2.png").read_bytes()[:100])
    module = data(normal_dir=str(broken))
    with pytest.raises(ValueError, match=r"training image .*good/2\.png cannot be read .*repair or remove it"):
        engine().fit(model(), datamodule=module)


@pytest.mark.parametrize("cache", ["auto", "none"])
def test_nan_features_are_refused(data, engine, model, monkeypatch, cache):
    pradot = model(feature_cache=cache)
    monkeypatch.setattr(
        pradot.model.feature_extractor,
        "forward",
        lambda images: {name: torch.full((len(images), 4, 2, 2), torch.nan) for name in ("layer2", "layer3")},
    )
    with pytest.raises(ValueError, match=r"features of layer layer2 have NaN or infinite values for .*good/\d\.png"):
        engine().fit(pradot, datamodule=data())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": ["layer3", "layer4"]}, "model.*layer4"),
        ({"backbone": "resnet34"}, "model.*conv1"),
        ({"alphas": [0.0]}, "prototypes"),
    ],
)
def test_settings_in_python_that_do_not_fit_the_checkpoint_are_refused(
    data, engine, model, arguments, message, checkpoint
):
    runner = engine()
    runner.fit(model(), datamodule=data())
    with pytest.raises(ValueError, match=rf"of another architecture: .*{message}"):
        Pradot.load_from_checkpoint(checkpoint(runner), **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"patience": 0}, "patience must be at least 1"),
        ({"compress_tolerance": -0.1}, "compress_tolerance must be at least 0, not -0.1"),
        ({"validation_fraction": 1.0}, r"validation_fraction must be in \[0, 1\)"),
        ({"feature_cache": "ram"}, "feature_cache must be 'auto' or 'device'"),
    ],
)
def test_bad_arguments_are_refused_early(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model(**arguments)
