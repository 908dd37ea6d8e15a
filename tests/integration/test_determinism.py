"""The same seed gives the same model to the last bit, and how pictures are batched and loaded does not tell."""

import pytest
import torch

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def twins(name, train):
    """Two models of the same seed, and what chance was left with after each."""
    models, chance = [], []
    for _ in range(2):
        models.append(train(name, 3))
        chance.append(torch.rand(3))
    return models, chance


def test_same_seed_same_weights_and_scores_to_the_last_bit(twins, scores):
    (first, second), chance = twins
    states = first.state_dict(), second.state_dict()
    assert states[0].keys() == states[1].keys()
    assert [name for name in states[0] if not torch.equal(states[0][name], states[1][name])] == []
    assert torch.equal(*chance)
    for ours, theirs in zip(scores(first), scores(second), strict=True):
        assert torch.equal(ours, theirs)
        assert ours.isfinite().all()


@pytest.mark.parametrize(("eval_batch_size", "num_workers"), [(1, 0), (4, 2)])
def test_batches_and_workers_do_not_tell(twins, scores, eval_batch_size, num_workers):
    (model, _), _ = twins
    expected = scores(model)
    found = scores(model, eval_batch_size=eval_batch_size, num_workers=num_workers)
    for ours, theirs in zip(found, expected, strict=True):
        spread = theirs.max() - theirs.min()
        assert spread > 0
        assert (ours - theirs).abs().max() < 1e-4 * spread


@pytest.mark.parametrize("kind", ["Pradot", "WtFlow"])
def test_another_seed_gives_another_model(train, kind):
    first, second = (train(kind, seed).state_dict() for seed in (3, 4))
    assert any(first[key].shape != second[key].shape or not torch.equal(first[key], second[key]) for key in first)
