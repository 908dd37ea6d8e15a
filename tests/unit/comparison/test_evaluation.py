"""Tests of the metrics against those of anomalib and scikit-image on random maps."""

import json

import numpy as np
import pytest
import torch
from anomalib.metrics.aupro import _AUPRO
from PIL import Image
from torchmetrics.functional.classification import binary_auroc

from anomalib_ot.comparison import Predictions, evaluate

SIZE = (24, 32)


def predictions(seed=0, scale=1.0, **changes):
    rng = np.random.default_rng(seed)
    kinds = ["good"] * 6 + ["crack"] * 4 + ["bent"] * 3
    labels = np.array([int(kind != "good") for kind in kinds])
    truth = np.zeros((13, *SIZE), dtype=bool)
    for index in range(6, 13):
        truth[index, 2 : 5 + index, 3:20] = True
    maps = scale * (rng.normal(size=truth.shape) + truth).astype(np.float32)
    said = {
        "images": [f"/data/test/{kind}/{index:03}.png" for index, kind in enumerate(kinds)],
        "kinds": kinds,
        "labels": labels,
        "scores": (scale * (rng.normal(size=13) + 0.8 * labels)).astype(np.float32),
        "maps": maps,
        "truth": truth,
    }
    return Predictions(**{**said, **changes})


def test_metrics_are_those_of_the_field():
    said = predictions()
    metrics, curves = evaluate(said)
    unit = torch.from_numpy(said.maps - said.maps.min()) / np.ptp(said.maps)
    truth = torch.from_numpy(said.truth)
    assert metrics["pixel_AUROC"] == pytest.approx(100 * float(binary_auroc(unit, truth.long())), abs=1e-4)
    aupro = _AUPRO()
    aupro.update(unit, truth)
    assert metrics["pixel_AUPRO"] == pytest.approx(100 * float(aupro.compute()), abs=1e-4)
    wins = [(a > b) + (a == b) / 2 for a in said.scores[said.labels == 1] for b in said.scores[said.labels == 0]]
    assert metrics["image_AUROC"] == pytest.approx(100 * np.mean(wins), abs=1e-4)
    false, true = map(torch.tensor, curves["ROC"])
    assert float(torch.trapezoid(true, false)) == pytest.approx(np.mean(wins), abs=1e-4)
    false, overlap = map(torch.tensor, curves["PRO"])
    assert float(torch.trapezoid(overlap, false)) / 0.3 == pytest.approx(metrics["pixel_AUPRO"] / 100, abs=2e-3)
    assert "pixel_AUSPRO" not in metrics


def test_each_kind_is_told_from_the_normal_images():
    said = predictions()
    metrics, _ = evaluate(said)
    for kind in ("crack", "bent"):
        anomalous = said.scores[np.array(said.kinds) == kind]
        wins = [a > b for a in anomalous for b in said.scores[said.labels == 0]]
        assert metrics[f"image_AUROC_{kind}"] == pytest.approx(100 * np.mean(wins), abs=1e-4)
    single = predictions(kinds=["good"] * 6 + ["crack"] * 7)
    assert not [name for name in evaluate(single)[0] if name.endswith("crack")]


def test_far_scores_do_not_tie():
    # A sigmoid, which torchmetrics takes of what is not within [0, 1], is 1 in float32 from 17 on.
    near, far = evaluate(predictions()), evaluate(predictions(scale=1e4))
    assert far[0] == pytest.approx(near[0], abs=1e-3)


@pytest.mark.parametrize("absent", ["maps", "truth"])
def test_what_cannot_be_measured_is_absent(absent):
    metrics, curves = evaluate(predictions(**{absent: None}))
    assert not [name for name in metrics if name.startswith("pixel")]
    assert [*curves] == ["ROC"]
    assert metrics["image_AUROC"] == evaluate(predictions())[0]["image_AUROC"]


def test_masks_without_a_defect_measure_nothing():
    metrics, _ = evaluate(predictions(truth=np.zeros((13, *SIZE), dtype=bool)))
    assert not [name for name in metrics if name.startswith("pixel")]


@pytest.mark.parametrize(("label", "kind"), [(0, "normal"), (1, "anomalous")])
def test_images_of_one_label(label, kind):
    with pytest.raises(ValueError, match=f"normal and anomalous test images; all 13 are {kind}"):
        evaluate(predictions(labels=np.full(13, label)))


@pytest.mark.parametrize("name", ["scores", "maps"])
def test_values_that_are_not_finite(name):
    said = predictions()
    getattr(said, name)[0] = np.nan
    with pytest.raises(ValueError, match=f"a {name[:-1]} that is not finite"):
        evaluate(said)


def test_saturated_overlap_where_the_category_has_it(tmp_path):
    kinds = ["good"] * 6 + ["logical_anomalies"] * 4 + ["structural_anomalies"] * 3
    images = [tmp_path / "test" / kind / f"{index:03}.png" for index, kind in enumerate(kinds)]
    said = predictions(kinds=kinds, images=[*map(str, images)])
    for image, kind, truth in zip(images, kinds, said.truth, strict=True):
        image.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros(SIZE, dtype=np.uint8)).save(image)
        if kind != "good":
            folder = tmp_path / "ground_truth" / kind / image.stem
            folder.mkdir(parents=True)
            Image.fromarray(255 * truth.astype(np.uint8)).save(folder / "000.png")
    config = [{"defect_name": "a", "pixel_value": 255, "saturation_threshold": 1.0, "relative_saturation": True}]
    assert "pixel_AUSPRO" not in evaluate(said)[0]
    (tmp_path / "defects_config.json").write_text(json.dumps(config))
    metrics, _ = evaluate(said)
    mean = (metrics["pixel_AUSPRO_logical_anomalies"] + metrics["pixel_AUSPRO_structural_anomalies"]) / 2
    assert metrics["pixel_AUSPRO"] == pytest.approx(mean, abs=1e-4)
    assert 0 < mean < 100
