import pytest
import torch
from anomalib.models.components import KCenterGreedy

from anomalib_ot.models.foct.coreset import greedy_coreset, random_projection


def radius(features, chosen):
    return float(torch.cdist(features, features[chosen]).amin(1).amax())


def test_covers_as_well_as_anomalibs():
    torch.manual_seed(0)
    features = torch.randn(400, 6)
    ours = radius(features, greedy_coreset(features, 40))
    sampler = KCenterGreedy(features, 0.1)
    # The same method without its random projection.
    sampler.model.fit = lambda _: sampler.model
    sampler.model.transform = lambda features: features
    theirs = radius(features, torch.tensor(sampler.select_coreset_idxs()))
    assert ours == pytest.approx(theirs, rel=0.1)


def test_each_is_the_farthest_from_those_before():
    features = torch.tensor([[0.0], [1.0], [5.0], [9.0], [10.0]])
    assert greedy_coreset(features, 3).tolist() == [2, 0, 4]
    assert sorted(greedy_coreset(features, 5).tolist()) == list(range(5))


@pytest.mark.parametrize("size", [0, 6])
def test_size_out_of_range(size):
    with pytest.raises(ValueError, match=r"size of a coreset must be from 1 to 5, the number of features"):
        greedy_coreset(torch.zeros(5, 1), size)


def test_projection_keeps_distances():
    features = torch.randn(30, 1000, generator=torch.Generator().manual_seed(0))
    ratio = torch.pdist(features @ random_projection(1000, 256)) / torch.pdist(features)
    assert 0.75 < float(ratio.min()) < float(ratio.max()) < 1.25
    assert torch.equal(random_projection(3, 5), torch.eye(3))
