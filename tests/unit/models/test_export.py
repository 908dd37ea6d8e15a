"""Checked exports of small fitted models. The ONNX file of a model is written once for all OpenVINO files."""

import json
import logging
import re
import shutil
from functools import cache
from itertools import product
from pathlib import Path

import nncf
import numpy as np
import openvino
import pytest
import torch
from anomalib.data import Folder
from anomalib.deploy import CompressionType, OpenVINOInferencer, TorchInferencer
from anomalib.engine import Engine
from anomalib.models.components.base.export_mixin import ExportMixin
from anomalib.post_processing import PostProcessor
from PIL import Image
from torchmetrics.functional.classification import binary_auroc
from torchvision.transforms.v2.functional import resize

from anomalib_ot import Duo, FewShot, Foct, Pradot, WtFlow
from anomalib_ot.decide import ConformalPostProcessor, Decision
from anomalib_ot.export.tolerance import ExportError

SIZE = (64, 64)
SHARED = {
    "backbone": "test_resnet",
    "layers": ["layer2", "layer3"],
    "pre_trained": False,
    "image_size": SIZE,
    "visualizer": False,
}
MODELS = {
    "Pradot": lambda: Pradot(prototypes_per_cell=1, whitened_channels=16, epochs=2, batch_size=4, **SHARED),
    "Foct": lambda: Foct(rotations=2, support_steps=3, online=True, **SHARED),
    # These images are almost equal: without their mode, eight-bit rounding exceeds what is left.
    "WtFlow": lambda: WtFlow(global_modes=0, width=16, whitened_channels=16, training_steps=7, batch_size=4, **SHARED),
    "Duo": lambda: Duo(
        pradot={"prototypes_per_cell": 1, "whitened_channels": 16, "epochs": 2},
        wt_flow={"global_modes": 0, "width": 16, "whitened_channels": 16, "training_steps": 7},
        batch_size=4,
        **SHARED,
    ),
}
COMPRESSIONS = (None, CompressionType.FP16, CompressionType.INT8, CompressionType.INT8_PTQ)
# Duo's graph has Pradot's and WtFlow's in it.
QUICK = {("Foct", None), ("Duo", CompressionType.FP16)}
_TO_ONNX = ExportMixin.to_onnx


def squares(root):
    return Folder(
        name="squares",
        root=root,
        normal_dir="good",
        abnormal_dir="bad",
        normal_test_dir="good_test",
        mask_dir="mask",
        train_batch_size=4,
        eval_batch_size=4,
        num_workers=0,
        val_split_mode="same_as_test",
    )


def fit(name, data, folder):
    torch.manual_seed(0)
    model = MODELS[name]()
    engine = Engine(default_root_dir=folder, accelerator="cpu", logger=False, enable_progress_bar=False)
    engine.fit(model, datamodule=FewShot(data, 2) if name == "Foct" else data)
    return model.eval()


@pytest.fixture(scope="module")
def data(root):
    return squares(root)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """Trains each model once, so that its ONNX file is written once too."""
    return cache(lambda name: fit(name, data, tmp_path_factory.mktemp(name)))


@pytest.fixture(scope="module")
def fitted(request, trained):
    return trained(request.param)


@pytest.fixture(scope="module")
def pradot(trained):
    return trained("Pradot")


@pytest.fixture(scope="module")
def graphs():
    """Folders of the ONNX files that the host has written, by model."""
    return {}


@pytest.fixture
def one_graph(graphs, monkeypatch, tmp_path_factory):
    """Lets the host write the ONNX file of a model only once: it takes much longer than everything else."""

    def to_onnx(model, export_root, _name, input_size, **arguments):
        key = (id(model), model.post_processor.enable_normalization, input_size, str(arguments))
        if key not in graphs:
            folder = tmp_path_factory.mktemp("onnx")
            # Keep the model, so that no other model gets its id.
            graphs[key] = (_TO_ONNX(model, folder, "graph", input_size, **arguments).parent, model)
        destination = Path(export_root) / "weights/onnx"
        shutil.copytree(graphs[key][0], destination, dirs_exist_ok=True)
        return destination / "graph.onnx"

    monkeypatch.setattr(ExportMixin, "to_onnx", to_onnx)


def report_of(path):
    return json.loads(path.with_name(f"{path.stem}.parity.json").read_text())


def validation_images(data):
    """The validation images as a user would resize them, and their labels."""
    images = torch.stack([resize(item.image, list(SIZE), antialias=True).clamp(0, 1) for item in data.val_data])
    return images, torch.tensor([int(item.gt_label) for item in data.val_data])


def predict(path, images, folder, monkeypatch):
    """Maps and scores that anomalib's inferencer gives, one image at a time."""
    monkeypatch.chdir(folder)  # the inferencer leaves its cache in the working folder
    inferencer = OpenVINOInferencer(path, device="CPU", config={"INFERENCE_PRECISION_HINT": "f32"})
    results = [inferencer.predict(image.permute(1, 2, 0).numpy()) for image in images]
    maps = np.stack([np.asarray(result.anomaly_map).reshape(SIZE) for result in results])
    return torch.from_numpy(maps), torch.tensor([float(np.asarray(result.pred_score).squeeze()) for result in results])


@pytest.mark.usefixtures("one_graph")
@pytest.mark.parametrize(
    ("fitted", "compression"),
    [pytest.param(*each, marks=() if each in QUICK else pytest.mark.slow) for each in product(MODELS, COMPRESSIONS)],
    indirect=["fitted"],
)
def test_openvino_files_give_the_scores_of_torch(fitted, data, compression, tmp_path, monkeypatch):
    path = fitted.to_openvino(tmp_path, input_size=SIZE, compression_type=compression, datamodule=data)
    reports = ["model.calibration.json", "model.parity.json"]
    assert sorted(each.name for each in path.parent.iterdir()) == ["model.bin", *reports, "model.xml"]
    report = report_of(path)
    assert report["compression"] == getattr(compression, "value", "fp32")
    assert report["batch_size"] is None
    names = ("model.bin", "model.calibration.json", "model.xml")
    assert report["bytes"] == {name: (path.parent / name).stat().st_size for name in names}
    decision = Decision.load(path)
    images, _ = validation_images(data)
    maps, scores = predict(path, images, tmp_path, monkeypatch)
    with fitted.frozen(), torch.inference_mode():
        ours = fitted(images)
    assert np.array_equal(decision.is_anomalous(decision.raw_scores(scores)), scores > 0.5)
    if allowed := {None: 1e-3, CompressionType.FP16: 1e-2}.get(compression):
        assert float((maps - ours.anomaly_map[:, 0]).abs().max()) < allowed
        assert float((scores - ours.pred_score).abs().max()) < allowed
        together = openvino.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(images[:3].numpy())
        assert np.abs(together["anomaly_map"] - ours.anomaly_map[:3].numpy()).max() < allowed
    else:
        masks = torch.stack([resize(item.gt_mask[None], list(SIZE))[0] for item in data.val_data]).flatten().long()
        fall = binary_auroc(ours.anomaly_map.flatten(), masks) - binary_auroc(maps.flatten(), masks)
        assert float(fall) < 0.01


@pytest.fixture
def unclipped(pradot):
    """A model whose files give unclipped maps and scores, which the report compares."""
    post_processor = pradot.post_processor
    pradot.post_processor = PostProcessor(enable_normalization=False, enable_thresholding=False)
    yield pradot
    pradot.post_processor = post_processor


@pytest.mark.usefixtures("one_graph")
@pytest.mark.parametrize("compression", [None, CompressionType.INT8])
def test_the_report_holds_the_true_numbers(unclipped, data, compression, tmp_path, monkeypatch):
    path = unclipped.to_openvino(tmp_path, input_size=SIZE, compression_type=compression, datamodule=data)
    report = report_of(path)
    images, labels = validation_images(data)
    maps, scores = predict(path, images, tmp_path, monkeypatch)
    with torch.inference_mode():
        ours = unclipped(images)
    span = float(ours.anomaly_map.max() - ours.anomaly_map.min())
    measured = report["float32"]
    assert measured["map_difference"] == pytest.approx(
        float((maps - ours.anomaly_map[:, 0]).abs().max()) / span, rel=0.05, abs=1e-6
    )
    assert measured["score_difference"] == pytest.approx(
        float((scores - ours.pred_score).abs().max()) / span, rel=0.05, abs=1e-6
    )
    assert measured["image_AUROC"] == pytest.approx(float(binary_auroc(scores, labels)))
    assert report["torch"]["image_AUROC"] == pytest.approx(float(binary_auroc(ours.pred_score, labels)))
    assert report["pictures"] == {"source": "validation set of squares", "count": 8}
    assert {"map_difference", "image_AUROC", "changed_labels", "changed_pixels"} <= report["default"].keys()


@pytest.mark.usefixtures("one_graph")
@pytest.mark.parametrize(
    "fitted",
    [pytest.param(name, marks=() if name == "Pradot" else pytest.mark.slow) for name in MODELS],
    indirect=True,
)
def test_onnx_and_torch_without_a_data_module(fitted, tmp_path, monkeypatch):
    images = torch.rand(3, 3, *SIZE, generator=torch.Generator().manual_seed(1))
    with fitted.frozen(), torch.inference_mode():
        ours = fitted(images)
    onnx = fitted.to_onnx(tmp_path, input_size=SIZE)
    assert report_of(onnx)["pictures"] == {"source": "synthetic noise, seed 0", "count": 6}
    maps, _ = predict(onnx, images, tmp_path, monkeypatch)
    assert float((maps - ours.anomaly_map[:, 0]).abs().max()) < 1e-3
    exported = fitted.to_torch(tmp_path)
    assert report_of(exported)["float32"]["map_difference"] < 1e-5
    with pytest.raises(ValueError, match="TRUST_REMOTE_CODE"):
        TorchInferencer(exported, device="cpu")
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    theirs = TorchInferencer(exported, device="cpu").predict(images)
    assert torch.allclose(theirs.anomaly_map.squeeze(), ours.anomaly_map.squeeze(), atol=1e-5)


@pytest.fixture
def large_image(tmp_path):
    """An image file with details that depend on the resize method."""
    pixels = np.random.default_rng(0).integers(0, 256, (300, 260, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


@pytest.fixture
def predicted(unclipped, engine, large_image):
    """Score and map of the large image as anomalib predicts them."""
    (batch,) = engine().predict(unclipped, data_path=large_image)
    return float(batch.pred_score), batch.anomaly_map.numpy().squeeze()


def test_the_code_of_the_deployment_guide_gives_the_score_of_predict(
    unclipped, one_graph, predicted, tmp_path, monkeypatch
):
    del one_graph
    path = unclipped.to_openvino(tmp_path, input_size=SIZE)
    for file in path.parent.glob("model.*"):
        shutil.copy(file, tmp_path)
    monkeypatch.chdir(tmp_path)
    shown = {}
    exec(_code_of("Run it").replace("(224, 224)", str(SIZE)), shown)
    score, anomaly_map = predicted
    assert float(shown["prediction"].pred_score.squeeze()) == pytest.approx(score, abs=1e-5)
    np.testing.assert_allclose(np.squeeze(shown["prediction"].anomaly_map), anomaly_map, atol=1e-5)


def _code_of(section):
    guide = Path(__file__).parents[3] / "docs/guides/deployment.md"
    return re.search(rf"## {section}\n\n```python\n(.*?)```", guide.read_text(encoding="utf-8"), re.DOTALL)[1]


def test_a_torch_file_resizes_as_predict_does(unclipped, predicted, large_image, tmp_path, monkeypatch):
    graphs_resize_with = unclipped.pre_processor.export_transform
    path = unclipped.to_torch(tmp_path)
    assert unclipped.pre_processor.export_transform is graphs_resize_with
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    prediction = TorchInferencer(path, device="cpu").predict(large_image)
    score, anomaly_map = predicted
    assert float(prediction.pred_score) == pytest.approx(score, abs=1e-5)
    np.testing.assert_allclose(np.squeeze(prediction.anomaly_map), anomaly_map, atol=1e-5)


def test_the_log_has_result_and_paths_in_one_line(pradot, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "anomalib_ot"):
        path = pradot.to_torch(tmp_path)
    lines = [record.getMessage() for record in caplog.records if "export" in record.getMessage()]
    assert len(lines) == 1
    assert re.search(
        r"maps differ from torch's by at most \d\.\de-?\d+ of their range, .* on 6 images .*; 0 labels and 0 pixels",
        lines[0],
    )
    assert str(path) in lines[0]
    assert str(path.with_name("model.parity.json")) in lines[0]
    assert "\n" not in lines[0]


@pytest.mark.parametrize("kind", ["onnx", "openvino"])
@pytest.mark.parametrize("wanted", [False, True])
def test_the_log_has_the_exporters_steps_only_if_a_level_is_set(pradot, kind, wanted, tmp_path, caplog, monkeypatch):
    def export(**_):
        logging.getLogger("onnxscript.optimizer._constant_folding").info("Skipping constant folding for node")
        raise InterruptedError

    monkeypatch.setattr(torch.onnx, "export", export)
    monkeypatch.setattr(logging.getLogger("onnxscript"), "level", logging.INFO if wanted else logging.NOTSET)
    with caplog.at_level(logging.INFO), pytest.raises(InterruptedError):
        getattr(pradot, f"to_{kind}")(tmp_path)
    assert ("Skipping constant folding" in caplog.text) == wanted
    assert logging.getLogger("onnxscript").level == (logging.INFO if wanted else logging.NOTSET)


def wrong(export):
    """An exporter that writes wrong weights of the layers."""

    def exporting(model, *arguments, **settings):
        right = model.model.weights
        model.model.weights = right * torch.tensor([[1.2], [0.8]])
        try:
            return export(model, *arguments, **settings)
        finally:
            model.model.weights = right

    return exporting


def test_the_exporter_meets_no_activation_in_place(pradot, tmp_path, monkeypatch):
    def in_place():
        return {each.inplace for each in pradot.modules() if hasattr(each, "inplace")}

    def to_onnx(*_, **__):
        assert in_place() == {False}
        raise NotImplementedError

    monkeypatch.setattr(ExportMixin, "to_onnx", to_onnx)
    assert in_place() == {True}
    with pytest.raises(NotImplementedError):
        pradot.to_openvino(tmp_path)
    assert in_place() == {True}


@pytest.mark.parametrize(
    "kind", ["torch", *(pytest.param(each, marks=pytest.mark.slow) for each in ("onnx", "openvino"))]
)
def test_a_wrong_file_is_not_published(pradot, kind, tmp_path, monkeypatch):
    arguments = {} if kind == "torch" else {"input_size": SIZE}
    method = "to_torch" if kind == "torch" else "to_onnx"
    monkeypatch.setattr(ExportMixin, method, wrong(getattr(ExportMixin, method)))
    folder = tmp_path / "weights" / kind
    folder.mkdir(parents=True)
    (folder / "model.bin").write_text("of an earlier export")
    with pytest.raises(ExportError, match=r"map difference is .* more than"):
        getattr(pradot, f"to_{kind}")(tmp_path, **arguments)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [folder / "model.bin"]
    assert (folder / "model.bin").read_text() == "of an earlier export"


class Blind(ConformalPostProcessor):
    """It marks no pixel."""

    def _mask(self, label, maps):
        return super()._mask(label & False, maps)


def blinded(export):
    """An exporter that writes another post-processor."""

    def exporting(model, *arguments, **settings):
        model.post_processor.__class__ = Blind
        try:
            return export(model, *arguments, **settings)
        finally:
            model.post_processor.__class__ = ConformalPostProcessor

    return exporting


@pytest.mark.parametrize("kind", ["torch", pytest.param("onnx", marks=pytest.mark.slow)])
def test_a_file_whose_masks_contradict_its_scores_is_not_published(pradot, kind, tmp_path, monkeypatch):
    monkeypatch.setattr(ExportMixin, f"to_{kind}", blinded(getattr(ExportMixin, f"to_{kind}")))
    with pytest.raises(ExportError, match=r"pixels of masks differ"):
        getattr(pradot, f"to_{kind}")(tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.usefixtures("one_graph")
@pytest.mark.parametrize("kind", ["onnx", "openvino"])
def test_a_graph_has_the_size_that_the_model_resizes_to(pradot, kind, tmp_path):
    path = getattr(pradot, f"to_{kind}")(tmp_path)
    assert report_of(path)["input_size"] == [64, 64]


@pytest.mark.parametrize("kind", ["onnx", "openvino"])
def test_a_graph_needs_a_size_where_the_model_does_not_resize(pradot, kind, tmp_path, monkeypatch):
    monkeypatch.setattr(type(pradot), "input_size", None)
    with pytest.raises(ValueError, match=r"pre-processor does not resize: give input_size="):
        getattr(pradot, f"to_{kind}")(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_batch_of_fixed_size(pradot, data, tmp_path):
    fixed = {"dynamic_axes": {}}
    path = pradot.to_openvino(
        tmp_path, input_size=SIZE, compression_type=CompressionType.INT8_PTQ, datamodule=data, onnx_kwargs=fixed
    )
    assert report_of(path)["batch_size"] == 1
    assert list(openvino.Core().read_model(path).input(0).shape) == [1, 3, *SIZE]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"compression_type": CompressionType.INT8_PTQ}, "INT8_PTQ is calibrated on validation images, got no data"),
        ({"compression_type": CompressionType.INT8_ACQ}, "INT8_ACQ is calibrated on validation images, got no data"),
        (
            {"compression_type": CompressionType.INT8_ACQ, "datamodule": True, "max_drop": 1.5},
            re.escape("max_drop must be in [0, 1], not 1.5"),
        ),
        ({"compression_type": "int4"}, "'int4' is not a valid CompressionType"),
    ],
)
def test_arguments_of_a_compression_are_refused_before_the_export(
    pradot, data, arguments, message, tmp_path, monkeypatch
):
    monkeypatch.setattr(ExportMixin, "to_onnx", lambda *_, **__: pytest.fail("the export started"))
    if arguments.get("datamodule"):
        arguments = {**arguments, "datamodule": data}
    with pytest.raises(ValueError, match=message):
        pradot.to_openvino(tmp_path, **arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("one_graph")
def test_quantization_is_calibrated_on_images_as_the_file_gets_them(pradot, data, tmp_path, monkeypatch):
    seen = []

    def quantize(model, dataset, **settings):
        del settings
        seen.extend(dataset.get_inference_data())
        return model

    monkeypatch.setattr(nncf, "quantize", quantize)
    pradot.to_openvino(tmp_path, input_size=SIZE, compression_type=CompressionType.INT8_PTQ, datamodule=data)
    images, _ = validation_images(data)
    assert np.allclose(np.concatenate(seen), images)


@pytest.mark.usefixtures("one_graph")
def test_accuracy_control_measures_each_graph_afresh(pradot, data, tmp_path, monkeypatch):
    measured = []

    def quantize(model, calibration, validation, measure, **settings):
        del calibration, settings
        compiled = openvino.compile_model(model, "CPU")

        def blind(images):
            results = {port.any_name: values for port, values in compiled(images).items()}
            return {**results, "pred_label": np.zeros_like(results["pred_label"])}

        measured.extend(measure(graph, validation.get_data()) for graph in (compiled, blind, compiled))
        return model

    monkeypatch.setattr(nncf, "quantize_with_accuracy_control", quantize)
    pradot.to_openvino(
        tmp_path,
        input_size=SIZE,
        compression_type=CompressionType.INT8_ACQ,
        datamodule=data,
    )
    first, nothing, again = measured
    assert first == again > nothing == 0


def test_an_export_does_not_teach_an_online_model(data, tmp_path, monkeypatch):
    foct = fit("Foct", data, tmp_path)
    learned = []
    monkeypatch.setattr(foct.model, "_learn", lambda *arguments: learned.append(arguments))
    # The host runs the model on a black image first.
    monkeypatch.setattr(torch.onnx, "export", lambda **_: (_ for _ in ()).throw(InterruptedError))
    with pytest.raises(InterruptedError):
        foct.to_onnx(tmp_path, input_size=SIZE)
    assert not learned
    assert not foct.model.is_frozen
    assert not list(tmp_path.rglob("*.onnx"))
