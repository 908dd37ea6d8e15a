"""What a user without anomalous pictures, or without a seed, is told, and what the scores are then."""

import pytest
import torch
from anomalib.data import Folder
from anomalib.post_processing import PostProcessor

from anomalib_ot import Duo, Foct, Pradot, WtFlow
from anomalib_ot.data import FewShot, GoodPictures
from anomalib_ot.explain.data import read_data
from anomalib_ot.host.calibration import FOLDS, SUPPORT, TRAINED

SMALL = {
    "backbone": "test_resnet",
    "layers": ["layer3"],
    "pre_trained": False,
    "image_size": (64, 64),
    "visualizer": False,
}
MODELS = {
    "Pradot": (Pradot, {"prototypes_per_cell": 1, "whitened_channels": 8, "epochs": 1}),
    "WtFlow": (WtFlow, {"width": 16, "whitened_channels": 8, "training_steps": 3}),
    "Duo": (
        Duo,
        {
            "pradot": {"prototypes_per_cell": 1, "whitened_channels": 8, "epochs": 1},
            "wt_flow": {"width": 16, "whitened_channels": 8, "training_steps": 3},
        },
    ),
    "Foct": (Foct, {"rotations": 1, "support_steps": 2, "foreground": "none"}),
}


def make(name, **given):
    torch.manual_seed(0)
    kind, settings = MODELS[name]
    return kind(**SMALL, **settings, **given)


def pictures(root, folder, count):
    (folder / "good").mkdir()
    for path in sorted((root / "good").iterdir())[:count]:
        (folder / "good" / path.name).write_bytes(path.read_bytes())
    return folder


def unseeded(root, **arguments):
    return Folder("squares", "good", root, "bad", num_workers=0, train_batch_size=4, test_split_ratio=0.4, **arguments)


@pytest.mark.in_turn
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("count", [1, 2, 10])
def test_the_threshold_of_anomalib_says_where_it_is_from(name, count, root, tmp_path, engine, caplog):
    data = GoodPictures(pictures(root, tmp_path, count), "good", num_workers=0)
    model = make(name, post_processor=PostProcessor())
    engine().train(model, datamodule=data)
    assert model.post_processor.image_threshold.isfinite()
    from_what = "the highest score of 2 good images" if count == 10 else "the score of one good image"
    assert from_what in caplog.text
    assert ("trained on some of these images" in caplog.text) == (count == 1)


@pytest.mark.in_turn
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("count", [1, 2, 10])
def test_one_to_ten_good_pictures_train_and_say_where_the_threshold_is_from(
    name, count, root, tmp_path, engine, caplog
):
    data = GoodPictures(pictures(root, tmp_path, count), "good", num_workers=0)
    model = make(name)
    engine().train(model, datamodule=data)
    assert model.post_processor.image_threshold.isfinite() == (count == 10)
    from_what = "8 good images support no rate below 0.11" if count == 10 else "at least 2 good images, got 1"
    assert from_what in caplog.text
    assert ("trained on some of the good images" in caplog.text) == (count == 1)
    assert f"The test has {2 if count == 10 else 1} good images and no anomalous ones" in caplog.text


@pytest.mark.parametrize(
    ("name", "settings", "source"),
    [
        ("WtFlow", {"validation_fraction": 0.2}, FOLDS),
        ("WtFlow", {"calibration_folds": 0}, TRAINED),
        ("Foct", {}, SUPPORT),
    ],
)
def test_scores_of_images_that_were_trained_on_calibrate_only_without_others(
    name, settings, source, root, tmp_path, engine, caplog
):
    data = GoodPictures(pictures(root, tmp_path, 10), "good", held_out=0, num_workers=0)
    model = make(name, **settings)
    engine().fit(model, datamodule=FewShot(data, 4) if name == "Foct" else data)
    processor = model.post_processor
    assert processor.calibration_source == source
    assert processor.image_calibration.numel() == {FOLDS: 8, TRAINED: 10, SUPPORT: 4}[source]
    assert ("trained on some of the good images" in caplog.text) == (source == TRAINED)


def test_scores_of_good_and_bad_pictures_differ_without_anomalies_to_validate_on(root, engine, tmp_path):
    data = GoodPictures(pictures(root, tmp_path, 10), "good", num_workers=0)
    # The good images are almost equal: the deviation of the others would be far more than the scale's eight thresholds.
    model = make("Pradot", deviation=False)
    runner = engine()
    runner.fit(model, datamodule=data)
    scores = torch.cat(
        [
            batch.pred_score
            for folder in ("good_test", "bad")
            for batch in runner.predict(model, data_path=root / folder)
        ]
    )
    assert len(scores.unique()) == 8
    assert (scores > 0).all()
    assert (scores < 1).all()


def test_a_later_run_without_a_seed_holds_out_what_was_held_out(root, engine, checkpoint, caplog):
    trained, later, model, other, runner = unseeded(root), unseeded(root), make("Pradot"), make("Pradot"), engine()
    torch.manual_seed(1)
    runner.fit(model, datamodule=trained)
    torch.manual_seed(2)
    engine().test(other, datamodule=later, ckpt_path=checkpoint(runner))
    assert set(later.test_data.samples.image_path) == set(trained.test_data.samples.image_path)
    assert "the split of the training is restored" in caplog.text
    # As `anomalib-ot explain` does, without a trainer.
    split = Pradot.load_from_checkpoint(checkpoint(runner)).split
    torch.manual_seed(3)
    settings = {"name": "squares", "normal_dir": "good", "abnormal_dir": "bad", "test_split_ratio": 0.4}
    found = read_data({"class_path": "Folder", "init_args": settings}, root, split)
    assert set(found.training.samples.image_path) == set(trained.train_data.samples.image_path)


def test_pictures_that_were_trained_on_are_counted(root, engine, checkpoint, caplog):
    runner = engine()
    runner.fit(make("Foct"), datamodule=unseeded(root, seed=1))
    count = len(runner.trainer.datamodule.train_data)
    later = unseeded(root, seed=1, normal_test_dir="good")
    engine().test(make("Foct"), datamodule=later, ckpt_path=checkpoint(runner))
    assert f"trained on {count} of the 14 held-out images of squares" in caplog.text


def test_a_checkpoint_that_knows_no_split_is_loaded(data, engine, checkpoint, tmp_path):
    runner = engine()
    runner.fit(make("Foct"), datamodule=data())
    content = torch.load(checkpoint(runner), weights_only=True)
    del content["split"]
    torch.save(content, tmp_path / "old.ckpt")
    assert Foct.load_from_checkpoint(tmp_path / "old.ckpt").split is None
    engine().test(make("Foct"), datamodule=data(), ckpt_path=tmp_path / "old.ckpt")
