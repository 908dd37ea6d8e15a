"""What anomalib promises of a model: by name, through its Engine, through its parser.

Its commands run in test_anomalib_command, and its exports there and in test_export.
"""

import inspect

import pytest
import torch
import yaml
from anomalib import LearningType
from anomalib.cli import AnomalibCLI
from anomalib.data import ImageBatch, PredictDataset
from anomalib.engine import Engine
from anomalib.models import UnknownModelError, get_model, list_models
from jsonargparse import Namespace
from lightning.pytorch import Trainer
from omegaconf import OmegaConf
from torch.utils.data import DataLoader

import anomalib_ot
from anomalib_ot import Assembly

SIZE = (64, 64)
SHARED = {"backbone": "test_resnet", "layers": ["layer3"], "pre_trained": False, "image_size": list(SIZE)}
MODELS = {
    "Pradot": {"prototypes_per_cell": 1, "whitened_channels": 16, "epochs": 1, "batch_size": 4},
    "Foct": {"rotations": 2, "support_steps": 3},
    "WtFlow": {"width": 16, "whitened_channels": 16, "training_steps": 2, "batch_size": 4},
    "Duo": {
        "pradot": {"prototypes_per_cell": 1, "whitened_channels": 16, "epochs": 1},
        "wt_flow": {"width": 16, "whitened_channels": 16, "training_steps": 2},
        "batch_size": 4,
    },
}
SNAKE = {"Pradot": "pradot", "Foct": "foct", "WtFlow": "wt_flow", "Duo": "duo"}
SUBCOMMANDS = ("test", "validate", "predict", "train")
COUNTS = {"n_train": 8, "n_validation": 1, "n_test": 2}


def make(name):
    return get_model(SNAKE[name], visualizer=False, **SHARED, **MODELS[name])


def make_engine(root):
    return Engine(logger=False, default_root_dir=root, accelerator="cpu", devices=1, enable_progress_bar=False)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("host")


@pytest.fixture(scope="module")
def data(root):
    def made():
        return Assembly(root / "data", eval_batch_size=4, train_batch_size=4, **COUNTS)

    made().prepare_data()
    return made


@pytest.fixture(scope="module", params=MODELS)
def fitted(request, root, data):
    """A model's name, its checkpoint after ``Engine.fit`` alone, and its scores of the test images."""
    torch.manual_seed(0)
    name = request.param
    engine, model = make_engine(root / "fit"), make(name)
    engine.fit(model=model, datamodule=data())
    path = root / "fit" / name / "Assembly/tray/v0/weights/lightning/model.ckpt"
    assert path.is_file()
    return name, path, scores(engine.predict(model=model, datamodule=data()))


def scores(predictions):
    """Score of each predicted image, by its path."""
    return {
        path: float(score)
        for batch in predictions
        for path, score in zip(batch.image_path, batch.pred_score, strict=True)
    }


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_listed_and_made_by_all_of_the_hosts_spellings(name):
    kind, settings = getattr(anomalib_ot, name), {**SHARED, **MODELS[name]}
    assert {SNAKE[name], name} <= list_models() | list_models(case="pascal")
    config = {"class_path": name, "init_args": settings}
    made = [
        get_model(name, **settings),
        get_model(SNAKE[name], **settings),
        get_model(config),
        get_model({"class_path": f"anomalib.models.{name}"}, **settings),
        get_model({"class_path": f"anomalib_ot.models.{name}", "init_args": settings}),
        get_model(OmegaConf.create(config)),
        get_model(Namespace(class_path=f"anomalib.models.{name}", init_args=Namespace(**settings))),
    ]
    assert {type(model) for model in made} == {kind}
    assert {model.name for model in made} == {name}
    assert all(model.hparams["layers"] == ["layer3"] for model in made)


def test_unknown_models_are_still_refused_by_the_host():
    for spec in ("Prado", {"class_path": "anomalib.models.Prado"}, {"class_path": "anomalib_ot.data.Assembly"}):
        with pytest.raises(UnknownModelError):
            get_model(spec)


@pytest.mark.parametrize("name", MODELS)
def test_what_a_model_says_of_itself(name):
    model = make(name)
    assert model.learning_type is LearningType.ONE_CLASS
    assert tuple(model.input_size) == SIZE
    assert model.trainer_arguments.keys() <= inspect.signature(Trainer).parameters.keys()
    assert all(getattr(model, part) for part in ("pre_processor", "post_processor", "evaluator"))


def test_a_checkpoint_is_tested_validated_and_trained_on(fitted, root, data):
    name, checkpoint, expected = fitted
    engine = make_engine(root / "again")
    (tested,) = engine.test(model=make(name), datamodule=data(), ckpt_path=checkpoint)
    assert {"image_AUROC", "image_F1Score", "pixel_AUROC", "pixel_F1Score"} == tested.keys()
    engine.validate(model=make(name), datamodule=data(), ckpt_path=checkpoint)
    (trained,) = engine.train(model=make(name), datamodule=data(), ckpt_path=checkpoint)
    assert trained.keys() == tested.keys()
    again = scores(engine.predict(model=make(name), datamodule=data(), ckpt_path=checkpoint))
    assert again == pytest.approx(expected, abs=1e-5)


def test_all_that_predict_takes_gives_the_same_scores(fitted, root):
    name, checkpoint, expected = fitted
    engine, folder = make_engine(root / "predict"), root / "data/tray/test/logical_anomalies"
    expected = {path: score for path, score in expected.items() if "logical" in path}
    assert len(expected) == COUNTS["n_test"]

    def predicted(**source):
        return scores(engine.predict(model=make(name), ckpt_path=checkpoint, **source))

    dataset = PredictDataset(folder, image_size=SIZE)
    loader = DataLoader(dataset, batch_size=2, collate_fn=ImageBatch.collate)
    first = min(expected)
    assert predicted(data_path=folder) == pytest.approx(expected, abs=1e-5)
    assert predicted(dataset=dataset) == pytest.approx(expected, abs=1e-5)
    assert predicted(dataloaders=loader) == pytest.approx(expected, abs=1e-5)
    assert predicted(data_path=first) == pytest.approx({first: expected[first]}, abs=1e-5)


@pytest.fixture
def config(fitted, root):
    """A configuration file for the parser, and the checkpoint's arguments."""
    name, checkpoint, _ = fitted
    content = {
        "model": {"class_path": name, "init_args": {**SHARED, **MODELS[name]}},
        "data": {"class_path": "Assembly", "init_args": {"root": str(root / "data"), **COUNTS}},
        "default_root_dir": str(root / "cli"),
        "trainer": {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False},
    }
    path = root / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return name, path, ["--ckpt_path", str(checkpoint)]


# The parser is one for all models, and slow to make.
@pytest.mark.slow
@pytest.mark.parametrize("fitted", ["Pradot"], indirect=True)
def test_the_parser_runs_every_subcommand_from_a_file(config, root, monkeypatch):
    name, path, checkpoint = config
    monkeypatch.chdir(root)
    AnomalibCLI(args=["fit", "--config", str(path)])
    assert (root / "cli" / name / "Assembly/tray/v0/weights/lightning/model.ckpt").is_file()
    for subcommand in SUBCOMMANDS:
        AnomalibCLI(args=[subcommand, "--config", str(path), *checkpoint])
    pictures = [each.parts[-2:] for each in (root / "cli" / name).rglob("images/**/*.png")]
    assert {("good", "000.png"), ("logical_anomalies", "000.png")} <= set(pictures)


@pytest.mark.parametrize("fitted", ["Pradot"], indirect=True)
def test_an_engine_from_a_file_has_the_files_settings(config, root, data):
    name, path, _ = config
    engine, model, datamodule = Engine.from_config(config_path=path, default_root_dir=root / "from_config")
    assert type(model) is getattr(anomalib_ot, name)
    assert isinstance(datamodule, type(data()))
    assert datamodule.name == "Assembly"
    (metrics,) = engine.train(model=model, datamodule=datamodule)
    assert 0 <= metrics["image_AUROC"] <= 1
    assert list((root / "from_config").rglob("model.ckpt"))
    for key, value in model.trainer_arguments.items():
        assert getattr(engine.trainer, key, value) == value
