"""Thresholds from scores of training images that each fold leaves out."""

import logging
import operator

import pytest
import torch
from anomalib.post_processing import PostProcessor
from torch.utils.data import Subset

from anomalib_ot import Duo, Pradot, WtFlow
from anomalib_ot.host.cross_fit import FoldFeatures

SMALL = {
    "backbone": "test_resnet",
    "pre_trained": False,
    "image_size": (64, 64),
    "visualizer": False,
    "evaluator": False,
}
MODELS = {
    "Pradot": (Pradot, {"layers": ["layer2", "layer3"], "prototypes_per_cell": 1, "whitened_channels": 8, "epochs": 2}),
    "WtFlow": (WtFlow, {"layers": ["layer3"], "width": 16, "whitened_channels": 8, "training_steps": 6}),
    "Duo": (
        Duo,
        {
            "layers": ["layer2", "layer3"],
            "pradot": {"prototypes_per_cell": 1, "whitened_channels": 8, "epochs": 2},
            "wt_flow": {"width": 16, "whitened_channels": 8, "training_steps": 6},
        },
    ),
}


def make(name, **given):
    torch.manual_seed(0)
    kind, settings = MODELS[name]
    return kind(**{**SMALL, **settings, "batch_size": 4, **given})


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


def test_all_training_images_calibrate(name, engine, data):
    model = make(name)
    engine().fit(model, datamodule=data())
    processor = model.post_processor
    assert processor.image_calibration.numel() == processor.pixel_calibration.numel() == 10
    assert processor.image_calibration.tolist() == pytest.approx(list(model.calibration_scores.images))
    assert processor.image_threshold == processor.image_calibration.max()


@pytest.mark.parametrize("name", ["Pradot", "Duo"], indirect=True)
def test_folds_score_on_the_scale_of_the_model(name, engine, data, monkeypatch):
    """The scale of prototypes follows from the scores of their own images, which are lower for fewer of them."""
    folds = []
    kind = MODELS[name][0]
    fit_fold = kind.fit_fold

    def fit_and_keep(self, features):
        folds.append((features, fit_fold(self, features)))
        return folds[-1][1]

    monkeypatch.setattr(kind, "fit_fold", fit_and_keep)
    model = make(name)
    engine().fit(model, datamodule=data())
    weights = operator.attrgetter("pradot.weights" if name == "Duo" else "weights")
    assert len(folds) == 3
    assert all(weights(fold).equal(weights(model.model)) for _, fold in folds)
    # A model that has not been fitted has no scale to share.
    alone = fit_fold(make(name), folds[0][0])
    assert not weights(alone).equal(weights(model.model))


def test_folds_change_neither_scores_nor_what_follows(name, engine, data):
    states, numbers = [], []
    for folds in (0, 3):
        model = make(name, calibration_folds=folds)
        engine().fit(model, datamodule=data(seed=0))
        states.append({key: value for key, value in model.state_dict().items() if "post_processor" not in key})
        numbers.append(torch.rand(1))
    assert states[0].keys() == states[1].keys()
    assert all(states[0][key].equal(states[1][key]) for key in states[0])
    assert numbers[0] == numbers[1]


def test_a_fold_with_all_images_is_fitted_as_the_model_is(engine, data, monkeypatch):
    """One batch an epoch has no order, so that both see the same."""
    fold = {}

    def fit_all(self):
        loader = self.training_features.trained_on
        fold["model"] = self.fit_fold(FoldFeatures(Subset(loader.dataset, range(10)), 10, self.device))
        fold["features"] = next(iter(loader)).features

    for name in MODELS:
        monkeypatch.setattr(MODELS[name][0], "calibrate", fit_all)
        model = make(name, batch_size=10)
        if name != "Pradot":
            # Both start from the same weights.
            start = {key: value.clone() for key, value in model.flow.velocities().state_dict().items()}
            build = type(model.model)

            def same_start(*arguments, start=start, build=build):
                made = build(*arguments)
                getattr(made, "wt_flow", made).velocities().load_state_dict(start)
                return made

            monkeypatch.setattr(type(model), "torch_model", same_start)
        engine().fit(model, datamodule=data())
        with torch.no_grad():
            expected, found = (each.score(fold["features"], (64, 64)) for each in (model.model.eval(), fold["model"]))
        torch.testing.assert_close(found.anomaly_map, expected.anomaly_map, rtol=1e-3, atol=1e-3)
        assert fold["model"].feature_extractor is model.model.feature_extractor


@pytest.mark.in_turn
@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"feature_cache": "none"}, "the features of the training images are not cached"),
        ({"calibration_folds": 6}, "10 training images are fewer than 2 in each of 6 folds"),
    ],
)
def test_without_folds_the_validation_images_calibrate(name, given, reason, engine, data, caplog):
    model = make(name, **given)
    with caplog.at_level(logging.INFO, "anomalib_ot"):
        engine().fit(model, datamodule=data())
    assert f"not those of folds: {reason}" in caplog.text
    # The four good images of the validation.
    assert model.post_processor.image_calibration.numel() == 4


# Duo weighs its parts by folds.
@pytest.mark.parametrize("name", ["Pradot", "WtFlow"])
def test_folds_are_not_fitted_for_nothing(name, engine, data, monkeypatch):
    monkeypatch.setattr(MODELS[name][0], "fit_fold", lambda *_: 1 / 0)
    engine().fit(make(name, calibration_folds=0), datamodule=data())
    engine().fit(make(name, post_processor=PostProcessor()), datamodule=data())
    engine(limit_val_batches=0).fit(make(name), datamodule=data())


@pytest.mark.in_turn
@pytest.mark.parametrize("error", [RuntimeError, OSError, MemoryError])
def test_a_fold_that_fails_does_not_cost_the_training(name, error, engine, data, monkeypatch, caplog):
    def fails(*_):
        raise error("not today")  # noqa: EM101, TRY003

    monkeypatch.setattr(MODELS[name][0], "fit_fold", fails)
    model = make(name)
    engine().fit(model, datamodule=data())
    assert f"as folds failed: {error.__name__}('not today')" in caplog.text
    assert model.post_processor.image_calibration.numel() == 4


@pytest.mark.parametrize(("folds", "allowed"), [(1, "0 or at least 2"), (-1, "at least 0"), (2.5, "at least 0 and")])
def test_a_number_of_folds_that_is_none_is_refused(name, folds, allowed):
    with pytest.raises(ValueError, match=f"calibration_folds must be {allowed}"):
        make(name, calibration_folds=folds)
