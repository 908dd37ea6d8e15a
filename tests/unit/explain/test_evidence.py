import json

import numpy as np
import pytest
import torch
from anomalib.pre_processing import PreProcessor
from scipy import ndimage
from torchvision.transforms.v2 import CenterCrop, Compose, Normalize, Resize

from anomalib_ot.decide import ConformalPostProcessor
from anomalib_ot.explain.evidence import (
    NormalScores,
    conformal_p_value,
    evidence_of,
    image_scores,
)
from anomalib_ot.explain.evidence_figure import draw_evidence
from anomalib_ot.host.calibration import CalibrationScores
from anomalib_ot.models.foct import torch_model
from anomalib_ot.models.foct.cells import averaged

MODELS = [
    ("Foct", {}),
    ("Foct", {"measure": "nearest", "position_weight": 0.0}),
    ("Foct", {"query_steps": 2}),
    ("Pradot", {}),
    ("Pradot", {"whitened_channels": 0, "normalize_score": False}),
    ("WtFlow", {}),
    ("WtFlow", {"score": "mismatch", "top_share": 0.03}),
    ("WtFlow", {"score": "density"}),
    ("Duo", {}),
]


@pytest.mark.parametrize(("name", "arguments"), MODELS)
def test_contributions_add_up_to_map_and_score(fitted, pictures, name, arguments):
    model = fitted(name, **arguments)
    (picture,) = pictures(model)
    with torch.no_grad():
        expected = model.model(picture.prepared[None])
    evidence = evidence_of(model, picture)
    span = float(expected.anomaly_map.max() - expected.anomaly_map.min())
    assert span > 0
    torch.testing.assert_close(evidence.map, expected.anomaly_map[0, 0], rtol=0, atol=1e-5 * span)
    total = sum(part.map for part in evidence.contributions.values())
    torch.testing.assert_close(total, expected.anomaly_map[0, 0], rtol=0, atol=1e-5 * span)
    assert evidence.raw_score == pytest.approx(float(expected.pred_score), rel=1e-5)
    assert sum(part.value for part in evidence.contributions.values()) == pytest.approx(evidence.raw_score, rel=1e-5)
    assert sum(map(evidence.share, evidence.contributions)) == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("Foct", ["layer2", "layer3", "position", "detail"]),
        (
            "Pradot",
            [f"{layer}, {name}" for layer in ("layer2", "layer3") for name in ("alpha 0", "alpha 0.3", "deviation")],
        ),
        ("WtFlow", ["layer2", "layer3"]),
        (
            "Duo",
            [
                *(
                    f"Pradot, {layer}, {name}"
                    for layer in ("layer2", "layer3")
                    for name in ("alpha 0", "alpha 0.3", "deviation")
                ),
                "WtFlow, layer3",
            ],
        ),
    ],
)
def test_contributions_are_named_after_what_adds_them(fitted, pictures, name, parts):
    model = fitted(name)
    assert list(evidence_of(model, *pictures(model)).contributions) == parts


def test_a_layer_whose_features_agree_adds_nothing(fitted, pictures, monkeypatch):
    given = {"position_weight": 0.0, "detail_weight": 0.0, "foreground_ratio": 1.0, "background_ratio": 1.0}
    model = fitted("Foct", measure="nearest", **given)
    (picture,) = pictures(model)
    channels = model.model.feature_extractor.out_dims[0]
    with torch.no_grad():
        model.model.semantic.features[..., :channels] = 0
        centre = model.model.centre[:channels]

        def same(layers):
            features = averaged(layers)
            features[:, :channels] = centre[:, None, None]
            return features

        monkeypatch.setattr(torch_model, "averaged", same)
        parts = model.model.contributions(picture.prepared[None])
    assert float(parts["layer2"].abs().max()) < 1e-3 * float(parts["layer3"].max())


def test_evidence_teaches_an_online_model_nothing(fitted, pictures):
    model = fitted("Foct", online=True, query_steps=2)
    before = {name: value.clone() for name, value in model.model.state_dict().items()}
    evidence_of(model, *pictures(model))
    after = model.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_p_values_of_exchangeable_scores_are_uniform():
    scores = np.random.default_rng(0).permutation(50) / 7
    values = [conformal_p_value(score, np.delete(scores, index)) for index, score in enumerate(scores)]
    np.testing.assert_allclose(sorted(values), np.arange(1, 51) / 50)


def test_p_value_of_the_highest_score_is_the_smallest_possible():
    assert conformal_p_value(9.0, range(9)) == 0.1
    assert conformal_p_value(-1.0, range(9)) == 1
    assert conformal_p_value(8.0, range(9)) == 0.2


def test_p_values_of_a_calibrated_model_are_those_of_predict(fitted, pictures):
    model = fitted("WtFlow", post_processor=ConformalPostProcessor(false_alarm_rate=0.2))
    shown = pictures(model, 6)
    with torch.no_grad():
        raw = [model.model(picture.prepared[None]) for picture in shown]
    # The first five calibrate, and score exactly as high as they did then.
    scores = tuple(float(each.pred_score) for each in raw)
    peaks = tuple(float(each.anomaly_map.max()) for each in raw)
    model.post_processor.calibrate(CalibrationScores(scores[:5], peaks[:5], "held_out"))
    evidences = [evidence_of(model, picture) for picture in shown]
    expected = model.post_processor.p_values(torch.tensor(scores))
    assert [each.p_value for each in evidences] == expected
    assert evidences[0].to_dict()["normal_pictures_that"] == "were held out"
    assert len(evidences[0].normal) == 5
    model.post_processor.false_alarm_rate = 0.9
    evidence = evidence_of(model, shown[0])
    whole = model.post_processor.p_values_of_pixels(evidence.map)
    assert evidence.regions[0].p_value == pytest.approx(float(whole.min()))
    assert [each.p_value for each in evidence.regions] == sorted(each.p_value for each in evidence.regions)
    assert evidence.to_dict()["regions"][0]["p_value"] == evidence.regions[0].p_value


def test_p_value_leaves_the_picture_itself_out(fitted, pictures):
    model = fitted("WtFlow")
    shown = pictures(model, 5)
    scores = image_scores(model, shown)
    evidences = [evidence_of(model, picture, NormalScores(scores)) for picture in shown]
    assert sorted(each.p_value for each in evidences) == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert {len(each.normal) for each in evidences} == {4}


def test_without_normal_pictures_the_p_value_is_absent_and_says_why(fitted, pictures):
    model = fitted("Pradot")
    (picture,) = pictures(model)
    evidence = evidence_of(model, picture, NormalScores(why_none="there is no validation set"))
    assert evidence.p_value is None
    assert evidence.to_dict()["why_no_p_value"] == "there is no validation set"
    draw_evidence(evidence)
    alone = evidence_of(model, picture, NormalScores(image_scores(model, [picture])))
    assert alone.why_no_p_value == "this image is the only held-out normal image"


def test_a_score_that_is_nan_has_no_p_value_and_is_not_normal(fitted, pictures, monkeypatch):
    model = fitted("WtFlow", 0.1)
    contributions = model.model.contributions
    monkeypatch.setattr(
        model.model,
        "contributions",
        lambda images: {name: part * torch.nan for name, part in contributions(images).items()},
    )
    evidence = evidence_of(model, *pictures(model), NormalScores({"a": 0.1, "b": 9.0}))
    assert (evidence.p_value, evidence.why_no_p_value) == (None, "the score is NaN")
    assert evidence.is_anomalous


def test_regions_are_the_connected_components_above_the_threshold(fitted, pictures):
    model = fitted("Foct")
    (picture,) = pictures(model)
    anomaly_map = evidence_of(model, picture).map.numpy()
    threshold = float(np.quantile(anomaly_map, 0.9))
    model = fitted("Foct", threshold)
    evidence = evidence_of(model, picture)
    labels, count = ndimage.label(anomaly_map > threshold, np.ones((3, 3)))
    assert count > 1
    expected = {
        (columns.start * 80 / 64, rows.start * 72 / 64, columns.stop * 80 / 64, rows.stop * 72 / 64): anomaly_map[
            labels == number
        ].max()
        for number, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1)
    }
    assert len(evidence.regions) == count
    for region in evidence.regions:
        (box,) = [box for box in expected if np.allclose(box, region.box, atol=0.1)]
        assert region.score == pytest.approx(min(1, float(expected[box]) / (2 * threshold)))
    scores = [region.score for region in evidence.regions]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] == pytest.approx(evidence.score)


def test_regions_of_a_cropped_picture_lie_where_they_do_in_the_file(fitted, pictures):
    model = fitted("WtFlow", 1e-3)
    normalize = Normalize([0.5] * 3, [0.5] * 3)
    model.pre_processor = PreProcessor(Compose([Resize((80, 80), antialias=True), CenterCrop((64, 64)), normalize]))
    (picture,) = pictures(model)
    # All is above this threshold: the box is what the model sees.
    (region,) = evidence_of(model, picture).regions
    assert region.box == pytest.approx((8, 7.2, 72, 64.8), abs=0.1)


@pytest.mark.parametrize("sensitivity", [0.3, 0.5, 0.8])
def test_threshold_and_verdict_are_those_of_the_post_processor(fitted, pictures, sensitivity):
    model = fitted("Pradot")
    (picture,) = pictures(model)
    score = evidence_of(model, picture).raw_score
    for threshold in (0.9 * score, 1.1 * score):
        model = fitted("Pradot", threshold)
        model.post_processor.image_sensitivity = sensitivity
        evidence = evidence_of(model, picture)
        with torch.no_grad():
            expected = model.post_processor(model.model(picture.prepared[None]))
        assert evidence.is_anomalous == bool(expected.pred_label)
        assert evidence.is_anomalous == (evidence.score > evidence.threshold)
        assert evidence.is_anomalous == (evidence.raw_score > evidence.scale.raw_threshold)
        assert evidence.score == pytest.approx(float(expected.pred_score))
        assert evidence.threshold == pytest.approx(1 - sensitivity)


def test_a_model_without_thresholds_has_neither_verdict_nor_regions(fitted, pictures):
    model = fitted("Foct")
    evidence = evidence_of(model, *pictures(model))
    assert (evidence.threshold, evidence.is_anomalous, evidence.regions) == (None, None, None)
    draw_evidence(evidence)


def test_evidence_is_json(fitted, pictures):
    model = fitted("Pradot", 0.01)
    evidence = evidence_of(model, *pictures(model), NormalScores({"other": 0.0}))
    content = json.loads(json.dumps(evidence.to_dict(), allow_nan=False))
    assert content["p_value"] == 0.5
    assert content["verdict"] == "anomalous"
    assert content["regions"][0].keys() == {"box", "score", "p_value"}
    assert sum(part["share"] for part in content["contributions"].values()) == pytest.approx(1)


def test_figure_says_the_shares(fitted, pictures):
    model = fitted("WtFlow", 0.1)
    evidence = evidence_of(model, *pictures(model), NormalScores({"a": 0.1, "b": 99.0}))
    titles = [panel.get_title() for panel in draw_evidence(evidence).axes]
    assert f"layer3:\n{evidence.share('layer3'):.0%} of the score" in titles
    assert f"1 of 2 normal images score as high:\np = {2 / 3:.2g}" in titles


def test_the_lowest_p_value_that_so_few_good_pictures_allow_is_called_that(fitted, pictures):
    model = fitted("Foct", 0.1)
    (picture,) = pictures(model)
    for count, says in ((1, "p ≤ 0.5, the lowest that 1 good image allows"), (5, "p ≤ 0.17, the lowest that 5 good")):
        evidence = evidence_of(model, picture, NormalScores({f"good {number}": 0.0 for number in range(count)}))
        assert evidence.p_value_in_words().startswith(says)
        assert any(says in panel.get_title().replace("\n", " ") for panel in draw_evidence(evidence).axes)
        content = evidence.to_dict()
        assert content["p_value_in_words"].startswith(says)
        assert content["lowest_p_value"] == content["p_value"] == 1 / (count + 1)
    higher = evidence_of(model, picture, NormalScores({"a": 0.0, "b": 99.0}))
    assert higher.p_value_in_words() == "p = 0.67"
    assert higher.lowest_p_value == 1 / 3


@pytest.mark.parametrize("name", ["Duo", "Foct", "Pradot", "WtFlow"])
def test_the_figure_and_the_numbers_are_on_the_scale_of_predict(fitted, pictures, name):
    raw = evidence_of(fitted(name), *pictures(fitted(name))).raw_score
    for threshold in (1.5 * raw, 0.8 * raw):
        model = fitted(name, threshold)
        evidence = evidence_of(model, *pictures(model), NormalScores({"a": raw / 2}))
        shown = raw / (2 * threshold)
        content = evidence.to_dict()
        assert content["score"] == evidence.score == pytest.approx(shown)
        assert (content["threshold"], content["pixel_threshold"]) == (0.5, 0.5)
        assert content["raw_threshold"] == pytest.approx(threshold)
        _, map_panel, place, *_ = draw_evidence(evidence).axes
        assert map_panel.images[0].get_array().max() == pytest.approx(float(evidence.map.max()) / (2 * threshold))
        assert [line.get_xdata()[0] for line in place.lines] == pytest.approx([0.5, shown])


def test_scores_far_above_the_range_of_predict_stay_apart_in_the_figure(fitted, pictures):
    model = fitted("Foct", 1e-3)
    evidence = evidence_of(model, *pictures(model), NormalScores({"a": 0.0}))
    assert evidence.score == 1
    assert max(line.get_xdata()[0] for line in draw_evidence(evidence).axes[2].lines) > 10


def test_scores_that_are_not_normalised_are_told_once(fitted, pictures):
    model = fitted("WtFlow")
    evidence = evidence_of(model, *pictures(model))
    assert evidence.score_in_words() == f"{evidence.raw_score:.4g}"


def test_there_is_no_p_value_among_images_that_the_model_was_trained_on(fitted, pictures):
    model = fitted("WtFlow", post_processor=ConformalPostProcessor())
    model.post_processor.calibrate(CalibrationScores((1.0, 2.0), (1.0, 2.0), "trained"))
    evidence = evidence_of(model, *pictures(model))
    assert evidence.p_value is None
    assert evidence.why_no_p_value == "the model was trained on the good images that set the threshold"
