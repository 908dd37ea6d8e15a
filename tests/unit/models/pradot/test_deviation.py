import torch

from anomalib_ot.features.whitening import LocalWhitening
from anomalib_ot.models.pradot.deviation import Deviation


def fit(maps, **arguments):
    whitening, deviation = LocalWhitening(**arguments), Deviation()
    whitening.update(maps)
    whitening.compute()
    deviation.fit(whitening)
    return whitening, deviation


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_is_the_mahalanobis_distance_of_padim():
    maps = draw(30, 3, 2, 2) * torch.tensor([1.0, 5.0, 20.0]).view(3, 1, 1) + 10 * draw(3, 2, 2)
    whitening, deviation = fit(maps, shrinkage=1e-9, prior=0.0)
    distances = deviation(whitening(maps))
    assert distances.shape == (30, 1, 2, 2)
    points = maps[:, :, 1, 0].double()
    inverse = torch.linalg.inv(torch.cov(points.T, correction=0))
    centred = points - points.mean(0)
    expected = torch.einsum("bi,ij,bj->b", centred, inverse, centred).sqrt().float()
    torch.testing.assert_close(distances[:, 0, 1, 0], expected, atol=1e-3, rtol=1e-3)


def test_the_share_is_that_of_the_alignment():
    place = draw(1, 3, 4, 4)
    for maps in (place + 0.1 * draw(20, 3, 4, 4), draw(20, 3, 4, 4)):
        whitening, deviation = fit(maps)
        assert float(deviation.share) == torch.tensor(whitening.aligned_share)


def test_the_mean_has_no_deviation_with_modes_either():
    maps = 10 * draw(1, 3, 4, 4) + draw(20, 1, 1, 1)
    whitening, deviation = fit(maps, max_modes=2)
    assert whitening.modes.shape[-1] > 0
    # Only rounding is left of images that differ along one mode alone.
    assert float(deviation(whitening(maps.mean(0, keepdim=True))).max()) < 1e-2


def test_a_map_of_another_size_uses_the_nearest_cells():
    whitening, deviation = fit(draw(20, 3, 4, 4))
    white = whitening(draw(2, 3, 4, 4))
    doubled = white.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(
        deviation(doubled)[..., [0, -1], :][..., [0, -1]], deviation(white)[..., [0, -1], :][..., [0, -1]]
    )
