"""What a prediction says of each picture, where it says it, and with which threshold."""

import csv
import logging
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from anomalib.data import Folder, ImageBatch, ImageItem, InferenceBatch
from anomalib.data import PredictDataset as Pictures
from anomalib.engine import Engine
from anomalib.post_processing import PostProcessor
from anomalib.visualization import ImageVisualizer
from torch.utils.data import DataLoader

from anomalib_ot import Duo, FewShot, Foct, Pradot, WtFlow
from anomalib_ot.decide import ConformalPostProcessor, Decision

SHARED = {"backbone": "test_resnet", "layers": ["layer3"], "pre_trained": False, "image_size": (64, 64)}
SETTINGS = {
    Pradot: {"prototypes_per_cell": 1, "whitened_channels": 16, "epochs": 1, "batch_size": 4},
    Foct: {"rotations": 1, "support_steps": 1},
    WtFlow: {"width": 16, "whitened_channels": 16, "training_steps": 2, "batch_size": 4},
    Duo: {
        "pradot": {"prototypes_per_cell": 1, "whitened_channels": 16, "epochs": 1},
        "wt_flow": {"width": 16, "whitened_channels": 16, "training_steps": 2},
        "batch_size": 4,
    },
}
COLUMNS = ["path", "score", "threshold", "label", "score_raw", "p_value"]


def make(kind=WtFlow, **arguments):
    torch.manual_seed(0)
    return kind(**{**SHARED, **SETTINGS[kind], "evaluator": False, "visualizer": False, **arguments})


def engine(**arguments):
    """The host's own, with results in the working folder."""
    return Engine(accelerator="cpu", logger=False, enable_progress_bar=False, **arguments)


def squares(root):
    folders = {"normal_dir": "good", "abnormal_dir": "bad", "normal_test_dir": "good_test"}
    return Folder("squares", **folders, root=root, num_workers=0, val_split_mode="same_as_test", seed=0)


@pytest.fixture(scope="module")
def plant(tmp_path_factory, root):
    """A folder to work in, with the run of each model as soon as it is asked for."""
    folder = tmp_path_factory.mktemp("plant")
    known = {}

    def run(kind=WtFlow, post_processor=ConformalPostProcessor):
        if (kind, post_processor) not in known:
            runner = engine(default_root_dir=folder / "results")
            data = squares(root)
            model = make(kind, post_processor=post_processor())
            runner.fit(model, datamodule=FewShot(data, 2) if kind is Foct else data)
            known[kind, post_processor] = Path(runner.trainer.default_root_dir)
        return known[kind, post_processor]

    return folder, run


@pytest.fixture
def run(plant, monkeypatch):
    """The run's folder of a model, below ``results`` of the working folder."""
    folder, trained = plant
    monkeypatch.chdir(folder)
    return trained


def model_of(run):
    return run / "weights/lightning/model.ckpt"


def table(path):
    with Path(path).open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == COLUMNS
    return rows


@pytest.mark.parametrize("kind", SETTINGS)
def test_predicting_leaves_verdicts_in_the_run_and_says_how_many_are_anomalous(run, root, capsys, kind):
    place = run(kind) / "images/predictions.csv"
    batches = engine().predict(make(kind), data_path=root / "bad", ckpt_path=model_of(run(kind)))
    rows = table(place)
    assert [row["path"] for row in rows] == [path for batch in batches for path in batch.image_path]
    scores = torch.cat([batch.pred_score for batch in batches])
    assert torch.equal(torch.tensor([float(row["score"]) for row in rows]), scores)
    labels = [bool(label) for batch in batches for label in batch.pred_label]
    assert [row["label"] == "anomalous" for row in rows] == labels
    assert {row["threshold"] for row in rows} == {"0.5"}
    printed = f"{place}: {sum(labels)} of 4 images are anomalous (score above the threshold 0.5)\n"
    assert capsys.readouterr().out.count(printed) == 1


def test_the_raw_score_is_what_the_model_says(run, root):
    assert engine().predict(make(), data_path=root / "bad", ckpt_path=model_of(run()), return_predictions=False) is None
    raw = WtFlow.load_from_checkpoint(model_of(run()), visualizer=False, post_processor=True)
    raw.post_processor.enable_normalization = False
    batches = engine().predict(raw, data_path=root / "bad")
    expected = [str(score) for batch in batches for score in batch.pred_score.numpy()]
    rows = table(run() / "images/predictions.csv")
    assert [row["score_raw"] for row in rows] == expected == [row["score"] for row in rows]
    # Raw scores are compared with the raw threshold, not with that of the normalised scale.
    assert {row["threshold"] for row in rows} == {str(raw.post_processor.image_threshold.numpy())}


def test_a_later_prediction_takes_the_place_of_the_table(run, root):
    for folder, count in (("good", 10), ("bad", 4)):
        engine().predict(make(), data_path=root / folder, ckpt_path=model_of(run()))
        rows = table(run() / "images/predictions.csv")
        assert [Path(row["path"]).parent.name for row in rows] == [folder] * count


def test_a_model_that_predicts_with_another_checkpoint_leaves_the_first_tables_as_they_are(run, root, tmp_path):
    first = run()
    second = tmp_path / "v1"
    shutil.copytree(first, second)
    (second / "images/predictions.csv").unlink(missing_ok=True)
    model = make(visualizer=True)
    for folder, place in (("bad", first), ("good_test", second)):
        engine().predict(model, data_path=root / folder, ckpt_path=model_of(place))
    assert [Path(row["path"]).parent.name for row in table(first / "images/predictions.csv")] == ["bad"] * 4
    assert [Path(row["path"]).parent.name for row in table(second / "images/predictions.csv")] == ["good_test"] * 4


def test_a_picture_whose_name_is_not_utf_8_has_a_verdict(run, root, tmp_path, capsys):
    shutil.copy(next((root / "bad").iterdir()), tmp_path / os.fsdecode(b"caf\xe9.png"))
    engine().predict(make(), data_path=tmp_path, ckpt_path=model_of(run()))
    (row,) = table(run() / "images/predictions.csv")
    assert row["path"].endswith(r"caf\udce9.png")
    assert "1 images are anomalous" in capsys.readouterr().out


def test_an_exported_file_does_not_say_where_it_was_trained(run, tmp_path):
    model = WtFlow.load_from_checkpoint(model_of(run()))
    assert model.run_folder == run().resolve()
    path = model.to_torch(str(tmp_path))
    assert torch.load(path, weights_only=False)["model"].run_folder is None
    assert model.run_folder is not None


def test_one_table_has_the_pictures_of_several_loaders(run, root):
    loaders = [
        DataLoader(Pictures(root / name), batch_size=3, collate_fn=ImageBatch.collate) for name in ("good_test", "bad")
    ]
    engine().predict(make(), dataloaders=loaders, ckpt_path=model_of(run()), return_predictions=False)
    rows = table(run() / "images/predictions.csv")
    assert [Path(row["path"]).parent.name for row in rows] == ["good_test"] * 4 + ["bad"] * 4


def test_pictures_in_memory_have_verdicts_without_a_path(run):
    items = [ImageItem(image=torch.rand(3, 64, 64)) for _ in range(3)]
    loader = DataLoader(items, batch_size=2, collate_fn=ImageBatch.collate)
    engine().predict(make(), dataloaders=loader, ckpt_path=model_of(run()))
    rows = table(run() / "images/predictions.csv")
    assert [row["path"] for row in rows] == [""] * 3
    assert all(row["label"] in {"anomalous", "normal"} for row in rows)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"post_processor": False}, "the model has no post-processor of anomalib"),
        ({"post_processor": PostProcessor(enable_thresholding=False)}, "thresholding is off"),
        ({"post_processor": PostProcessor()}, "no validation images"),
        ({}, "no scores of good images"),
    ],
)
def test_without_a_threshold_there_are_raw_scores_and_no_verdicts(tmp_path, root, capsys, given, why):
    model = make(**given)
    runner = engine(default_root_dir=tmp_path, limit_val_batches=0)
    runner.fit(model, datamodule=squares(root))
    runner.predict(model, data_path=root / "bad")
    rows = table(Path(runner.trainer.default_root_dir) / "images/predictions.csv")
    assert {(row["threshold"], row["label"]) for row in rows} == {("", "")}
    assert all(row["score"] == row["score_raw"] for row in rows)
    assert f"raw scores of 4 images without a verdict, as no threshold is known: {why}" in capsys.readouterr().out


def test_the_table_of_another_is_refused_and_kept(run, root, tmp_path):
    (tmp_path / "predictions.csv").write_text("mine")
    model = make(visualizer=ImageVisualizer(output_dir=tmp_path))
    with pytest.raises(FileExistsError, match=r"holds predictions\.csv, which anomalib-ot did not write"):
        engine().predict(model, data_path=root / "bad", ckpt_path=model_of(run()))
    assert (tmp_path / "predictions.csv").read_text() == "mine"


def test_a_table_that_cannot_be_written_costs_no_prediction(run, root, monkeypatch, capsys, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("anomalib_ot.host.verdicts.write_text", full)
    assert engine().predict(make(), data_path=root / "bad", ckpt_path=model_of(run()))
    assert "No space left on device" in caplog.text
    assert re.search(r"^\d of 4 images are anomalous", capsys.readouterr().out, re.MULTILINE)


def test_an_interrupted_prediction_leaves_the_earlier_table(run, root, monkeypatch):
    engine().predict(make(), data_path=root / "good", ckpt_path=model_of(run()))
    monkeypatch.setattr(WtFlow, "on_predict_epoch_end", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine().predict(make(), data_path=root / "bad", ckpt_path=model_of(run()))
    assert len(table(run() / "images/predictions.csv")) == 10


def test_pictures_and_verdicts_of_an_older_run_go_to_it(run, root):
    older = run()
    newer = engine(default_root_dir="results")
    newer.fit(make(), datamodule=squares(root))
    engine().predict(make(visualizer=True), data_path=root / "good_test", ckpt_path=model_of(older))
    assert len(table(older / "images/predictions.csv")) == len(list((older / "images/good_test").iterdir())) == 4
    engine().test(make(visualizer=True), datamodule=squares(root), ckpt_path=model_of(older))
    assert (older / "images/bad").is_dir()
    assert not (Path(newer.trainer.default_root_dir) / "images").exists()


def test_folders_that_are_given_are_obeyed(run, root, tmp_path):
    loaded = WtFlow.load_from_checkpoint(model_of(run()), visualizer=True)
    engine(default_root_dir=tmp_path / "mine").predict(loaded, data_path=root / "bad")
    assert [path.relative_to(tmp_path) for path in tmp_path.rglob("predictions.csv")] == [
        Path("mine/WtFlow/latest/images/predictions.csv")
    ]
    drawn = make(visualizer=ImageVisualizer(output_dir=tmp_path / "drawn"))
    engine().predict(drawn, data_path=root / "bad", ckpt_path=model_of(run()))
    assert len(table(tmp_path / "drawn/predictions.csv")) == 4
    exported = engine().export(make(), "torch", export_root="results", ckpt_path=model_of(run()))
    assert exported == Path("results/weights/torch/model.pt")
    exported = engine(default_root_dir=tmp_path).export(make(), "torch", ckpt_path=model_of(run()))
    assert exported == tmp_path / "weights/torch/model.pt"


def test_an_export_lies_in_the_run_where_the_next_model_does_not_overwrite_it(run):
    expected = run() / "weights/torch/model.pt"
    assert engine().export(make(), "torch", ckpt_path=model_of(run())) == expected
    assert engine().export(WtFlow.load_from_checkpoint(model_of(run())), "torch") == expected
    through_link = run().parent / "latest/weights/lightning/model.ckpt"
    assert "latest" not in str(WtFlow.load_from_checkpoint(through_link).run_folder)


def test_an_export_after_a_prediction_lies_in_the_run(run, root):
    runner, model = engine(), make()
    runner.predict(model, data_path=root / "bad", ckpt_path=model_of(run()))
    assert runner.export(model, "torch") == run() / "weights/torch/model.pt"


def test_a_checkpoint_that_was_copied_is_exported_where_the_engine_says(run, tmp_path):
    copy = tmp_path / "bottle.ckpt"
    copy.write_bytes(model_of(run()).read_bytes())
    assert engine().export(make(), "torch", ckpt_path=copy) == Path("results/weights/torch/model.pt")


def sensitive(**settings):
    return make(post_processor=PostProcessor(**settings))


def test_a_sensitivity_that_is_asked_for_moves_verdicts(run, root, caplog):
    with caplog.at_level(logging.INFO, "anomalib_ot"):
        for sensitivity, label in ((0.0, "normal"), (1.0, "anomalous")):
            model = sensitive(image_sensitivity=sensitivity)
            engine().predict(model, data_path=root / "bad", ckpt_path=model_of(run(post_processor=PostProcessor)))
            rows = table(run(post_processor=PostProcessor) / "images/predictions.csv")
            assert {row["threshold"] for row in rows} == {str(1 - sensitivity)}
            assert label in {row["label"] for row in rows}
    assert "WtFlow: image_sensitivity is 1.0 as given, not 0.5 as in the checkpoint" in caplog.text
    # Nobody asked for it.
    assert "pixel_sensitivity" not in caplog.text


def test_a_sensitivity_out_of_its_range_is_refused(run, root):
    path = model_of(run(post_processor=PostProcessor))
    with pytest.raises(ValueError, match=r"image_sensitivity must be in \[0, 1\], not 1.4"):
        engine().predict(sensitive(image_sensitivity=1.4), data_path=root / "bad", ckpt_path=path)


def test_a_sensitivity_that_is_asked_for_moves_test_and_masks(run, root):
    model = sensitive(image_sensitivity=0.3, pixel_sensitivity=0.2)
    engine().test(model, datamodule=squares(root), ckpt_path=model_of(run(post_processor=PostProcessor)))
    post = model.post_processor
    assert (post.image_sensitivity, post.pixel_sensitivity) == (0.3, 0.2)
    assert not post.image_threshold.isnan()


@pytest.mark.parametrize("setting", ["enable_normalization", "enable_thresholding", "enable_threshold_matching"])
def test_what_is_switched_off_stays_off(run, root, setting):
    model = sensitive(**{setting: False})
    engine().predict(model, data_path=root / "bad", ckpt_path=model_of(run(post_processor=PostProcessor)))
    assert getattr(model.post_processor, setting) is False


@pytest.mark.parametrize("kind", SETTINGS)
def test_an_export_has_the_sensitivity_that_is_asked_for(run, kind):
    def exported(**arguments):
        path = engine().export(make(kind, **arguments), "torch", ckpt_path=model_of(run(kind, PostProcessor)))
        return torch.load(path, weights_only=False)["model"].post_processor

    asked = exported(post_processor=PostProcessor(image_sensitivity=0.4))
    assert (asked.image_sensitivity, asked.pixel_sensitivity) == (0.4, 0.5)
    assert not asked.image_threshold.isnan()
    # The next one does not remember.
    assert exported().image_sensitivity == 0.5


def test_loading_takes_a_sensitivity_in_python(run, root):
    post_processor = PostProcessor(image_sensitivity=0.4)
    loaded = WtFlow.load_from_checkpoint(model_of(run(post_processor=PostProcessor)), post_processor=post_processor)
    assert loaded.post_processor.image_sensitivity == 0.4
    plain = WtFlow.load_from_checkpoint(model_of(run(post_processor=PostProcessor)))
    assert plain.post_processor.image_sensitivity == 0.5
    plain.post_processor.image_sensitivity = 0.3
    engine().predict(plain, data_path=root / "bad", ckpt_path=model_of(run(post_processor=PostProcessor)))
    assert {row["threshold"] for row in table(run(post_processor=PostProcessor) / "images/predictions.csv")} == {"0.7"}


def test_a_sensitivity_of_an_earlier_checkpoint_was_not_asked_for(run, root, tmp_path):
    content = torch.load(model_of(run(post_processor=PostProcessor)), weights_only=True)
    content["anomalib_post_processor_config"]["image_sensitivity"] = 0.4
    torch.save(content, tmp_path / "other.ckpt")
    model = make()
    for path, expected in ((tmp_path / "other.ckpt", 0.4), (model_of(run(post_processor=PostProcessor)), 0.5)):
        engine().predict(model, data_path=root / "bad", ckpt_path=path)
        assert model.post_processor.image_sensitivity == expected


def test_a_rate_that_is_asked_for_moves_verdicts_test_and_export(run, root, caplog):
    asked = make(post_processor=ConformalPostProcessor(0.3))
    with caplog.at_level(logging.INFO, "anomalib_ot"):
        engine().predict(asked, data_path=root / "bad", ckpt_path=model_of(run()))
    assert "WtFlow: false_alarm_rate is 0.3 as given, not 0.01 as in the checkpoint" in caplog.text
    # The ten images of the folds support a rate of 1/11; with 0.4, four of eleven may be above.
    for rate, rank in ((0.01, -1), (0.4, -4)):
        model = make(post_processor=ConformalPostProcessor(rate))
        engine().test(model, datamodule=squares(root), ckpt_path=model_of(run()))
        processor = model.post_processor
        expected = processor.image_calibration.sort().values[rank]
        assert processor.image_threshold == expected
        path = engine().export(make(post_processor=ConformalPostProcessor(rate)), "torch", ckpt_path=model_of(run()))
        exported = torch.load(path, weights_only=False)["model"].post_processor
        assert (exported.false_alarm_rate, exported.image_threshold) == (rate, expected)
        assert Decision.load(path).threshold() == expected


def test_each_image_has_its_p_value(run, root):
    loaded = WtFlow.load_from_checkpoint(model_of(run()))
    engine().predict(loaded, data_path=root / "bad")
    rows = table(run() / "images/predictions.csv")
    known = loaded.post_processor.image_calibration
    for row in rows:
        expected = (1 + (known >= float(row["score_raw"])).sum()) / (len(known) + 1)
        assert float(row["p_value"]) == pytest.approx(float(expected), rel=1e-5)


def test_a_score_that_is_nan_keeps_its_row(run, root, monkeypatch, caplog):
    loaded = WtFlow.load_from_checkpoint(model_of(run()))
    score = loaded.model.score

    def first_is_nan(*arguments, **given):
        scored = score(*arguments, **given)
        scored.pred_score[0] = float("nan")
        return scored

    monkeypatch.setattr(loaded.model, "score", first_is_nan)
    engine().predict(loaded, data_path=root / "bad")
    rows = table(run() / "images/predictions.csv")
    assert len(rows) == 4
    bad = [row for row in rows if row["score_raw"] == "nan"]
    assert {(row["label"], row["p_value"]) for row in bad} == {("anomalous", "")}
    assert all(row["p_value"] for row in rows if row not in bad)
    assert f"is NaN, which counts as anomalous: {bad[0]['path']}" in caplog.text


def test_a_checkpoint_with_the_post_processor_of_anomalib_keeps_it(run, root, caplog):
    path = model_of(run(post_processor=PostProcessor))
    kept = WtFlow.load_from_checkpoint(path)
    assert type(kept.post_processor) is PostProcessor
    model = make()
    batches = engine().predict(model, data_path=root / "bad", ckpt_path=path)
    assert type(model.post_processor) is PostProcessor
    saved = torch.load(path, weights_only=True)["state_dict"].items()
    host = PostProcessor()
    host.load_state_dict({name.split(".")[1]: each for name, each in saved if name.startswith("post_processor.")})
    rows = table(run(post_processor=PostProcessor) / "images/predictions.csv")
    raw = torch.tensor([float(row["score_raw"]) for row in rows])
    assert host(InferenceBatch(pred_score=raw)).pred_score.equal(torch.cat([batch.pred_score for batch in batches]))
    assert {row["p_value"] for row in rows} == {""}
    # Nobody asked for the default.
    assert "the post-processor is that of the checkpoint" not in caplog.text
    # And back.
    engine().predict(model, data_path=root / "bad", ckpt_path=model_of(run()))
    assert type(model.post_processor) is ConformalPostProcessor


def test_a_post_processor_that_is_asked_for_is_not_replaced_silently(run, root, caplog):
    asked = make(post_processor=PostProcessor())
    engine().predict(asked, data_path=root / "bad", ckpt_path=model_of(run()))
    assert type(asked.post_processor) is ConformalPostProcessor
    assert re.search(r"that of the checkpoint, .*ConformalPostProcessor, not the given .*PostProcessor", caplog.text)


def test_a_checkpoint_of_the_first_format_has_the_post_processor_of_anomalib(run, tmp_path):
    content = torch.load(model_of(run(post_processor=PostProcessor)), weights_only=True)
    del content["anomalib_ot"]
    torch.save(content, tmp_path / "first.ckpt")
    loaded = WtFlow.load_from_checkpoint(tmp_path / "first.ckpt")
    assert type(loaded.post_processor) is PostProcessor
    assert loaded.post_processor.image_threshold.isfinite()


@pytest.mark.parametrize(
    ("trained", "given", "setting"),
    [
        (PostProcessor, ConformalPostProcessor(0.2), "false_alarm_rate"),
        (ConformalPostProcessor, PostProcessor(image_sensitivity=0.2), "image_sensitivity"),
    ],
)
def test_a_setting_of_another_post_processor_is_refused(run, trained, given, setting):
    message = f"{setting} cannot be used with this checkpoint: it has the post_processor .*{trained.__name__}"
    with pytest.raises(ValueError, match=message):
        WtFlow.load_from_checkpoint(model_of(run(post_processor=trained)), post_processor=given)
