"""The same seed gives the same model to the last bit, and how pictures are batched and loaded does not tell."""

import pytest
import torch
from anomalib.engine import Engine
from lightning.pytorch import seed_everything

from anomalib_ot import Assembly, FewShot, Foct, Pradot, WtFlow

pytestmark = pytest.mark.slow

# Small, but with each model's own defaults where they decide what is drawn or summed.
MODELS = {
    "Pradot": (Pradot, {"layers": ["blocks.2", "blocks.4"], "prototypes_per_cell": 2, "epochs": 2, "batch_size": 6}),
    "Foct": (Foct, {"layers": ["blocks.2", "blocks.4"], "rotations": 2, "support_steps": 5}),
    "Foct online": (
        Foct,
        {"layers": ["blocks.4"], "rotations": 1, "support_steps": 2, "query_steps": 2, "online": True},
    ),
    "WtFlow": (WtFlow, {"layers": ["blocks.4"], "width": 16, "training_steps": 6, "batch_size": 4}),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")

    def make(**arguments):
        return Assembly(root, n_train=8, n_validation=2, n_test=3, **arguments)

    return make


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def trained(backbone, data, folder):
    """Trains a model anew, on every call."""

    def train(name, seed):
        kind, arguments = MODELS[name]
        seed_everything(seed, workers=True, verbose=False)
        # Scores as they are: post-processing would clip them.
        model = kind(
            backbone=backbone,
            image_size=(128, 128),
            **arguments,
            post_processor=False,
            evaluator=False,
            visualizer=False,
        )
        engine(folder).fit(model, datamodule=FewShot(data(), shots=2) if kind is Foct else data())
        return model

    return train


@pytest.fixture(scope="module", params=MODELS)
def twins(request, trained):
    """Two models of the same seed, and what chance was left with after each."""
    models, chance = [], []
    for _ in range(2):
        models.append(trained(request.param, 3))
        chance.append(torch.rand(3))
    return models, chance


def engine(folder):
    return Engine(default_root_dir=folder, accelerator="cpu", logger=False, enable_progress_bar=False)


def scores(model, data, folder, **arguments):
    """Image scores (B,) and anomaly maps (B, H, W) of the test pictures in their order."""
    batches = engine(folder).predict(model, datamodule=data(**arguments))
    assert max(len(batch.image_path) for batch in batches) == arguments.get("eval_batch_size", 9)
    return torch.cat([batch.pred_score for batch in batches]), torch.cat([batch.anomaly_map for batch in batches])


def test_same_seed_same_weights_and_scores_to_the_last_bit(twins, data, folder):
    (first, second), chance = twins
    states = first.state_dict(), second.state_dict()
    assert states[0].keys() == states[1].keys()
    assert [name for name in states[0] if not torch.equal(states[0][name], states[1][name])] == []
    assert torch.equal(*chance)
    for ours, theirs in zip(scores(first, data, folder), scores(second, data, folder), strict=True):
        assert torch.equal(ours, theirs)
        assert ours.isfinite().all()


@pytest.mark.parametrize(("eval_batch_size", "num_workers"), [(1, 0), (4, 2)])
def test_batches_and_workers_do_not_tell(twins, data, folder, eval_batch_size, num_workers):
    (model, _), _ = twins
    expected = scores(model, data, folder)
    found = scores(model, data, folder, eval_batch_size=eval_batch_size, num_workers=num_workers)
    for ours, theirs in zip(found, expected, strict=True):
        spread = theirs.max() - theirs.min()
        assert spread > 0
        assert (ours - theirs).abs().max() < 1e-4 * spread


@pytest.mark.parametrize("name", ["Pradot", "WtFlow"])
def test_another_seed_gives_another_model(trained, name):
    first, second = (trained(name, seed).state_dict() for seed in (3, 4))
    assert any(first[key].shape != second[key].shape or not torch.equal(first[key], second[key]) for key in first)
