"""Models that are fitted on features, against models that are fitted on images."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from anomalib.models import Padim, Patchcore

from anomalib_ot import Pradot, WtFlow
from anomalib_ot.features.store import FeatureDataset
from anomalib_ot.selection import Candidate
from anomalib_ot.selection.fitting import fit_on_features
from anomalib_ot.selection.trial import run_trial

SIZE = (64, 64)
BACKBONE = {"backbone": "test_resnet", "pre_trained": False}


@pytest.fixture(scope="module")
def images():
    return torch.rand(6, 3, *SIZE, generator=torch.Generator().manual_seed(0))


def features_of(model, images):
    with torch.no_grad():
        return FeatureDataset({name: maps.clone() for name, maps in model.model.feature_extractor(images).items()})


def set_seeds():
    """Of the coreset, whose projection is NumPy's and whose start is torch's."""
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002 - the projection draws from the global numbers


@pytest.mark.parametrize("kind", [Padim, Patchcore])
def test_a_memory_bank_of_features_scores_as_one_of_images(images, kind):
    torch.manual_seed(0)
    model = kind(**BACKBONE, layers=["layer2", "layer3"], **({"n_features": 8} if kind is Padim else {}))
    features = features_of(model, images)
    network = model.model
    network.train()
    network(images)
    set_seeds()
    model.fit()
    with torch.no_grad():
        expected = network.eval()(images)
    network.memory_bank = [] if kind is Padim else torch.empty(0)
    set_seeds()
    score = fit_on_features(model, features, SIZE)
    scores, maps = zip(*(score(features[[index]]) for index in range(len(images))), strict=True)
    assert torch.allclose(torch.stack(scores), expected.pred_score.flatten(), rtol=1e-4)
    # Distances near zero are square roots of rounding errors.
    assert torch.allclose(torch.cat(maps), expected.anomaly_map, atol=5e-3)


@pytest.mark.parametrize(
    ("class_path", "init_args"),
    [
        ("anomalib.models.Padim", {"n_features": 8}),
        ("anomalib.models.Patchcore", {"coreset_sampling_ratio": 0.1}),
        ("anomalib_ot.WtFlow", {"layers": ["layer3"], "training_steps": 2, "width": 16}),
    ],
)
def test_a_trial_depends_on_its_seed_only(images, class_path, init_args):
    candidate = Candidate("it", class_path, init_args, SIZE, "test_resnet")
    maps = features_of(candidate.create(pre_trained=False, layers=["layer1", "layer2", "layer3"]), images)
    features = SimpleNamespace(to_fit=maps, good=maps, synthetic=maps)
    first, other, again = (run_trial(candidate, features, seed) for seed in (0, 1, 0))
    assert np.array_equal(first.synthetic, again.synthetic)
    assert not np.array_equal(first.synthetic, other.synthetic)


def test_patchcore_shows_no_bar(images, capfd):
    model = Patchcore(**BACKBONE, layers=["layer2"])
    fit_on_features(model, features_of(model, images), SIZE)
    assert capfd.readouterr() == ("", "")


def test_wt_flow_takes_all_its_steps(images, monkeypatch):
    taken = []
    monkeypatch.setattr("anomalib_ot.models.wt_flow.flow_training.fit_flow", lambda *args: taken.append(args[3]))
    model = WtFlow(**BACKBONE, layers=["layer3"], image_size=SIZE, training_steps=7, width=16)
    fit_on_features(model, features_of(model, images), SIZE)
    assert taken == [7]


def test_pradot_takes_all_its_epochs(images, monkeypatch):
    model = Pradot(**BACKBONE, layers=["layer3"], image_size=SIZE, epochs=3, prototypes_per_cell=1, whitened_channels=8)
    features, updates, kind = features_of(model, images), [], type(model.model)
    update = kind.update
    monkeypatch.setattr(kind, "update", lambda self, batch: updates.append(len(batch)) or update(self, batch))
    score = fit_on_features(model, features, SIZE)
    assert len(updates) == 3
    assert score(features[[0]])[1].shape == (1, 1, *SIZE)


def test_a_model_that_trains_on_images_is_refused():
    model = FastflowStub()
    with pytest.raises(TypeError, match="FastflowStub cannot be fitted on features"):
        fit_on_features(model, FeatureDataset({}), SIZE)


class FastflowStub:
    """Neither of the two kinds."""
