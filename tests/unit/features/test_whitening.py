import numpy as np
import pytest
import torch

from anomalib_ot.features.whitening import LocalWhitening


@pytest.fixture
def maps():
    """Correlated features with a mean of their own at each cell, (20, 5, 3, 4)."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(12, 5, 5, generator=generator)
    mean = 3 * torch.randn(12, 1, 5, generator=generator)
    cells = torch.randn(12, 20, 5, generator=generator) @ mixing + mean
    return cells.permute(1, 2, 0).reshape(20, 5, 3, 4)


def fitted(*batches, **arguments):
    whitening = LocalWhitening(**arguments)
    for batch in batches:
        whitening.update(batch)
    whitening.compute()
    return whitening


def reference(maps, shrinkage=0.1, prior=1.0, centred=False):
    """The same, cell by cell with NumPy."""
    count, channels, height, width = maps.shape
    prior *= channels
    cells = maps.double().numpy().reshape(count, channels, -1)
    local = np.stack([np.cov(cells[..., cell].T, bias=True) for cell in range(height * width)])
    white = np.empty_like(cells)
    for cell, covariance in enumerate(local):
        mixed = (count * covariance + prior * local.mean(0)) / (count + prior)
        values, vectors = np.linalg.eigh(mixed + shrinkage * np.trace(mixed) / channels * np.eye(channels))
        points = cells[..., cell] - (cells[..., cell].mean(0) if centred else 0)
        white[..., cell] = points @ (vectors / np.sqrt(values)) @ vectors.T
    return torch.from_numpy(white.reshape(maps.shape)).float()


@pytest.mark.parametrize("arguments", [{}, {"shrinkage": 0.01, "prior": 0.1, "centred": True}])
def test_equals_a_loop_over_cells(maps, arguments):
    torch.testing.assert_close(fitted(maps, **arguments)(maps), reference(maps, **arguments), atol=1e-4, rtol=1e-4)


def test_batches_do_not_matter(maps):
    torch.testing.assert_close(fitted(maps[:3], maps[3:4], maps[4:]).matrices, fitted(maps).matrices)


def test_a_large_common_mean_does_not_cancel(maps):
    torch.testing.assert_close(fitted(maps + 1e3).matrices, fitted(maps).matrices, atol=1e-3, rtol=1e-3)


def test_cosine_does_not_depend_on_the_unit_of_the_features(maps):
    white, scaled = fitted(maps)(maps), fitted(7 * maps)(7 * maps)
    torch.testing.assert_close(white, scaled, atol=1e-4, rtol=1e-4)


def test_projects_many_channels_alike_in_each_run():
    maps = torch.randn(6, 40, 2, 2, generator=torch.Generator().manual_seed(0))
    whitening = fitted(maps, max_channels=8)
    assert whitening(maps).shape == (6, 8, 2, 2)
    torch.testing.assert_close(whitening.projection @ whitening.projection.T, torch.eye(8))
    assert torch.equal(whitening.projection, fitted(maps, max_channels=8).projection)


@pytest.mark.parametrize("centred", [False, True])
def test_a_larger_map_takes_the_nearest_cells_covariance(maps, centred):
    whitening = fitted(maps, centred=centred)
    doubled = maps.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(
        whitening(doubled)[..., [0, -1], :][..., [0, -1]], whitening(maps)[..., [0, -1], :][..., [0, -1]]
    )


def test_images_all_alike_stay_finite():
    maps = torch.ones(4, 3, 2, 2)
    torch.testing.assert_close(fitted(maps)(maps), maps)


@pytest.mark.parametrize("centred", [False, True])
def test_state_dict_round_trip(maps, centred):
    fresh = LocalWhitening(centred=centred)
    fresh.load_state_dict(fitted(maps, centred=centred).state_dict())
    assert torch.equal(fresh(maps), fitted(maps, centred=centred)(maps))


def test_use_before_fitting_is_refused(maps):
    with pytest.raises(RuntimeError, match="cannot be whitened yet"):
        LocalWhitening()(maps)
    with pytest.raises(RuntimeError, match="no features to estimate the whitening from"):
        LocalWhitening().compute()


def test_fewer_than_one_channel_is_refused():
    with pytest.raises(ValueError, match="whitened_channels must be at least 1, not 0"):
        LocalWhitening(0)
