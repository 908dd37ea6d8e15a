"""The benchmark of accuracy against the number of training images: its categories, scores and tables."""

import numpy as np
import pandas as pd
import pytest
import torch
from anomalib.data import AnomalibDataModule

from anomalib_ot import Assembly
from anomalib_ot.comparison import Key, Plan
from anomalib_ot.features.given import on_features
from anomalib_ot.host.class_paths import create
from benchmarks import few_images
from benchmarks.categories import EMBEDDED, categories_in
from benchmarks.few_images import (
    METRICS,
    STEPS,
    Features,
    TestImages,
    draw,
    draw_images,
    fitted_model,
    foct_plan,
    main,
    measured,
    table,
)

SIZE = (64, 64)
MODELS = {
    "PaDiM": {"class_path": "Padim", "init_args": {"n_features": 10}},
    "PatchCore": {"class_path": "Patchcore", "init_args": {"coreset_sampling_ratio": 0.01}},
    "WtFlow": {"class_path": "WtFlow", "init_args": {"layers": ["blocks.4"], "training_steps": 2, "width": 16}},
    "Pradot": {"class_path": "Pradot", "init_args": {"prototypes_per_cell": 1, "epochs": 1}},
    "Foct": {"class_path": "Foct", "init_args": {"rotations": 2, "support_steps": 2}},
}


@pytest.fixture(scope="module")
def plan(backbone, tmp_path_factory):
    root = str(tmp_path_factory.mktemp("datasets"))
    data = {"class_path": "Assembly", "init_args": {"root": root, "n_train": 6, "n_validation": 1, "n_test": 2}}
    return Plan(MODELS, {"tray": data}, backbone, ("blocks.2", "blocks.4"), SIZE, shots=(4, 6, None))


@pytest.mark.parametrize("name", MODELS)
def test_scores_of_given_features_are_those_of_the_image(plan, name):
    (job,) = [job for job in plan.jobs() if job.key == Key("tray", name, 4, 0)]
    data = draw_images(plan, job.key)
    network = fitted_model(job, data)
    image = data.test_data[0].image
    with torch.inference_mode():
        expected = network(job.create_model().pre_processor.transform(image)[None])
    features = Features(plan, ["blocks.1", *job.model["init_args"]["layers"]])
    score, anomaly_map = on_features(network, SIZE)(features.of(image))
    assert torch.allclose(score, expected.pred_score.flatten()[0], rtol=1e-3)
    assert torch.allclose(anomaly_map, expected.anomaly_map, rtol=1e-3, atol=1e-3 * float(anomaly_map.max()))


def test_patchcore_has_a_large_coreset_of_few_images(plan, monkeypatch):
    (job,) = [job for job in plan.jobs() if job.key == Key("tray", "PatchCore", 4, 0)]
    data = draw_images(plan, job.key)
    sizes = [len(fitted_model(job, data).memory_bank)]
    monkeypatch.setattr(few_images, "LARGE_CORESET", 3)
    sizes.append(len(fitted_model(job, data).memory_bank))
    assert sizes == [25, 2], "of four images of 64 cells"


def test_runs_are_measured_on_all_images_and_on_draws_that_are_smaller(plan):
    keys = [Key("tray", name, shots, 0) for name in ("PaDiM", "AnomalyDINO rule (8 views)") for shots in plan.shots]
    found = dict(measured(plan, keys, every=1))
    assert list(found) == [key for key in keys if key.shots != 6]
    assert all({*METRICS} <= values.keys() for values in found.values())
    assert list(measured(plan, [], every=1)) == []


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    root = str(tmp_path_factory.mktemp("steps"))
    # At the usual rate, all of these few images teach.
    chosen = {"Foct (+ p-values)": {**STEPS["Foct (+ p-values)"], "online_rate": 0.99}}
    return foct_plan({**STEPS, **chosen}, 1, [0], SIZE, root=root, n_train=3, n_validation=1, n_test=2)


@pytest.mark.slow
def test_steps_of_foct_differ(steps):
    found = dict(measured(steps, [job.key for job in steps.jobs()], every=1))
    assert [key.model for key in found] == [*STEPS]
    assert len({tuple(values[name] for name in METRICS) for values in found.values()}) == len(STEPS)


def test_online_model_scores_each_test_image_once_in_the_order_of_the_loader(steps):
    (job,) = [job for job in steps.jobs() if job.key.model == "Foct (+ online)"]
    data = draw_images(steps, job.key)
    twin, network = fitted_model(job, data), fitted_model(job, data)
    transform = job.create_model().pre_processor.transform
    with torch.inference_mode():
        expected = torch.cat([twin(transform(item.image)[None]).pred_score for item in data.test_data])
    scorer, scores = on_features(network, SIZE), []

    def recorded(features):
        score, anomaly_map = scorer(features)
        scores.append(score)
        return score, anomaly_map

    TestImages(data, Features(steps), every=1).metrics(recorded)
    assert len(network.earlier) == len(data.test_data)
    assert len(network.episodic.features)
    assert torch.allclose(torch.stack(scores), expected, rtol=1e-3)


def test_unknown_model_is_refused_before_any_run(tmp_path):
    with pytest.raises(ValueError, match=r"models must be among Pradot, .*, not .*Foct, nearest"):
        main(output=tmp_path / "runs.csv", models=["Foct, nearest"])
    assert not [*tmp_path.iterdir()]


def test_rule_of_a_training_image_finds_nothing(plan):
    features = Features(plan, ())
    images = [item.image for item in draw_images(plan, Key("tray", "", 4, 0)).train_data]
    score = few_images.fitted_rule(*few_images.RULES["AnomalyDINO rule (8 views)"], images, features)
    found, anomaly_map = score(features.of(images[0]))
    assert float(found) == pytest.approx(0, abs=1e-5)
    assert anomaly_map.shape == (1, 1, *SIZE)


def test_categories_of_all_layouts_are_found_with_all_their_test_images(tmp_path):
    loco = Assembly(tmp_path / "parts", n_train=2, n_validation=1, n_test=1)
    loco.prepare_data()
    images = sorted((tmp_path / "parts").rglob("*.png"))
    for category, masks in (("masked", True), ("plain", False)):
        for place in ("train/good", "test/good", "test/broken", *["ground_truth/broken"] * masks):
            folder = tmp_path / category / place
            folder.mkdir(parents=True)
            (folder / ("0_mask.png" if "truth" in place else "0.png")).write_bytes(images[0].read_bytes())
    (tmp_path / "README.md").touch()
    found = categories_in(tmp_path)
    assert list(found) == [EMBEDDED, "masked", "parts/tray", "plain"]
    counts = []
    for name in list(found)[1:]:
        data = create(AnomalibDataModule, found[name])
        data.prepare_data()
        data.setup()
        counts.append((len(data.train_data), len(data.test_data), int(data.test_data.samples.label_index.sum())))
    assert counts == [(1, 2, 1), (2, 3, 2), (1, 2, 1)]
    assert list(categories_in(None)) == [EMBEDDED]


@pytest.fixture
def runs():
    rows = [
        (category, model, images, seed, 10 * offset + seed)
        for offset, category in enumerate(("a", "b", "c"), start=1)
        for model in ("PaDiM", "Pradot")
        for images in ("all", "5", "10")
        for seed in (0, 1)
        if (category, model, images) != ("c", "Pradot", "10")
    ]
    frame = pd.DataFrame(rows, columns=["category", "model", "images", "seed", "image_AUROC"])
    frame["pixel_AUROC"] = np.where(frame["category"] == "a", np.nan, 50.0)
    return frame


def test_table_has_the_mean_of_the_categories_that_all_models_have(runs):
    lines = [line.split() for line in table(runs, "image_AUROC").splitlines()]
    assert lines[0] == ["images", "5", "10", "all"]
    assert lines[2] == ["a", "PaDiM", *["10.5", "±", "0.7"] * 3]
    assert lines[7] == ["Pradot", *["30.5", "±", "0.7"] * 2]
    assert lines[8:] == [["mean", "PaDiM", *["15.5"] * 3], ["Pradot", *["15.5"] * 3]]


def test_table_leaves_out_categories_without_masks(runs):
    lines = table(runs, "pixel_AUROC").splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["b", "Pradot", "c", "Pradot", "mean", "Pradot"]
    assert lines[-1].split() == ["Pradot", "50.0", "50.0", "50.0"]


def test_plot_is_drawn(runs, tmp_path):
    draw(runs, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_without_a_complete_category_there_is_no_mean_and_an_empty_plot(runs, tmp_path):
    part = runs[(runs["category"] == "c") | (runs["model"] == "PaDiM")]
    part = part[(part["category"] != "c") | (part["model"] == "Pradot")]
    assert "mean" not in table(part, "image_AUROC")
    draw(part, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").exists()
