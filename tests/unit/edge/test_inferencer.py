"""Scores and verdicts without torch: those of anomalib's inferencer, for images of any kind."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import openvino
import pytest
import torch
from anomalib.deploy import OpenVINOInferencer
from openvino import opset13 as operations
from PIL import Image

from anomalib_ot.data import read_picture
from anomalib_ot.decide import Decision
from anomalib_ot.edge import EdgeInferencer
from anomalib_ot.edge.inputs import pixels_of, resized
from anomalib_ot.edge.predicting import predict
from anomalib_ot.images.reading import Reading, bits_of

SIZE = (64, 64)


@pytest.fixture(scope="module")
def inferencer(exported):
    return EdgeInferencer(exported)


@pytest.fixture(scope="module")
def of_host(exported, tmp_path_factory):
    """anomalib's inferencer, which leaves its cache in the working folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("cache"))
        return OpenVINOInferencer(exported / "model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})


def everything(images):
    return sorted(images.rglob("*.png"))


def test_all_outputs_are_those_of_anomalibs_inferencer(inferencer, of_host, images):
    theirs, ours = [], []
    for path in everything(images):
        pixels = resized(pixels_of(path), SIZE)
        theirs.append(of_host.predict(pixels))
        ours.append(inferencer.predict(pixels))
    for name in ("pred_score", "anomaly_map", "pred_label", "pred_mask"):
        expected = np.stack([np.squeeze(getattr(each, name)) for each in theirs]).astype(float)
        attribute = {"pred_score": "score", "pred_label": "is_anomalous", "pred_mask": "mask"}.get(name, name)
        found = np.stack([getattr(each, attribute) for each in ours]).astype(float)
        assert np.abs(found - expected).max() <= 1e-6 * np.ptp(expected), name
    assert {each.label for each in ours} == {"anomalous", "normal"}


def test_a_file_has_the_score_of_the_documented_recipe_in_torch(inferencer, of_host, images):
    expected = np.array(
        [of_host.predict(read_picture(each, size=SIZE)).pred_score.item() for each in everything(images)]
    )
    found = np.array([inferencer.predict(each).score for each in everything(images)])
    assert np.abs(found - expected).max() <= 1e-5 * np.ptp(expected)


def test_raw_scores_p_values_and_verdicts_are_those_of_the_calibration(inferencer, exported, images):
    decision = Decision.load(exported / "model.xml")
    for path in everything(images):
        prediction = inferencer.predict(path, rate=0.4)
        raw = decision.raw_scores(prediction.score)
        assert prediction.raw_score == raw
        assert prediction.p_value == decision.p_values(raw)
        assert prediction.is_anomalous == bool(decision.is_anomalous(raw, 0.4)) == (prediction.p_value <= 0.4)
        assert prediction.is_anomalous == (prediction.score > prediction.threshold) == prediction.mask.any()
    assert inferencer.predict(everything(images)[0]).threshold == pytest.approx(0.5)


def test_more_false_alarms_are_allowed_by_a_lower_threshold(inferencer, images):
    image = everything(images)[0]
    assert inferencer.predict(image, rate=0.5).threshold < inferencer.predict(image, rate=0.2).threshold


FORMS = {
    "path as text": str,
    "Pillow image": Image.open,
    "bytes": lambda path: np.asarray(Image.open(path)),
    "bytes and transparency": lambda path: np.asarray(Image.open(path).convert("RGBA")),
    "numbers": lambda path: np.asarray(Image.open(path)) / 255,
    "16 bits": lambda path: np.asarray(Image.open(path)).astype(np.uint16) * 257,
}


@pytest.mark.parametrize("form", FORMS)
def test_the_form_of_an_image_does_not_matter(inferencer, images, form):
    path = images / "bad" / "1.png"
    expected = inferencer.predict(path)
    assert inferencer.predict(FORMS[form](path)).score == pytest.approx(expected.score, abs=1e-6)


def rotated(path):
    notes = Image.Exif()
    notes[0x0112] = 6
    Image.fromarray(_COLOURS).save(path, exif=notes)


_COLOURS = np.random.default_rng(0).integers(0, 256, (12, 10, 3), np.uint8)
_WORDS = np.random.default_rng(0).integers(0, 65536, (12, 10)).astype(np.uint16)
KINDS = {
    "grey.png": lambda path: Image.fromarray(_COLOURS[..., 0]).save(path),
    "palette.png": lambda path: Image.fromarray(_COLOURS).quantize(16).save(path),
    "transparent.png": lambda path: Image.fromarray(np.dstack([_COLOURS, _COLOURS[..., 0]])).save(path),
    "cmyk.jpg": lambda path: Image.fromarray(_COLOURS).convert("CMYK").save(path),
    "rotated.jpg": rotated,
    "rotated.tiff": rotated,
    "words.png": lambda path: Image.fromarray(_WORDS).save(path),
    "numbers.tiff": lambda path: Image.fromarray(_WORDS.astype(np.float32) / 65535).save(path),
}


@pytest.mark.parametrize("value_range", [None, (0.0, 4095.0)])
@pytest.mark.parametrize("kind", KINDS)
def test_files_of_every_kind_have_the_pixels_that_torch_gets(kind, value_range, tmp_path):
    KINDS[kind](tmp_path / kind)
    expected = read_picture(tmp_path / kind, value_range).permute(1, 2, 0).numpy()
    assert np.array_equal(pixels_of(tmp_path / kind, value_range), expected)
    with Image.open(tmp_path / kind) as image:
        assert np.array_equal(pixels_of(image, value_range), expected)
    small = read_picture(tmp_path / kind, value_range, size=(5, 7)).permute(1, 2, 0).numpy()
    np.testing.assert_allclose(resized(pixels_of(tmp_path / kind, value_range), (5, 7)), small, atol=1e-5)


def test_colours_of_16_bits_need_opencv(tmp_path, monkeypatch):
    import cv2  # noqa: PLC0415

    path = tmp_path / "deep.png"
    cv2.imwrite(str(path), np.dstack([_WORDS] * 3))
    assert np.array_equal(pixels_of(path), read_picture(path).permute(1, 2, 0).numpy())
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ValueError, match=r"deep\.png at their full depth needs OpenCV, .*pip install opencv"):
        pixels_of(path)


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.zeros((4, 4, 2), np.uint8), r"shape \(4, 4, 2\)"),
        (np.zeros((3, 64, 64), np.float32), r"shape \(3, 64, 64\)"),
        (np.zeros((0, 4), np.uint8), r"shape \(0, 4\)"),
        (np.zeros((4, 4), np.int64), "type int64.* need value_range"),
        (np.zeros((4, 4), bool), "type bool"),
        (np.full((4, 4), 2.0), "numbers from 2 to 2"),
        (np.full((4, 4), np.nan), "numbers from nan"),
    ],
)
def test_an_array_that_is_no_image_is_refused(array, reason):
    with pytest.raises(ValueError, match=reason):
        pixels_of(array)


def test_integers_of_another_type_need_a_range():
    assert pixels_of(np.full((4, 4), 50, np.int64), (0, 100)).tolist() == np.full((4, 4, 3), 0.5).tolist()


def test_a_grey_image_of_12_bits_has_its_own_range(monkeypatch):
    image = Image.fromarray(np.full((4, 4), 4095, np.uint16))
    assert pixels_of(image).max() == pytest.approx(4095 / 65535)
    # Pillow reads such a TIFF as one of 16 bits, with this tag.
    monkeypatch.setattr(image, "tag_v2", {258: (12,)}, raising=False)
    assert bits_of(image) == 12
    assert pixels_of(image).max() == 1


def test_an_image_without_content_is_named(inferencer, images):
    assert inferencer.predict(np.full((80, 80, 3), 255, np.uint8)).blank == "white all over"
    assert inferencer.predict(images / "good" / "0.png").blank == ""


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n"])
def test_a_file_that_is_no_image_is_an_error_that_names_it(inferencer, tmp_path, content):
    (tmp_path / "bad.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.png"):
        inferencer.predict(tmp_path / "bad.png")


@pytest.fixture
def copied(exported, tmp_path):
    return Path(shutil.copytree(exported, tmp_path / "copied"))


def test_a_model_without_calibration_decides_by_its_own_threshold(inferencer, copied, images):
    (copied / "model.calibration.json").unlink()
    alone = EdgeInferencer(copied / "model.xml")
    for path in everything(images):
        with_it, without = inferencer.predict(path), alone.predict(path)
        assert (without.score, without.label) == (with_it.score, with_it.label)
        assert np.array_equal(without.mask, with_it.mask)
        assert (without.p_value, without.raw_score, without.threshold) == (None, None, None)
    with pytest.raises(ValueError, match=r"no model\.calibration\.json beside .*not at a rate of 0\.1"):
        alone.predict(images / "good" / "0.png", rate=0.1)


def save(folder, score, channels=3, height=None):
    """A graph with an output ``pred_score`` only, if ``score`` is its name."""
    images = operations.parameter([-1, channels, height or -1, height or -1], np.float32, name="input")
    mean = operations.reduce_mean(images, operations.constant([1, 2, 3]))
    mean.output(0).tensor.set_names({score})
    folder.mkdir()
    openvino.save_model(openvino.Model([mean], [images]), folder / "net.xml")
    return folder


def test_a_graph_that_resizes_gets_the_image_as_it_is_and_may_have_no_map(tmp_path):
    """As other models of anomalib are exported by default."""
    model = EdgeInferencer(save(tmp_path / "other", "pred_score"))
    prediction = model.predict(np.dstack([np.eye(6), np.eye(6), np.zeros((6, 6))]))
    assert model.image_size is None
    assert prediction.score == pytest.approx(1 / 9)
    assert (prediction.label, prediction.anomaly_map, prediction.mask) == ("", None, None)


def break_weights(folder):
    (folder / "model.bin").write_bytes(b"other weights")


def break_calibration(folder):
    (folder / "model.calibration.json").write_text("{}")


def take_graph(folder):
    (folder / "model.xml").unlink()


def take_weights(folder):
    (folder / "model.bin").unlink()
    (folder / "model.calibration.json").unlink()


@pytest.mark.parametrize(
    ("harm", "error", "reason"),
    [
        (break_weights, ValueError, r"calibration of another WtFlow: model\.bin is not"),
        (break_calibration, ValueError, "is not a calibration file"),
        (take_graph, FileNotFoundError, r"there is no model\.xml in"),
        (take_weights, ValueError, r"OpenVINO cannot run .*model\.xml on CPU"),
    ],
)
def test_a_model_with_a_missing_or_foreign_part_is_refused(copied, harm, error, reason):
    harm(copied)
    with pytest.raises(error, match=reason):
        EdgeInferencer(copied)


def test_a_folder_of_several_models_is_ambiguous_unless_one_is_model_xml(copied, exported, images):
    shutil.copy(copied / "model.xml", copied / "a.xml")
    assert EdgeInferencer(copied).path.name == "model.xml"
    (copied / "model.xml").rename(copied / "b.xml")
    with pytest.raises(ValueError, match=r"holds a\.xml, b\.xml; give the path of one"):
        EdgeInferencer(copied)
    with pytest.raises(ValueError, match=r"expected a model\.xml or model\.onnx"):
        EdgeInferencer(exported / "model.bin")
    with pytest.raises(FileNotFoundError, match="there is no model"):
        EdgeInferencer(images / "absent.xml")


@pytest.mark.parametrize(
    ("output", "channels", "reason"),
    [("score", 3, "returns score, expected pred_score"), ("pred_score", 1, "expected images")],
)
def test_a_graph_that_anomalib_did_not_export_is_refused(tmp_path, output, channels, reason):
    with pytest.raises(ValueError, match=reason):
        EdgeInferencer(save(tmp_path / "other", output, channels))


def test_a_rate_decides_without_a_mask_if_the_maps_have_no_calibration(exported, images):
    own = EdgeInferencer(exported)
    expected = own.predict(images / "bad" / "2.png", rate=0.5)
    own.decision = replace(own.decision, pixel=None)
    found = own.predict(images / "bad" / "2.png", rate=0.5)
    assert found.mask is None
    assert found.is_anomalous == expected.is_anomalous


def test_openvino_that_is_not_installed_is_an_error_that_says_how_to_install_it(exported, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ModuleNotFoundError, match="run: pip install openvino"):
        EdgeInferencer(exported)


ALONE = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {
            "anomalib", "cv2", "jinja2", "lightning", "matplotlib", "numba", "ot", "pandas", "psutil", "rich",
            "safetensors", "scipy", "skimage", "sklearn", "timm", "torch", "torchmetrics", "torchvision",
        }:
            raise ImportError(f"{name} is not on an edge device")

sys.meta_path.insert(0, Refuse())
"""


def test_a_prediction_needs_openvino_numpy_and_pillow_alone(exported, images, inferencer, tmp_path):
    script = (
        ALONE
        + f"""
from anomalib_ot.edge import EdgeInferencer
print(EdgeInferencer({str(exported)!r}).predict({str(images / "bad/0.png")!r}).score)
from anomalib_ot.cli import main
main(["predict", {str(exported)!r}, {str(images / "bad")!r}, "--output", {str(tmp_path / "out")!r}])
"""
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.splitlines()[0]) == inferencer.predict(images / "bad" / "0.png").score
    assert len(json.loads((tmp_path / "out" / "predictions.json").read_text())["predictions"]) == 3
    assert [*(tmp_path / "out" / "overlays").iterdir()]


def test_each_module_can_be_imported_alone():
    modules = ["edge", "edge.drawing", "edge.inferencer", "edge.predicting", "images.blank", "decide.decision"]
    script = ALONE + "".join(f"import anomalib_ot.{each}\n" for each in modules) + "print('openvino' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_files_of_many_bits_are_read_as_in_the_training(exported, images, tmp_path, caplog):
    values = np.asarray(Image.open(images / "bad" / "2.png").convert("L"))
    Image.fromarray(values).save(tmp_path / "byte.png")
    Image.fromarray(values.astype(np.uint16) * 16).save(tmp_path / "deep.png")
    model = shutil.copytree(exported, tmp_path / "model") / "model.xml"
    reading = Reading(is_full_range=True, value_range=(0, 4080), is_deep=True)
    replace(Decision.load(model), reading=reading).write(model)
    inferencer = EdgeInferencer(model)
    expected = inferencer.predict(tmp_path / "byte.png").score
    assert inferencer.predict(tmp_path / "deep.png").score == pytest.approx(expected, abs=1e-5)
    other = inferencer.predict(tmp_path / "deep.png", value_range=(0, 65535))
    assert abs(other.score - expected) > 1e-3
    (tmp_path / "line").mkdir()
    (tmp_path / "deep.png").rename(tmp_path / "line" / "deep.png")
    for given, score in ((None, expected), ((0.0, 65535.0), other.score)):
        caplog.clear()
        predict(model, tmp_path / "line", tmp_path / "out", value_range=given)
        (found,) = json.loads((tmp_path / "out/predictions.json").read_text())["predictions"]
        assert found["score"] == pytest.approx(score, abs=1e-5)
        said = "value_range reads images with more than 8 bits per channel with value_range [0, 65535], but the model"
        assert (said in caplog.text) == (given is not None)
    # Numbers in [0, 1] are what they are, in whatever form.
    pixels = pixels_of(tmp_path / "byte.png")
    for image in (pixels, torch.from_numpy(pixels), Image.fromarray(pixels[..., 0])):
        assert inferencer.predict(image).score == pytest.approx(expected, abs=1e-5)
    assert inferencer.predict(values.astype(np.uint16) * 16).score == pytest.approx(expected, abs=1e-5)
