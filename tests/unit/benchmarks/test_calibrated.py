"""Models that the benchmarks fit to known features, compared with a training."""

import numpy as np
import pytest
import torch
from anomalib.engine import Engine
from lightning.pytorch import seed_everything

from anomalib_ot.comparison import Plan
from anomalib_ot.comparison.measurement import QUIET
from benchmarks.calibrated import fitted_on_features
from benchmarks.false_alarms import GoodAndBad

SIZE = (64, 64)
FLOW = {"training_steps": 2, "width": 16}
MODELS = {
    "WtFlow": {"class_path": "WtFlow", "init_args": {"layers": ["blocks.4"], **FLOW}},
    "Duo": {
        "class_path": "Duo",
        "init_args": {"layers": ["blocks.4"], "pradot": {"prototypes_per_cell": 1}, "wt_flow": FLOW},
    },
}


@pytest.fixture(scope="module")
def plan(backbone, tmp_path_factory):
    root = str(tmp_path_factory.mktemp("datasets"))
    data = {"class_path": "Assembly", "init_args": {"root": root, "n_train": 10, "n_validation": 1, "n_test": 4}}
    return Plan(MODELS, {"tray": data}, backbone, ("blocks.4",), SIZE)


@pytest.fixture(scope="module")
def images(plan):
    return GoodAndBad(plan, "tray")


def job_of(plan, model):
    return next(job for job in plan.jobs() if job.key.model == model)


@pytest.mark.slow
def test_the_scores_of_folds_are_those_of_a_training(plan, images, tmp_path):
    indices = [0, 1, 3, 4, 5, 6, 7]
    fit = fitted_on_features(job_of(plan, "WtFlow"), images.features_of(indices), SIZE, 3)
    seed_everything(3, workers=True, verbose=False)
    model = job_of(plan, "WtFlow").create_model()
    Engine(default_root_dir=tmp_path, accelerator="cpu", logger=False, limit_val_batches=1, **QUIET).fit(
        model, datamodule=images.training_data(indices)
    )
    assert np.sort(fit.calibration["WtFlow"]) == pytest.approx(np.sort(model.calibration_scores.images), rel=1e-3)


def test_a_fit_of_duo_measures_its_parts_and_weighs_them_by_the_folds(plan, images):
    features = images.features_of(range(8))
    fit = fitted_on_features(job_of(plan, "Duo"), features, SIZE, 0)
    assert {name: scores.shape for name, scores in fit.calibration.items()} == dict.fromkeys(
        ("Duo", "Pradot", "WtFlow"), (8,)
    )
    # The mean of two parts that are divided by their spread: that of each is 1.
    parts = [fit.calibration[name] / (2 * fit.calibration[name].std(ddof=1)) for name in ("Pradot", "WtFlow")]
    assert (fit.calibration["Duo"] <= sum(parts) * (1 + 1e-4)).all()
    assert (fit.calibration["Duo"] >= np.maximum(*parts) * (1 - 1e-4)).all()
    whole = fit.scores_of(features)
    single = fit.scores_of({layer: maps[2:3] for layer, maps in features.items()})
    for name, scores in whole.items():
        assert single[name] == pytest.approx(scores[2:3], rel=1e-3)
    assert fit.scores_of({layer: maps[:0] for layer, maps in features.items()}) == {}


def test_without_folds_a_duo_has_parts_only(plan, images):
    fit = fitted_on_features(job_of(plan, "Duo"), images.features_of(range(4)), SIZE, 0, has_folds=False)
    assert fit.calibration == {}
    assert {*fit.scores_of(images.features_of([5]))} == {"Pradot", "WtFlow"}
    assert torch.is_grad_enabled()
