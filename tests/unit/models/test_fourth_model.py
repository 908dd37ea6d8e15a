"""Adding a model is a folder, here mean_distance, and a line in ``anomalib_ot.MODELS``."""

import ast
import json
from pathlib import Path

import pytest
import torch
from anomalib.data import Folder
from anomalib.deploy import ExportType
from anomalib.engine import Engine

import anomalib_ot
from anomalib_ot.comparison import Plan
from anomalib_ot.comparison.job import _run
from anomalib_ot.explain import explain
from anomalib_ot.explain.views import views_of

SETTINGS = {"backbone": "test_resnet", "pre_trained": False, "image_size": (64, 64)}


@pytest.fixture(scope="module")
def kind():
    """The model, while it is one of ours."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parent)
        patch.setitem(anomalib_ot.MODELS, "MeanDistance", "mean_distance")
        yield anomalib_ot.MeanDistance


@pytest.fixture(scope="module")
def config(root):
    folders = {"normal_dir": "good", "abnormal_dir": "bad", "normal_test_dir": "good_test", "mask_dir": "mask"}
    settings = {"root": str(root), "val_split_mode": "same_as_test", "num_workers": 0, "seed": 0}
    return {"class_path": "Folder", "init_args": {"name": "squares", **folders, **settings}}


@pytest.fixture(scope="module")
def data(config):
    return Folder(**config["init_args"])


@pytest.fixture(scope="module")
def trained(kind, data, tmp_path_factory):
    """The model after a training, and its checkpoint."""
    torch.manual_seed(0)
    model = kind(**SETTINGS)
    folder = tmp_path_factory.mktemp("results")
    engine = Engine(default_root_dir=folder, accelerator="cpu", logger=False, enable_progress_bar=False)
    engine.fit(model, datamodule=data)
    return model.eval(), Path(engine.trainer.checkpoint_callback.best_model_path)


def test_what_explains_and_commands_imports_no_model_by_name():
    source = Path(anomalib_ot.__file__).parent
    for path in (source / "cli.py", *source.glob("explain/*.py")):
        nodes = [
            node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)
        ]
        imported = {f"{getattr(node, 'module', '')}.{name.name}" for node in nodes for name in node.names}
        models = {f"anomalib_ot.{name}" for name in anomalib_ot.MODELS}
        assert not {name for name in imported if "anomalib_ot.models" in name or name in models}


def test_a_checkpoint_gives_the_trained_model(kind, trained):
    model, path = trained
    loaded = kind.load_from_checkpoint(path).eval()
    images = torch.rand(2, 3, 64, 64)
    assert model.model.mean.any()
    assert torch.equal(loaded(images).anomaly_map, model(images).anomaly_map)


@pytest.mark.parametrize("export", [pytest.param(ExportType.ONNX, marks=pytest.mark.slow), ExportType.OPENVINO])
def test_an_exported_file_is_checked(trained, data, tmp_path, export):
    pytest.importorskip("openvino")
    model, _ = trained
    path = getattr(model, f"to_{export.value}")(
        tmp_path, **({"datamodule": data} if export == ExportType.OPENVINO else {})
    )
    report = json.loads(path.with_name("model.parity.json").read_text())
    assert report["model"] == "MeanDistance"
    assert report["float32"]["map_difference"] < 1e-3


def test_its_views_are_drawn_beside_the_evidence(kind, trained, config, tmp_path):
    assert [*views_of(kind).all] == ["evidence", "distance"]
    page, explained = explain(trained[1], config, tmp_path, count=2, formats=["png"])
    assert "MeanDistance" in page.read_text()
    for each in explained:
        files = {path.name for path in (tmp_path / each.evidence.picture.name).glob("*.png")}
        assert files == {"evidence.png", "distance.png"}
        assert each.evidence.contributions.keys() == {"layer2"}


def test_it_is_compared_with_a_model_of_anomalib(kind, config):
    small = {"layers": ["layer1"], "pre_trained": False, "n_features": 10}
    models = {
        "mean": {"class_path": kind.__name__, "init_args": {"pre_trained": False}},
        "PaDiM": {"class_path": "Padim", "init_args": small},
    }
    plan = Plan(models, {"squares": config}, backbone="test_resnet", image_size=(64, 64))
    records = [_run(job)[0] for job in plan.jobs(threads=1, accelerator="cpu")]
    assert [record.key.model for record in records] == ["mean", "PaDiM"]
    assert records[0].metrics.keys() == records[1].metrics.keys()
    # A white patch on grey is far from the mean in any feature.
    assert records[0].metrics["image_AUROC"] > 90
