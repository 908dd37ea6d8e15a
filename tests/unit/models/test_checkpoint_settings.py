"""A checkpoint decides how a model scores, whatever the command that loads it repeats, changes or leaves out."""

import json
import logging
import shutil
from inspect import signature
from pathlib import Path
from typing import get_args

import pytest
import timm
import torch
from anomalib.callbacks import TilerConfigurationCallback
from anomalib.data import Folder
from anomalib.engine import Engine
from anomalib.models import Padim
from anomalib.pre_processing import PreProcessor
from lightning.pytorch import seed_everything
from timm.models import save_for_hf
from torchvision.transforms.v2 import Compose, Normalize, RandomInvert, Resize

from anomalib_ot import Duo, FewShot, Foct, Pradot, WtFlow
from anomalib_ot.features.backbone_sources import BackboneError
from anomalib_ot.host.model_settings import Kind

COMPONENTS = {"pre_processor", "post_processor", "evaluator", "visualizer"}
SIZE = (64, 64)
# What each model is trained with, where it is not the default.
TRAINED = {
    Pradot: {
        "layers": ["layer3", "layer2"],
        "prototypes_per_cell": [1, 2],
        "alphas": [0.0, 0.9],
        "whitened_channels": 16,
        "normalize_score": False,
        "smoothing": 2.0,
        "epochs": 2,
        "batch_size": 4,
    },
    Foct: {
        "layers": ["layer3"],
        "measure": "nearest",
        "rotations": 2,
        "position_weight": 1.0,
        "support_steps": 1,
        "smoothing": 2.0,
    },
    WtFlow: {
        "layers": ["layer3"],
        "score": "density",
        "pooling": True,
        "width": 16,
        "whitened_channels": 16,
        "top_share": 0.1,
        "training_steps": 2,
        "batch_size": 4,
    },
    Duo: {
        "layers": ["layer2", "layer3"],
        "smoothing": 2.0,
        "batch_size": 4,
        "pradot": {"prototypes_per_cell": [1, 2], "alphas": [0.0, 0.9], "whitened_channels": 16, "epochs": 2},
        "wt_flow": {"score": "density", "width": 16, "whitened_channels": 16, "training_steps": 2},
    },
}
# Another value for each setting, that the command line may give.
OTHERWISE = {
    Pradot: {
        "backbone": "resnet34",
        "layers": ["layer2", "layer3"],
        "pre_trained": False,
        "image_size": (96, 64),
        "prototypes_per_cell": 1,
        "alphas": [0.0, 0.5],
        "epochs": 7,
        "batch_size": 3,
        "whitened_channels": 8,
        "global_modes": 0,
        "deviation": False,
        "spatial": "squared",
        "initialisation": "uniform",
        "ema_rate": 0.5,
        "ema_warm_up": False,
        "epsilon": 0.1,
        "sinkhorn_iterations": 7,
        "sinkhorn_tolerance": 0.5,
        "free_coordinates": True,
        "normalize_score": True,
        "calibrate": False,
        "compress": False,
        "compress_tolerance": 0.5,
        "smoothing": 0.0,
        "seed": 7,
        "transport_memory": 0.001,
        "validation_fraction": 0.5,
        "patience": 5,
        "calibration_folds": 2,
        "feature_cache": "none",
        "cache_budget": 0.1,
        "extraction": "openvino",
    },
    Foct: {
        "backbone": "resnet34",
        "layers": ["layer2", "layer3"],
        "pre_trained": False,
        "image_size": (96, 64),
        "measure": "transport",
        "online": True,
        "online_rate": 0.5,
        "keep_memory": True,
        "foreground": "pca",
        "sam_checkpoint": "sam.pth",
        "sam_prompt": "point",
        "rotations": 4,
        "position_weight": 0.0,
        "detail_weight": 0.0,
        "foreground_ratio": 0.5,
        "background_ratio": 0.5,
        "capacity": 200,
        "compression": 0.5,
        "top_foreground": 5,
        "top_background": 5,
        "rho": 0.9,
        "navigator_start": "random",
        "navigator_hidden": 8,
        "temperature": 1.0,
        "learning_rate": 0.1,
        "support_steps": 7,
        "query_steps": 3,
        "fit_features": 10,
        "tolerance": 0.5,
        "smoothing": 0.0,
        "seed": 7,
    },
    WtFlow: {
        "backbone": "resnet34",
        "layers": ["layer2"],
        "pre_trained": False,
        "image_size": (96, 64),
        "normalization": "layer",
        "whitened_channels": 8,
        "global_modes": 0,
        "pooling": False,
        "width": 32,
        "depth": 2,
        "coupling": "optimal",
        "scope": "maps",
        "block_size": 4,
        "solver": "greedy",
        "score": "log_density",
        "euler_steps": 3,
        "mismatch_times": [0.5],
        "mismatch_draws": 2,
        "top_share": 0.0,
        "smoothing": 3.0,
        "seed": 7,
        "training_steps": 7,
        "batch_size": 3,
        "learning_rate": 0.1,
        "weight_decay": 0.5,
        "ema_rate": 0.5,
        "validation_fraction": 0.5,
        "patience": 7,
        "calibration_folds": 2,
        "feature_cache": "none",
        "cache_budget": 0.1,
        "extraction": "openvino",
    },
    Duo: {
        "backbone": "resnet34",
        "layers": ["layer3", "layer2"],
        "pre_trained": False,
        "image_size": (96, 64),
        "smoothing": 0.0,
        "seed": 7,
        "batch_size": 3,
        "validation_fraction": 0.5,
        "patience": 7,
        "calibration_folds": 2,
        "feature_cache": "none",
        "cache_budget": 0.1,
        "extraction": "openvino",
        "pradot": {"prototypes_per_cell": 1, "deviation": False},
        "wt_flow": {"width": 32, "score": "log_density"},
    },
}
MODELS = list(TRAINED)


def settings_of(kind):
    return signature(kind).parameters.keys() - COMPONENTS


def engine_in(folder, **arguments):
    return Engine(default_root_dir=folder, accelerator="cpu", logger=False, enable_progress_bar=False, **arguments)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """A folder of a small network with weights of its own, as ``anomalib-ot weights`` leaves one."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("backbones") / "own"
    config = {"mean": (0.4, 0.5, 0.6), "std": (0.3, 0.2, 0.1)}
    save_for_hf(timm.create_model("test_resnet"), folder, model_config=config)
    return f"local-dir:{folder}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory, root, backbone):
    """Trains each model once; its checkpoint and its scores of some pictures."""
    known = {}

    def train(kind):
        if kind not in known:
            folder = tmp_path_factory.mktemp(kind.__name__)
            seed_everything(0, workers=True, verbose=False)
            model = fresh(kind, backbone=backbone, image_size=SIZE, **TRAINED[kind])
            runner = engine_in(folder)
            data = squares(root)
            runner.fit(model, datamodule=FewShot(data, 2) if kind is Foct else data)
            path = Path(runner.trainer.checkpoint_callback.best_model_path)
            known[kind] = path, scores(kind.load_from_checkpoint(path, visualizer=False), None, root, folder)
        return known[kind]

    return train


def fresh(kind, **settings):
    # Scores as they are: a post-processor would clip them.
    return kind(**settings, post_processor=False, evaluator=False, visualizer=False)


def squares(root):
    folders = {"normal_dir": "good", "abnormal_dir": "bad", "normal_test_dir": "good_test", "mask_dir": "mask"}
    return Folder("squares", **folders, root=root, train_batch_size=4, num_workers=0, val_split_mode="same_as_test")


def scores(model, path, root, folder, **arguments):
    """Image scores (B,) and anomaly maps (B, 1, h, w), as ``anomalib test`` and ``predict`` compute them."""
    batches = engine_in(folder, **arguments).predict(model, datamodule=squares(root), ckpt_path=path)
    return torch.cat([each.pred_score for each in batches]), torch.cat([each.anomaly_map for each in batches])


def assert_same(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", MODELS)
def test_each_setting_is_of_one_kind_and_tested(kind):
    # A setting without a kind cannot be declared, see test_settings.py.
    names = [name for each in get_args(Kind) for name in kind.checkpoint_rules.settings.names(each)]
    assert sorted(names) == sorted(settings_of(kind))
    assert OTHERWISE[kind].keys() == settings_of(kind)


# Several settings at a time, as one that changed the scores would also do so among others, which do not. A leak that
# another setting hides is found by each setting alone.
GROUPS = [(kind, [*OTHERWISE[kind]][start::4]) for kind in MODELS for start in range(4)]
ALONE = [pytest.param(kind, [name], marks=pytest.mark.slow) for kind in MODELS for name in OTHERWISE[kind]]


@pytest.mark.parametrize(
    ("kind", "settings"), [*GROUPS, *ALONE], ids=lambda each: getattr(each, "__name__", None) or "-".join(each)
)
def test_settings_given_otherwise_change_no_score(trained, backbone, root, tmp_path, kind, settings):
    path, expected = trained(kind)
    given = {"backbone": backbone, "image_size": SIZE, **TRAINED[kind]}
    given |= {name: OTHERWISE[kind][name] for name in settings}
    if "alphas" in settings:
        given["prototypes_per_cell"] = 1
    if {"sam_checkpoint", "sam_prompt"} & {*settings}:
        given |= {"foreground": "sam", "sam_checkpoint": "sam.pth"}
    if "backbone" in settings:
        given["pre_trained"] = False
    assert_same(scores(fresh(kind, **given), path, root, tmp_path), expected)


@pytest.mark.parametrize("kind", MODELS)
def test_predicting_needs_the_checkpoint_alone(trained, root, tmp_path, monkeypatch, caplog, kind):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    path, expected = trained(kind)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "anomalib_ot"):
        assert_same(scores(fresh(kind), path, root, tmp_path), expected)
    assert not caplog.records


@pytest.mark.parametrize("kind", MODELS)
def test_neither_folder_nor_network_is_needed_to_load(trained, backbone, root, tmp_path, kind):
    path, expected = trained(kind)
    folder = Path(backbone.partition(":")[2])
    hidden = folder.with_name("hidden")
    folder.rename(hidden)
    try:
        loaded = kind.load_from_checkpoint(path, visualizer=False)
        assert_same(scores(loaded, None, root, tmp_path), expected)
        assert loaded.hparams.backbone == loaded.settings.backbone == loaded.model.settings.backbone == backbone
        # Saved again, it still knows its backbone.
        loaded.trainer.save_checkpoint(tmp_path / "again.ckpt")
        again = kind.load_from_checkpoint(tmp_path / "again.ckpt", visualizer=False)
        assert_same(scores(again, None, root, tmp_path), expected)
    finally:
        hidden.rename(folder)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("given", [Path, "local-dir:{}".format])
def test_a_folder_may_be_a_path_and_settings_name_it(backbone, monkeypatch, kind, given):
    folder = Path(backbone.partition(":")[2])
    monkeypatch.setenv("HOME", str(folder.parent))
    model = fresh(kind, backbone=given(f"~/{folder.name}"), image_size=SIZE, **TRAINED[kind])
    for name in (model.hparams["backbone"], model.recorded_backbone["name"], model.model.feature_extractor.backbone):
        assert (type(name), name) == (str, backbone)


def test_a_checkpoint_is_loaded_with_the_backbone_from_a_path(trained, backbone, root, tmp_path):
    path, expected = trained(Pradot)
    loaded = Pradot.load_from_checkpoint(path, backbone=Path(backbone.partition(":")[2]), visualizer=False)
    assert_same(scores(loaded, None, root, tmp_path), expected)
    # A path could not be read back without unpickling.
    loaded.trainer.save_checkpoint(tmp_path / "again.ckpt")
    again = Pradot.load_from_checkpoint(tmp_path / "again.ckpt", visualizer=False)
    assert again.hparams["backbone"] == backbone


def test_what_was_asked_for_otherwise_is_named(trained, backbone, root, tmp_path, caplog):
    path, _ = trained(Pradot)
    asked = fresh(Pradot, backbone=backbone, layers=["layer2", "layer3"], image_size=SIZE, alphas=[0.2, 0.3])
    caplog.clear()
    with caplog.at_level(logging.WARNING, "anomalib_ot"):
        scores(asked, path, root, tmp_path)
    (line,) = [record.getMessage() for record in caplog.records]
    assert "Pradot: the checkpoint decides the scores" in line
    assert "alphas [0.0, 0.9] (given: [0.2, 0.3])" in line
    assert asked.hparams.alphas == [0.0, 0.9]
    assert "epochs" not in line


@pytest.mark.parametrize("kind", MODELS)
def test_what_follows_from_the_backbone_was_not_asked_for(trained, root, tmp_path, caplog, kind):
    path, expected = trained(kind)
    model = fresh(kind, backbone="test_vit", pre_trained=False)
    caplog.clear()
    with caplog.at_level(logging.INFO, "anomalib_ot"):
        assert_same(scores(model, path, root, tmp_path), expected)
    asked, taken = [each.getMessage() for each in caplog.records if each.name.endswith("host.checkpoints")]
    assert "(given: 'test_vit')" in asked
    assert "image_size" not in asked
    assert "layers" not in asked
    assert "image_size" in taken
    assert "layers" in taken


def test_a_resumed_training_names_what_it_does_otherwise(trained, backbone, root, tmp_path, caplog):
    path, _ = trained(Pradot)
    given = {"backbone": backbone, "image_size": SIZE, **TRAINED[Pradot], "epochs": 3, "ema_rate": 0.5}
    model = fresh(Pradot, **{**given, "alphas": [0.0, 0.5]})
    with caplog.at_level(logging.WARNING, "anomalib_ot"):
        engine_in(tmp_path).fit(model, datamodule=squares(root), ckpt_path=path)
    lines = [record.getMessage() for record in caplog.records if record.name.endswith("checkpoints")]
    assert any("ema_rate 0.95 (given: 0.5)" in line and "epochs 2 (given: 3)" in line for line in lines)
    assert any("alphas [0.0, 0.9] (given: [0.0, 0.5])" in line for line in lines)
    assert [each.alpha for _, each in model.model.by_layer()] == [0.0, 0.9, 0.0, 0.9]


def test_weights_are_fetched_before_a_training_looks_at_its_data(root, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    data = squares(root)
    monkeypatch.setattr(data, "prepare_data", lambda: pytest.fail("the data came first"))
    with pytest.raises(BackboneError, match=r"anomalib-ot weights"):
        engine_in(tmp_path).fit(fresh(Pradot), datamodule=data)
    with pytest.raises(BackboneError, match=r"anomalib-ot weights"):
        fresh(Pradot).model(torch.zeros(1, 3, 64, 64))


def altered(path, folder, change):
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, folder / "altered.ckpt")
    return folder / "altered.ckpt"


def first_format(content):
    del content["anomalib_ot"]
    content.pop("finishing", None)


@pytest.mark.parametrize("kind", MODELS)
def test_a_checkpoint_of_the_first_format_is_migrated(trained, root, tmp_path, kind):
    path, expected = trained(kind)
    old = altered(path, tmp_path, first_format)
    assert_same(scores(kind.load_from_checkpoint(old, visualizer=False), None, root, tmp_path), expected)


def test_a_checkpoint_of_the_first_format_without_its_backbone_is_refused_by_name(trained, backbone, root, tmp_path):
    path, expected = trained(Pradot)

    def moved(content):
        first_format(content)
        content["hyper_parameters"]["backbone"] = "local-dir:gone"

    old = altered(path, tmp_path, moved)
    with pytest.raises(ValueError, match=r'local-dir:gone no longer exists .* backbone="local-dir:PATH"'):
        Pradot.load_from_checkpoint(old)
    loaded = Pradot.load_from_checkpoint(old, backbone=backbone, visualizer=False)
    assert_same(scores(loaded, None, root, tmp_path), expected)


@pytest.mark.parametrize(
    ("kind", "number", "later"),
    [
        (Pradot, 2, {"deviation": False, "global_modes": 0}),
        (WtFlow, 2, {"global_modes": 0}),
        (Foct, 3, {"detail_weight": 0.0, "online_rate": 0.0}),
        (Foct, 4, {"online_rate": 0.0}),
    ],
)
def test_a_checkpoint_of_an_earlier_format_scores_as_before_the_settings_that_it_lacks(
    backbone, root, tmp_path, kind, number, later
):
    given = {"backbone": backbone, "image_size": SIZE, **TRAINED[kind], **later}
    model, engine = fresh(kind, **given), engine_in(tmp_path)
    engine.fit(model, datamodule=squares(root))
    path = tmp_path / "earlier.ckpt"
    engine.trainer.save_checkpoint(path)
    expected = scores(model, None, root, tmp_path)

    def earlier_format(content):
        content["anomalib_ot"]["format"] = number
        for name in later:
            del content["hyper_parameters"][name]

    old = altered(path, tmp_path, earlier_format)
    assert_same(scores(kind.load_from_checkpoint(old, visualizer=False), None, root, tmp_path), expected)
    assert_same(scores(fresh(kind), old, root, tmp_path), expected)


def test_a_later_format_is_refused_by_name(trained, root, tmp_path):
    later = altered(trained(Pradot)[0], tmp_path, lambda content: content["anomalib_ot"].update(format=6))
    with pytest.raises(ValueError, match=r"format 6, .* up to 5; run: pip install --upgrade anomalib-ot"):
        Pradot.load_from_checkpoint(later)
    with pytest.raises(ValueError, match=r"format 6, .* up to 5"):
        scores(fresh(Pradot), later, root, tmp_path)


def test_a_checkpoint_of_another_model_is_refused_by_name(trained, root, tmp_path):
    path, _ = trained(WtFlow)
    with pytest.raises(ValueError, match=r"is of WtFlow, not of Pradot; give --model WtFlow"):
        Pradot.load_from_checkpoint(path)
    with pytest.raises(ValueError, match=r"is of WtFlow, not of Pradot; give --model WtFlow"):
        scores(fresh(Pradot), path, root, tmp_path)
    runner = engine_in(tmp_path)
    runner.fit(Padim("resnet18", ["layer3"], pre_trained=False, visualizer=False), datamodule=squares(root))
    with pytest.raises(ValueError, match=r"is not of Pradot"):
        Pradot.load_from_checkpoint(runner.trainer.checkpoint_callback.best_model_path)


def test_settings_given_in_python_replace_those_of_the_checkpoint(trained, root, tmp_path):
    path, expected = trained(WtFlow)
    loaded = WtFlow.load_from_checkpoint(path, score="mismatch", visualizer=False)
    assert loaded.hparams.score == loaded.settings.score == loaded.model.settings.score == "mismatch"
    assert not torch.equal(scores(loaded, None, root, tmp_path)[0], expected[0])


@pytest.mark.parametrize("error", [MemoryError("none left"), RuntimeError("a bug"), torch.OutOfMemoryError("full")])
def test_what_fails_beside_the_file_is_not_called_damage(trained, monkeypatch, error):
    path, _ = trained(Pradot)

    def fail(*_, **__):
        raise error

    monkeypatch.setattr("anomalib_ot.models.pradot.lightning_model.PradotModel.__init__", fail)
    with pytest.raises(type(error), match=str(error)):
        Pradot.load_from_checkpoint(path)


def test_a_device_that_is_not_there_is_not_called_damage(trained):
    with pytest.raises((RuntimeError, AssertionError), match=r"(?i)cuda"):
        Pradot.load_from_checkpoint(trained(Pradot)[0], map_location="cuda:7")


def saved(model, root, folder):
    runner = engine_in(folder)
    runner.fit(model, datamodule=squares(root))
    return runner.trainer.checkpoint_callback.best_model_path


def small(**components):
    settings = {"backbone": "test_resnet", "layers": ["layer3"], "pre_trained": False, "training_steps": 1, "width": 16}
    given = {"post_processor": False, "evaluator": False, "visualizer": False, **components}
    return WtFlow(**settings, image_size=SIZE, whitened_channels=16, **given)


def test_a_checkpoint_without_pre_processing_is_scored_without(root, tmp_path):
    path = saved(small(pre_processor=False), root, tmp_path)
    expected = scores(WtFlow.load_from_checkpoint(path, visualizer=False), None, root, tmp_path)
    assert expected[1].shape[-2:] == (72, 80)
    assert_same(scores(small(), path, root, tmp_path), expected)


def test_pre_processing_that_no_checkpoint_holds_is_refused_by_name(root, tmp_path):
    inverted = PreProcessor(Compose([Resize(SIZE), RandomInvert(p=1)]))
    path = saved(small(pre_processor=inverted), root, tmp_path)
    for model in (small(), small(pre_processor=False)):
        with pytest.raises(ValueError, match=r"has the pre_processor .*PreProcessor with Compose"):
            scores(model, path, root, tmp_path)
    with pytest.raises(ValueError, match=r"has the pre_processor .*PreProcessor with Compose"):
        WtFlow.load_from_checkpoint(path)
    model = WtFlow.load_from_checkpoint(path, pre_processor=inverted, visualizer=False)
    assert model.pre_processor.transform is inverted.transform
    assert scores(small(pre_processor=inverted), path, root, tmp_path)[1].shape[-2:] == SIZE


def test_pre_processing_that_the_checkpoint_holds_is_taken_from_it(root, tmp_path):
    own = PreProcessor(Compose([Resize((72, 64)), Normalize([0.1, 0.1, 0.1], [0.5, 0.5, 0.5])]))
    path = saved(small(pre_processor=own), root, tmp_path)
    expected = scores(WtFlow.load_from_checkpoint(path, visualizer=False), None, root, tmp_path)
    assert expected[1].shape[-2:] == (72, 64)
    assert_same(scores(small(), path, root, tmp_path), expected)


def test_tiles_are_the_checkpoint_s(root, tmp_path, caplog):
    tiles = TilerConfigurationCallback(enable=True, tile_size=(32, 64), stride=32)
    runner = engine_in(tmp_path, callbacks=[tiles])
    runner.fit(small(), datamodule=squares(root))
    path = runner.trainer.checkpoint_callback.best_model_path
    expected = scores(small(), path, root, tmp_path, callbacks=[tiles])
    assert_same(scores(small(), path, root, tmp_path), expected)
    assert_same(scores(WtFlow.load_from_checkpoint(path, visualizer=False), None, root, tmp_path), expected)
    whole = saved(small(), root, tmp_path / "whole")
    expected = scores(small(), whole, root, tmp_path)
    with caplog.at_level(logging.WARNING, "anomalib_ot"):
        assert_same(scores(small(), whole, root, tmp_path, callbacks=[tiles]), expected)
    assert "the tiles are those of the checkpoint, none" in caplog.text


def test_the_recorded_backbone_is_plain_data(trained, backbone):
    record = torch.load(trained(Pradot)[0], weights_only=True)["anomalib_ot"]["backbone"]
    assert record["name"] == backbone
    assert json.loads(json.dumps(record))["config"]["architecture"] == "test_resnet"


def test_an_absent_checkpoint_is_refused_by_name(tmp_path):
    shutil.rmtree(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint .*nothing\.ckpt"):
        Pradot.load_from_checkpoint(tmp_path / "nothing.ckpt")
