"""A promised rate of false alarms through the stock ``anomalib`` command, for a model of ours and one of anomalib."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from anomalib.deploy import OpenVINOInferencer
from anomalib.models import Patchcore

from anomalib_ot import Assembly
from anomalib_ot.cli import main
from anomalib_ot.data import read_picture
from anomalib_ot.decide import ConformalPostProcessor, Decision

pytestmark = pytest.mark.slow
SIZE = (128, 128)
OURS = ["--model.backbone", "BACKBONE", "--model.layers", "[blocks.4]", "--model.image_size", "[128, 128]"]
MODELS = {
    "WtFlow": [*OURS, "--model.width", "16", "--model.training_steps", "4", "--model.post_processor"],
    "Patchcore": [
        *("--model.backbone", "resnet18", "--model.layers", "[layer2]", "--model.pre_trained", "false"),
        *("--model.coreset_sampling_ratio", "0.005", "--model.post_processor"),
    ],
}
POST_PROCESSOR = ["ConformalPostProcessor", "--model.post_processor.false_alarm_rate"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("decide")
    Assembly(folder / "data", n_train=20, n_validation=12, n_test=6).prepare_data()
    return folder


def export(name, checkpoint, model, folder, forked):
    """Path of the exported model, which decides at a rate of 20 %."""
    if name == "WtFlow":
        forked(folder, "export", *model, "0.2", "--ckpt_path", checkpoint, "--export_type", "openvino")
        return checkpoint.parents[1] / "openvino/model.xml"
    # The command loads the models of anomalib without the post-processor that is given.
    loaded = Patchcore.load_from_checkpoint(checkpoint, post_processor=ConformalPostProcessor(), evaluator=False)
    loaded.post_processor.false_alarm_rate = 0.2
    return loaded.to_openvino(folder / "exported", input_size=SIZE, onnx_kwargs={"dynamic_axes": {}})


@pytest.mark.parametrize("name", MODELS)
def test_train_predict_and_export_decide_alike(name, folder, backbone, forked, monkeypatch):
    monkeypatch.chdir(folder)  # the inferencer leaves its cache in the working folder
    model = ["--model", name, *(backbone if each == "BACKBONE" else each for each in MODELS[name]), *POST_PROCESSOR]
    sizes = ["--data.n_train", "20", "--data.n_validation", "12", "--data.n_test", "6"]
    data = ["--data", "Assembly", "--data.root", folder / "data", *sizes, "--data.num_workers", "0"]
    output = forked(folder, "train", *model, "0.1", *data)
    assert "ConformalPostProcessor" in output
    run = folder / f"results/{name}/Assembly/tray/v0"
    checkpoint = next(run.glob("weights/lightning/model.ckpt"))
    arguments = ["--ckpt_path", checkpoint]
    forked(folder, "predict", *model, "0.2", *arguments, "--data", folder / "data/tray/test")
    exported = export(name, checkpoint, model, folder, forked)
    pictures = sorted((folder / "data/tray/test").glob("*/*.png"))
    runner = OpenVINOInferencer(exported, device="CPU", config={"INFERENCE_PRECISION_HINT": "f32"})
    found = [runner.predict(read_picture(path, size=SIZE)) for path in pictures]
    labels = np.array([bool(np.squeeze(each.pred_label)) for each in found])
    scores = np.array([float(np.squeeze(each.pred_score)) for each in found])
    masks = np.array([bool(np.squeeze(each.pred_mask).any()) for each in found])
    assert np.array_equal(labels, scores > 0.5)
    assert np.array_equal(labels, masks)
    if name == "WtFlow":
        decision = Decision.load(exported)
        assert len(decision.image.scores) == 20
        raw = decision.raw_scores(scores)
        assert np.array_equal(decision.is_anomalous(raw), labels)
        with (run / "images/predictions.csv").open(newline="") as file:
            rows = {row["path"]: row for row in csv.DictReader(file)}
        own = [rows[str(path.resolve())] for path in pictures]
        assert [float(row["score_raw"]) for row in own] == pytest.approx(raw.tolist(), rel=1e-3)
        assert [row["label"] == "anomalous" for row in own] == labels.tolist()
        assert [float(row["p_value"]) for row in own] == pytest.approx(decision.p_values(raw).tolist())
        explain = ["explain", *map(str, arguments), "--data", "data/tray/test", "--views", "[evidence]"]
        main([*explain, "--formats", "[png]", "--false_alarm_rate", "0.2", "--pictures", str(pictures[0].parent)])
        explained = [json.loads(each.read_text()) for each in folder.glob("results/explain/**/evidence.json")]
        assert {each["path"] for each in explained} == {str(each) for each in pictures[0].parent.iterdir()}
        for each in explained:
            assert f"{each['p_value']:.6g}" == rows[str(Path(each["path"]).resolve())]["p_value"]
