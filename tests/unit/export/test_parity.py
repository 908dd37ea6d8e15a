from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from anomalib.data import ImageItem, InferenceBatch
from anomalib.post_processing import PostProcessor
from torch import nn
from torch.nn import functional as F  # noqa: N812

from anomalib_ot.decide import ConformalPostProcessor
from anomalib_ot.export.graphs import GraphRunner
from anomalib_ot.export.labels import LabelChanges, Labels
from anomalib_ot.export.normalization import Normalization, Scores
from anomalib_ot.export.parity import compare
from anomalib_ot.export.tolerance import SameOrder, SameValues
from anomalib_ot.export.trial_images import TrialImages, synthetic_images
from anomalib_ot.features.extraction import FLOAT32
from anomalib_ot.host.calibration import CalibrationScores


class Brightness(nn.Module):
    """Its map is the first channel; without resizing and normalisation."""

    device = torch.device("cpu")
    pre_processor = None
    post_processor = None

    def model(self, images):
        maps = images[:, :1]
        return InferenceBatch(anomaly_map=maps, pred_score=maps.amax((-2, -1)).flatten())


def labelled(count=8):
    """Images with a bright patch in every second, over noise."""
    noise = torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(0)) / 2
    mask = torch.zeros(16, 16)
    mask[:8, :8] = 1
    items = [
        ImageItem(
            image=(image + mask * (index % 2)).clamp(0, 1), gt_label=torch.tensor(index % 2), gt_mask=mask * (index % 2)
        )
        for index, image in enumerate(noise)
    ]
    return TrialImages("patches", (16, 16), items)


def run(change):
    """An exported model, whose maps a function changes."""

    def exported(images):
        maps = change(images[:, :1])
        return InferenceBatch(anomaly_map=maps, pred_score=maps.amax((-2, -1)).flatten())

    return exported


def test_differences_are_shares_of_the_range_of_torchs_maps():
    reference, measured = compare(
        Brightness(), {"same": run(lambda maps: maps), "off": run(lambda maps: maps + 0.25)}, labelled(), None
    )
    images = labelled().read(range(8)).images[:, 0]
    assert measured["same"]["map_difference"] == 0
    assert measured["off"]["map_difference"] == pytest.approx(0.25 / float(images.max() - images.min()), rel=1e-4)
    assert measured["off"]["score_difference"] == pytest.approx(measured["off"]["map_difference"], rel=1e-4)
    assert reference["image_AUROC"] == measured["off"]["image_AUROC"] == 1
    assert reference["pixel_AUROC"] > 0.9


def test_maps_may_be_smaller_than_the_images_and_their_masks(monkeypatch):
    def halved(images):
        return run(lambda maps: maps)(F.avg_pool2d(images, 2))

    monkeypatch.setattr(Brightness, "model", lambda _, images: halved(images))
    reference, measured = compare(Brightness(), {"same": halved}, labelled(), None)
    assert reference["pixel_AUROC"] == measured["same"]["pixel_AUROC"] > 0.9


def test_maps_that_are_flat_on_the_images_are_compared_by_the_range_in_validation(monkeypatch):
    post_processor = PostProcessor()
    post_processor.pixel_min, post_processor.pixel_max = torch.tensor(0.0), torch.tensor(4.0)
    post_processor._pixel_threshold = torch.tensor(2.0)
    monkeypatch.setattr(Brightness, "post_processor", post_processor)
    scale = Normalization(post_processor)

    def exported(images):
        scores = scale.apply(Scores(images[:, 0] + 0.25, images[:, 0].amax((-2, -1)) + 0.25))
        return InferenceBatch(anomaly_map=scores.maps[:, None], pred_score=scores.scores)

    _, measured = compare(Brightness(), {"off": exported}, labelled(), None)
    assert measured["off"]["map_difference"] == pytest.approx(0.25 / 4, rel=1e-4)


def test_auroc_of_a_reversed_map_falls():
    reference, measured = compare(Brightness(), {"reversed": run(lambda maps: -maps)}, labelled(), None)
    assert measured["reversed"]["pixel_AUROC"] == pytest.approx(1 - reference["pixel_AUROC"], abs=1e-6)
    assert measured["reversed"]["rank_correlation"] == pytest.approx(-1)
    assert "pixel AUROC falls by" in SameOrder().broken_by(measured["reversed"], reference)[-1]


def test_a_batch_of_fixed_size_is_filled_and_what_fills_it_does_not_count():
    sizes = []

    def exported(images):
        sizes.append(len(images))
        return run(lambda maps: maps)(images)

    _, measured = compare(Brightness(), {"fixed": exported}, labelled(), 3)
    assert sizes == [3, 3, 3]
    assert measured["fixed"]["map_difference"] == 0
    assert measured["fixed"]["image_AUROC"] == 1


class Counting(list):
    """Images that count their reads."""

    reads = 0

    def __getitem__(self, index):
        self.reads += 1
        return super().__getitem__(index)


def test_each_image_is_read_once():
    items = Counting(labelled().items)
    images = TrialImages("counted", (16, 16), items)
    reference, _ = compare(Brightness(), {name: run(lambda maps: maps) for name in ("float32", "default")}, images, 3)
    assert items.reads == len(items)
    assert reference["pixel_AUROC"] > 0.9


def test_without_labels_there_is_no_auroc_and_ranks_count():
    images = synthetic_images((16, 16))
    reference, measured = compare(Brightness(), {"noisy": run(torch.rand_like)}, images, None)
    assert reference == {"image_AUROC": None, "pixel_AUROC": None}
    assert "rank correlation" in SameOrder().broken_by(measured["noisy"], reference)[0]


@pytest.mark.parametrize("difference", [2e-3, float("nan")])
def test_same_values_refuses_what_is_too_far_or_no_number(difference):
    measured = {"map_difference": difference, "score_difference": 0.0}
    assert len(SameValues(1e-3).broken_by(measured, {})) == 1
    assert not SameValues(1e-3).broken_by({"map_difference": 1e-4, "score_difference": 0.0}, {})


def test_a_map_without_numbers_is_out_of_tolerance():
    images = synthetic_images((16, 16))
    reference, measured = compare(Brightness(), {"broken": run(lambda maps: maps * float("nan"))}, images, None)
    assert SameValues(1e-3).broken_by(measured["broken"], reference)
    assert SameOrder().broken_by(measured["broken"], reference)


def test_normalization_is_the_hosts_without_clipping():
    post_processor = PostProcessor()
    for field, values in {"image": (0.2, 4.2, 1.2), "pixel": (0.1, 2.1, 0.6)}.items():
        for name, value in zip(("min", "max", "threshold"), values, strict=True):
            setattr(
                post_processor, f"_{field}_{name}" if name == "threshold" else f"{field}_{name}", torch.tensor(value)
            )
    raw = run(lambda maps: maps * 1.2)(synthetic_images((16, 16)).read(range(6)).images)
    normalized = post_processor(raw)
    ours = Normalization(post_processor)
    assert ours.clipped == ["anomaly_map", "pred_score"]
    there = ours.apply(Scores.of(raw))
    assert torch.allclose(there.maps.clamp(0, 1), normalized.anomaly_map[:, 0].double(), atol=1e-6)
    assert torch.allclose(there.scores.clamp(0, 1), normalized.pred_score.double(), atol=1e-6)
    assert torch.allclose(ours.undo(there).maps, raw.anomaly_map[:, 0].double(), atol=1e-6)
    assert Normalization(None).clipped == []


def decided(change=lambda batch: batch, shift=0.0):
    """An exported model with thresholds in torch's post-processor, whose labels and masks a function changes."""
    post_processor = fitted((0.0, 1.0, 0.7), (0.0, 1.0, 0.7))
    scale = Normalization(post_processor)

    def exported(images):
        raw = run(lambda maps: maps + shift)(images)
        scores = scale.apply(Scores.of(raw))
        return change(post_processor(raw))._replace(anomaly_map=scores.maps, pred_score=scores.scores)

    return post_processor, exported


@pytest.mark.parametrize(
    ("change", "broken"),
    [
        (lambda batch: batch._replace(pred_label=~batch.pred_label), "labels of 8 images differ"),
        (lambda batch: batch._replace(pred_label=None), "labels of 8 images differ, up to inf"),
        (lambda batch: batch._replace(pred_mask=batch.pred_mask & False), "256 pixels of masks differ"),
    ],
    ids=["labels", "no labels", "masks"],
)
@pytest.mark.parametrize("tolerance", [SameValues(1e-3), SameOrder()], ids=["values", "order"])
def test_labels_and_masks_that_contradict_the_scores_are_refused(change, broken, tolerance, monkeypatch):
    post_processor, tampered = decided(change)
    monkeypatch.setattr(Brightness, "post_processor", post_processor)
    runners = {"right": decided()[1], "tampered": tampered}
    reference, measured = compare(Brightness(), runners, labelled(), 3)
    assert not tolerance.broken_by(measured["right"], reference)
    assert (measured["right"]["changed_labels"], measured["right"]["changed_pixels"]) == (0, 0)
    (reason,) = tolerance.broken_by(measured["tampered"], reference)
    assert broken in reason


def test_rounding_at_the_threshold_changes_labels_and_masks_without_fault(monkeypatch):
    post_processor, exported = decided(shift=2e-4)
    # Four images of noise have their highest pixel at the threshold, and others have pixels near it.
    images = labelled()
    for item in images.items[::2]:
        item.image[0] *= (0.7 - 1e-4) / item.image[0].max()
    monkeypatch.setattr(Brightness, "post_processor", post_processor)
    reference, measured = compare(Brightness(), {"rounded": exported}, images, None)
    assert measured["rounded"]["changed_labels"] == 4
    assert measured["rounded"]["changed_pixels"] >= 4
    assert measured["rounded"]["label_difference"] == pytest.approx(1e-4, rel=0.01)
    assert not SameValues(1e-3).broken_by(measured["rounded"], reference)
    assert not SameOrder().broken_by(measured["rounded"], reference)
    assert len(SameValues(1e-5).broken_by(measured["rounded"], reference)) == 4


def test_another_highest_pixel_of_an_image_below_the_pixel_threshold_is_rounding():
    post_processor = ConformalPostProcessor(false_alarm_rate=0.2)
    post_processor.calibrate(CalibrationScores((0.1, 0.2, 0.3, 0.4), (2.0, 3.0, 4.0, 5.0), "held_out"))
    changes, gone = (LabelChanges(SimpleNamespace(post_processor=post_processor)) for _ in range(2))
    maps = torch.tensor([[[[1.0, 0.999, 0.5]]], [[[0.1, 0.1, 0.1]]]])
    scores = torch.tensor([0.9, 0.1])
    expected = Labels.of(post_processor(InferenceBatch(pred_score=scores, anomaly_map=maps)))
    assert expected.masks.tolist() == [[[True, False, False]], [[False, False, False]]]
    swapped = replace(expected, masks=expected.masks[:, :, [1, 0, 2]])
    changes.add(swapped, expected, scores, maps[:, 0])
    assert changes.measured(1.0) == {
        "changed_labels": 0,
        "label_difference": 0.0,
        "changed_pixels": 2,
        "mask_difference": pytest.approx(0.0005, rel=1e-3),
    }
    gone.add(replace(expected, masks=expected.masks & False), expected, scores, maps[:, 0])
    assert gone.measured(1.0)["mask_difference"] == 4


@pytest.mark.parametrize("post_processor", [PostProcessor(), PostProcessor(enable_thresholding=False), None])
def test_without_a_threshold_there_are_no_labels_to_compare(post_processor, monkeypatch):
    monkeypatch.setattr(Brightness, "post_processor", post_processor)
    _, measured = compare(Brightness(), {"same": run(lambda maps: maps)}, labelled(), None)
    assert measured["same"]["changed_labels"] == measured["same"]["changed_pixels"] == 0


NAN = float("nan")


def fitted(pixel, image):
    """A post-processor with lowest and highest score of its validation, and threshold."""
    post_processor = PostProcessor()
    for field, (low, high, threshold) in {"pixel": pixel, "image": image}.items():
        for name, value in {f"{field}_min": low, f"{field}_max": high, f"_{field}_threshold": threshold}.items():
            setattr(post_processor, name, torch.tensor(value))
    return post_processor


class Clipped(nn.Module):
    """A graph that normalises what it is given, and so clips it."""

    def __init__(self, post_processor):
        super().__init__()
        self.post_processor = post_processor

    def forward(self, images):
        maps = images[:, :1] * 3 - 1
        return self.post_processor(InferenceBatch(anomaly_map=maps, pred_score=maps.amax((-2, -1)).flatten()))


# Scores that happen to run from 0 to 1 about a half, and those of a single image.
@pytest.mark.parametrize(
    "post_processor",
    [fitted((0.0, 1.0, 0.5), (0.4, 0.4, 0.4)), fitted((0.4, 0.4, NAN), (0.0, 1.0, 0.5))],
    ids=["scores of one value", "maps of one value"],
)
def test_a_graph_is_compared_before_it_clips_whatever_its_range(post_processor, tmp_path):
    images = synthetic_images((16, 16)).read(range(6)).images
    outputs = ["pred_score", "pred_label", "anomaly_map", "pred_mask"]
    path = tmp_path / "model.onnx"
    torch.onnx.export(
        Clipped(post_processor).eval(), (images,), str(path), opset_version=18, dynamo=True, output_names=outputs
    )
    scale = Normalization(post_processor)
    assert scale.clipped == ["anomaly_map", "pred_score"]
    raw = scale.undo(Scores.of(GraphRunner(path, FLOAT32, scale.clipped)(images)))
    assert torch.allclose(raw.maps, images[:, 0].double() * 3 - 1, atol=1e-5)
    assert torch.allclose(raw.scores, raw.maps.amax((-2, -1)), atol=1e-5)


def test_a_range_that_is_not_known_is_not_normalised():
    scores = Scores(torch.rand(2, 4, 4) * 5, torch.rand(2) * 5)
    for scale in (Normalization(None), Normalization(fitted((NAN,) * 3, (NAN,) * 3))):
        assert scale.clipped == []
        assert scale.apply(scores) == scale.undo(scores) == scores
