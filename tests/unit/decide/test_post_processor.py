"""The post-processor with a promised rate of false alarms."""

import logging
import pickle
from types import SimpleNamespace

import numpy as np
import openvino
import pytest
import torch
from anomalib.data import Folder, ImageBatch, InferenceBatch
from anomalib.engine import Engine
from anomalib.models import Padim
from anomalib.post_processing import PostProcessor
from PIL import Image
from torchmetrics.functional.classification import binary_auroc

from anomalib_ot.decide import ConformalPostProcessor, ConformalScale
from anomalib_ot.features.extraction import FLOAT32
from anomalib_ot.host.calibration import FOLDS, HELD_OUT, CalibrationScores
from anomalib_ot.host.scale import scale_of

GOOD = torch.arange(1.0, 100.0)


def calibrated(rate=0.05, **settings):
    """Calibrated on scores from 1 to 99, and maps up to twice as high."""
    processor = ConformalPostProcessor(rate, **settings)
    processor.calibrate(CalibrationScores(tuple(GOOD.tolist()), tuple((2 * GOOD).tolist()), HELD_OUT))
    return processor


def predictions(count=300, seed=0):
    """Scores and maps, of which some are contradictory: high scores of low maps and the reverse."""
    generator = torch.Generator().manual_seed(seed)
    scores = 130 * torch.rand(count, generator=generator)
    return InferenceBatch(pred_score=scores, anomaly_map=260 * torch.rand(count, 1, 3, 3, generator=generator))


def batch(scores, labels, maps=None, paths=None):
    maps = torch.as_tensor(scores)[:, None, None].expand(-1, 4, 4) if maps is None else maps
    return ImageBatch(
        image=torch.rand(len(scores), 3, 4, 4),
        gt_label=None if labels is None else torch.tensor(labels),
        pred_score=torch.as_tensor(scores),
        anomaly_map=maps,
        image_path=paths,
    )


def validated(processor, *batches, model=None):
    processor.on_validation_epoch_start(None, model)
    for each in batches:
        processor.on_validation_batch_end(None, model, each, each, 0)
    processor.on_validation_epoch_end(None, model)
    return processor


def test_good_images_alone_set_the_thresholds():
    scores = torch.rand(30)
    labels = [bool(index % 3) for index in range(30)]
    processor = validated(ConformalPostProcessor(0.2), batch(scores[:16], labels[:16]), batch(scores[16:], labels[16:]))
    good = scores[torch.tensor(labels).logical_not()]
    assert processor.image_calibration.sort().values.equal(good.sort().values)
    # Of ten good images and a new one, two may be above.
    assert processor.image_threshold == good.sort().values[-2]
    other = validated(ConformalPostProcessor(0.2), batch(good, [False] * 10))
    assert other.image_threshold == processor.image_threshold


def test_labels_are_not_needed():
    scores = torch.rand(8)
    assert validated(ConformalPostProcessor(0.2), batch(scores, None)).image_calibration.numel() == 8


def test_a_later_validation_replaces_the_thresholds():
    processor = validated(ConformalPostProcessor(0.2), batch(torch.rand(8), [False] * 8))
    validated(processor, batch(5 + torch.rand(6), [False] * 6))
    assert processor.image_calibration.numel() == 6
    assert processor.image_threshold > 5


def test_metrics_of_a_validation_tell_high_scores_apart():
    scores = torch.tensor([20.0, 30.0, 40.0, torch.inf])
    labels = [False, True, False, True]
    own = batch(scores, labels)
    validated(ConformalPostProcessor(), own)
    assert binary_auroc(own.pred_score, torch.tensor(labels)) == 0.75
    assert own.anomaly_map[:, 0, 0].equal(own.pred_score)
    # Small scores keep their digits.
    tiny = batch(torch.tensor([1e-8, 2e-8]), [False, True])
    validated(ConformalPostProcessor(), tiny)
    assert tiny.pred_score[0] < tiny.pred_score[1]


def test_an_image_that_a_sampler_repeats_counts_once():
    scores = torch.tensor([0.1, 0.2, 0.3, 0.1])
    processor = validated(ConformalPostProcessor(0.3), batch(scores, [False] * 4, paths=["a", "b", "c", "a"]))
    assert processor.image_calibration.numel() == 3


def test_scores_that_the_model_provides_are_used_instead():
    own = CalibrationScores((1.0, 2.0, 3.0), (2.0, 4.0, 6.0), FOLDS)
    model = SimpleNamespace(calibration_scores=own)
    processor = validated(ConformalPostProcessor(0.3), batch(torch.rand(3), [False] * 3), model=model)
    assert processor.image_calibration.tolist() == [1, 2, 3]
    # More images promise a lower rate.
    validated(processor, batch(torch.rand(4), [False] * 4), model=model)
    assert processor.image_calibration.numel() == 4
    model.calibration_scores = None
    validated(processor, batch(torch.rand(9), [False] * 9), model=model)
    assert processor.image_calibration.numel() == 9


@pytest.mark.parametrize("rate", [0.01, 0.05, 0.2])
@pytest.mark.parametrize("normalizes", [True, False])
def test_an_image_is_anomalous_if_and_only_if_its_mask_has_a_pixel(rate, normalizes):
    processor, raw = calibrated(rate, enable_normalization=normalizes), predictions()
    decided = processor(raw)
    assert decided.pred_label.equal(raw.pred_score > processor.image_threshold)
    assert decided.pred_mask.flatten(1).any(1).equal(decided.pred_label)
    above = raw.anomaly_map > processor.pixel_threshold
    both = decided.pred_label & above.flatten(1).any(1)
    assert decided.pred_mask[both].equal(above[both])
    lone = decided.pred_mask[decided.pred_label & ~above.flatten(1).any(1)]
    assert (lone.flatten(1).sum(1) == 1).all()


def test_a_batch_is_decided_as_the_graph_does():
    processor, raw = calibrated(), predictions()
    expected = processor(raw)
    given = ImageBatch(
        image=torch.rand(300, 3, 3, 3), pred_score=raw.pred_score.clone(), anomaly_map=raw.anomaly_map[:, 0].clone()
    )
    processor.post_process_batch(given)
    assert given.pred_score.equal(expected.pred_score)
    assert given.pred_label.equal(expected.pred_label)
    assert given.anomaly_map.equal(expected.anomaly_map[:, 0])
    assert given.pred_mask.squeeze().equal(expected.pred_mask[:, 0])


def test_shown_scores_are_those_of_the_scale_and_are_inverted():
    processor, raw = calibrated(), predictions()
    shown = processor(raw)
    model = SimpleNamespace(post_processor=processor)
    for level, values, given in (
        ("image", shown.pred_score, raw.pred_score),
        ("pixel", shown.anomaly_map, raw.anomaly_map),
    ):
        scale = scale_of(model, level)
        assert isinstance(scale, ConformalScale)
        torch.testing.assert_close(scale.shown(given), values)
        torch.testing.assert_close(scale.raw(values), given, rtol=1e-4, atol=1e-4)
        assert ((values > 0) & (values < 1)).all()
    assert (shown.pred_score > 0.5).equal(shown.pred_label)


def test_without_normalisation_the_raw_threshold_decides():
    processor = calibrated(enable_normalization=False)
    raw = predictions()
    decided = processor(raw)
    assert decided.pred_score.equal(raw.pred_score)
    assert decided.anomaly_map.equal(raw.anomaly_map)
    scale = scale_of(SimpleNamespace(post_processor=processor), "image")
    assert scale.is_raw
    assert scale.threshold == scale.raw_threshold == 95


def test_without_thresholding_there_are_scores_alone():
    processor = calibrated(enable_thresholding=False)
    decided = processor(predictions())
    assert decided.pred_label is None
    assert decided.pred_mask is None
    assert scale_of(SimpleNamespace(post_processor=processor), "image").threshold is None
    assert decided.pred_score.equal(calibrated()(predictions()).pred_score)


def test_before_a_validation_raw_scores_are_shown_without_verdicts():
    processor, raw = ConformalPostProcessor(), predictions()
    decided = processor(raw)
    assert decided.pred_score.equal(raw.pred_score)
    # The metrics of a test need labels.
    assert not decided.pred_label.any()
    assert not decided.pred_mask.any()
    assert scale_of(SimpleNamespace(post_processor=processor), "image").threshold is None
    assert processor.p_values(raw.pred_score) is None
    assert processor.decision("Padim") is None


def test_maps_alone_are_scored_by_their_maximum():
    processor = calibrated()
    maps = predictions().anomaly_map
    assert processor(InferenceBatch(anomaly_map=maps)).pred_score.equal(
        processor(InferenceBatch(anomaly_map=maps, pred_score=maps.amax((-3, -2, -1)))).pred_score[:, None]
    )
    with pytest.raises(ValueError, match="must have a pred_score, an anomaly_map or both"):
        processor(InferenceBatch())


def test_scores_alone_have_labels_without_masks():
    processor = validated(
        ConformalPostProcessor(0.3), ImageBatch(image=torch.rand(5, 3, 4, 4), pred_score=torch.arange(5.0))
    )
    decided = processor(InferenceBatch(pred_score=torch.tensor([0.0, 9.0])))
    assert decided.pred_label.tolist() == [False, True]
    assert decided.pred_mask is None


@pytest.mark.parametrize("name", ["image_sensitivity", "pixel_sensitivity"])
def test_a_sensitivity_is_refused_as_it_would_move_the_rate(name):
    message = rf"{name} must be 0\.5, not 0\.4: .*Set false_alarm_rate instead"
    with pytest.raises(ValueError, match=message):
        ConformalPostProcessor(**{name: 0.4})
    with pytest.raises(ValueError, match=message):
        setattr(ConformalPostProcessor(), name, 0.4)
    assert getattr(ConformalPostProcessor(**{name: 0.5}), name) == 0.5


@pytest.mark.parametrize("rate", [0, 1, -1, 1.5])
def test_a_rate_out_of_its_range_is_refused(rate):
    with pytest.raises(ValueError, match="false_alarm_rate must be between 0 and 1"):
        ConformalPostProcessor(rate)
    with pytest.raises(ValueError, match="false_alarm_rate must be between 0 and 1"):
        calibrated().false_alarm_rate = rate


def test_a_rate_that_is_set_later_moves_the_thresholds():
    processor = calibrated(0.05)
    assert (processor.image_threshold, processor.pixel_threshold) == (95, 190)
    processor.false_alarm_rate = 0.2
    assert (processor.image_threshold, processor.pixel_threshold) == (80, 160)


def test_a_rate_that_few_images_do_not_support_is_reported(caplog):
    processor = validated(ConformalPostProcessor(0.01), batch(torch.rand(10), [False] * 10))
    assert processor.image_threshold == processor.image_calibration.max()
    assert "10 good images support no rate below 0.091" in caplog.text


@pytest.mark.parametrize(
    ("scores", "reason"),
    [
        ([0.3], "a threshold needs the scores of at least 2 good images, got 1"),
        ([0.3, 0.3, 0.3], "all 3 scores of good images are 0.3"),
        ([0.3, float("nan"), 0.1], "1 of 3 scores of good images are NaN"),
    ],
)
def test_scores_that_cannot_calibrate_cost_the_threshold_and_not_the_training(scores, reason, caplog):
    processor = validated(ConformalPostProcessor(), batch(torch.tensor(scores), [False] * len(scores)))
    assert f"There is no image threshold, from the image scores: {reason}" in caplog.text
    assert not processor.is_calibrated("image")
    assert validated(processor, batch(torch.rand(1), [True])).p_values(torch.rand(2)) is None


@pytest.mark.parametrize("normalizes", [True, False])
def test_an_earlier_threshold_decides_no_more_after_a_calibration_that_failed(normalizes):
    processor = validated(calibrated(enable_normalization=normalizes), batch(torch.rand(1), [False]))
    decided = processor(predictions())
    assert not decided.pred_label.any()
    assert not decided.pred_mask.any()
    assert processor.image_threshold.isnan()
    assert processor.pixel_threshold.isnan()


def test_a_state_dict_of_any_number_of_images_is_loaded_and_the_own_rate_stays():
    state = calibrated(0.05).state_dict()
    fresh, other = (
        ConformalPostProcessor(0.2),
        validated(ConformalPostProcessor(0.1), batch(torch.rand(9), [False] * 9)),
    )
    for processor, threshold in ((fresh, 80), (other, 90)):
        processor.load_state_dict(state)
        assert processor.image_threshold == threshold
        assert processor(predictions()).pred_score.equal(
            calibrated(processor.false_alarm_rate)(predictions()).pred_score
        )
    assert calibrated(0.05).checkpoint_config()["false_alarm_rate"] == 0.05


def test_it_is_loaded_after_a_validation_in_inference_mode():
    processor = ConformalPostProcessor()
    with torch.inference_mode():
        validated(processor, batch(torch.rand(9), [False] * 9))
    processor.load_state_dict(calibrated().state_dict())
    assert processor.image_calibration.numel() == 99


def test_it_is_pickled():
    raw = predictions()
    assert pickle.loads(pickle.dumps(calibrated()))(raw).pred_mask.equal(calibrated()(raw).pred_mask)


class Shown(torch.nn.Module):
    """A graph of the post-processor alone."""

    def __init__(self, post_processor):
        super().__init__()
        self.post_processor = post_processor

    def forward(self, scores, maps):
        return self.post_processor(InferenceBatch(pred_score=scores, anomaly_map=maps))


def with_values_that_are_not_finite(raw):
    """Scores and maps of which one is infinite, one is minus infinity, and one is NaN."""
    for index, value in enumerate((float("inf"), -float("inf"), float("nan"))):
        raw.pred_score[index] = raw.anomaly_map[index, 0, 1, 1] = value
    return raw


@pytest.mark.parametrize("normalizes", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_infinite_and_nan_scores_are_anomalous(normalizes, dtype):
    raw = with_values_that_are_not_finite(predictions(5))
    decided = calibrated(enable_normalization=normalizes).to(dtype)(
        InferenceBatch(pred_score=raw.pred_score.to(dtype), anomaly_map=raw.anomaly_map.to(dtype))
    )
    assert decided.pred_label[:3].tolist() == [True, False, True]
    assert decided.pred_mask.flatten(1).any(1).equal(decided.pred_label)
    assert decided.pred_mask[:3, 0, 1, 1].tolist() == [True, False, True]
    # One NaN does not mark the whole image.
    assert decided.pred_mask[2].sum() < 9
    if normalizes:
        assert decided.pred_score[:3].tolist() == decided.anomaly_map[:3, 0, 1, 1].tolist() == [1, 0, 1]


def test_half_precision_does_not_overflow():
    processor = calibrated().half()
    processor._image_unit.fill_(1e-3)
    shown = processor(InferenceBatch(pred_score=torch.tensor([-6e4, 6e4]).half()))
    assert shown.pred_score.tolist() == [0, 1]
    assert shown.pred_label.tolist() == [False, True]


@pytest.mark.parametrize("normalizes", [True, False])
def test_the_graph_decides_as_torch_does(normalizes, tmp_path):
    raw = with_values_that_are_not_finite(predictions(7))
    processor = calibrated(enable_normalization=normalizes).eval()
    names = ["pred_score", "pred_label", "anomaly_map", "pred_mask"]
    batch_axis = {0: torch.export.Dim("batch", min=1, max=99)}
    torch.onnx.export(
        Shown(processor).eval(),
        (raw.pred_score, raw.anomaly_map),
        str(tmp_path / "model.onnx"),
        opset_version=18,
        dynamo=True,
        output_names=names,
        dynamic_shapes=(batch_axis, batch_axis),
    )
    compiled = openvino.compile_model(str(tmp_path / "model.onnx"), "CPU", FLOAT32)
    for count in (7, 3):
        given = InferenceBatch(pred_score=raw.pred_score[:count], anomaly_map=raw.anomaly_map[:count])
        outputs = compiled([given.pred_score.numpy(), given.anomaly_map.numpy()])
        expected = processor(given)
        for name in names:
            np.testing.assert_allclose(outputs[name], getattr(expected, name).numpy(), rtol=1e-5, atol=1e-7)


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    """Fourteen good images, and bad ones with a white patch."""
    root = tmp_path_factory.mktemp("squares")
    generator = np.random.default_rng(0)
    for name, count in (("good", 20), ("good_test", 14), ("bad", 4)):
        (root / name).mkdir()
        for index in range(count):
            pixels = generator.integers(90, 110, (64, 64, 3), dtype=np.uint8)
            if name == "bad":
                pixels[20:50, 20:50] = 255
            Image.fromarray(pixels).save(root / name / f"{index}.png")
    folders = {"normal_dir": "good", "abnormal_dir": "bad", "normal_test_dir": "good_test"}
    return Folder("squares", **folders, root=root, num_workers=0, val_split_mode="same_as_test", seed=0)


def test_a_model_of_anomalib_uses_it_on_request(squares, tmp_path):
    def padim(**given):
        return Padim("resnet18", ["layer1", "layer2"], pre_trained=False, evaluator=False, visualizer=False, **given)

    torch.manual_seed(0)
    engine = Engine(default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_progress_bar=False)
    model = padim(post_processor=ConformalPostProcessor(0.1))
    engine.fit(model, datamodule=squares)
    processor = model.post_processor
    assert processor.image_calibration.numel() == 14
    assert not isinstance(PostProcessor(), type(processor))
    path = engine.trainer.checkpoint_callback.best_model_path
    loaded = padim(post_processor=ConformalPostProcessor())
    batches = engine.predict(loaded, datamodule=squares, ckpt_path=path)
    assert loaded.post_processor.false_alarm_rate == 0.1
    assert loaded.post_processor.image_threshold == processor.image_threshold
    flagged = {path.rsplit("/", 2)[-2]: 0 for each in batches for path in each.image_path}
    for each in batches:
        for path, label in zip(each.image_path, each.pred_label, strict=True):
            flagged[path.rsplit("/", 2)[-2]] += bool(label)
    # Fourteen images support a rate of 1 in 15: no calibration image is above the highest.
    assert flagged == {"bad": 4, "good_test": 0}
    exported = loaded.to_torch(tmp_path)
    with torch.inference_mode():
        image = torch.rand(1, 3, 64, 64)
        there = torch.load(exported, weights_only=False)["model"].eval()(image)
        assert there.pred_score.equal(loaded.eval()(image).pred_score)


def test_the_threshold_is_logged_with_its_source(caplog):
    with caplog.at_level(logging.INFO, "anomalib_ot"):
        calibrated()
    assert "a raw score of 95 that is shown as 0.5, follows from the scores of 99 good images that were held out" in (
        caplog.text
    )
