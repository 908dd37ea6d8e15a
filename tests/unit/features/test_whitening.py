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


def test_large_maps_have_one_covariance_for_each_block_of_cells():
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(9 * 9, 3, 3, generator=generator).view(9, 9, 3, 3)
    mixing = mixing.repeat_interleave(2, 0).repeat_interleave(2, 1)
    noise = torch.randn(10, 18, 18, 3, generator=generator)
    maps = torch.einsum("bhwc,hwcd->bdhw", noise, mixing) + 5 * torch.randn(3, 18, 18, generator=generator)
    whitening = fitted(maps, prior=0.0)
    assert whitening.matrices.shape == (9, 9, 3, 3)
    residual = (maps - maps.mean(0)).double().numpy()
    for row, column in ((0, 0), (4, 7), (8, 8)):
        block = residual[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        points = block.transpose(1, 0, 2, 3).reshape(3, -1)
        values, vectors = np.linalg.eigh(points @ points.T / points.shape[1])
        expected = vectors / np.sqrt(values + 0.1 * values.mean()) @ vectors.T
        np.testing.assert_allclose(whitening.matrices[row, column], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("grid", [(12, 72), (72, 12), (4, 40), (1, 17), (23, 35)])
def test_the_training_images_are_white_in_each_block_of_any_grid(grid):
    generator = torch.Generator().manual_seed(0)
    scale = torch.rand(grid, generator=generator).mul(6).exp()
    maps = torch.randn(60, 2, *grid, generator=generator) * scale
    whitening = fitted(maps, prior=0.0, shrinkage=1e-9, centred=True)
    side = -(-max(grid) // 16)
    for row, column in ((0, 0), (grid[0] - 1, grid[1] - 1), (grid[0] // 2, grid[1] // 2)):
        rows, columns = (slice(at // side * side, at // side * side + side) for at in (row, column))
        block = whitening(maps)[:, :, rows, columns]
        torch.testing.assert_close(block.square().mean((0, 2, 3)), torch.ones(2), atol=1e-2, rtol=0)


def test_matrices_of_each_cell_from_earlier_checkpoints_are_those_of_its_block():
    maps = torch.randn(10, 3, 18, 18, generator=torch.Generator().manual_seed(0))
    whitening = fitted(maps)
    expected = whitening(maps)
    whitening.matrices = whitening.matrices.repeat_interleave(2, 0).repeat_interleave(2, 1)
    torch.testing.assert_close(whitening(maps), expected, atol=1e-5, rtol=1e-5)


def test_an_interrupted_fit_leaves_nothing(aligned):
    whitening = LocalWhitening(max_modes=3)
    whitening.update(torch.randn(4, 5, 6, 6))
    whitening.reset()
    whitening.update(aligned)
    whitening.compute()
    torch.testing.assert_close(whitening(aligned), fitted(aligned, max_modes=3)(aligned))


@pytest.fixture
def aligned():
    """Maps with a mean of their own at each cell, two factors that all cells share, and noise, (40, 5, 3, 4)."""
    generator = torch.Generator().manual_seed(0)
    factors = torch.linalg.qr(torch.randn(60, 2, generator=generator)).Q
    weights = torch.randn(40, 2, generator=generator) * torch.tensor([9.0, 6.0])
    noise = 0.3 * torch.randn(40, 60, generator=generator)
    return (20 * torch.randn(60, generator=generator) + weights @ factors.T + noise).view(40, 5, 3, 4)


def test_modes_are_the_principal_components_of_whole_maps(aligned):
    # The images are not entirely aligned, which leaves two of three modes.
    whitening = fitted(aligned, max_modes=3, prior=0.0)
    assert whitening.modes.shape == (3, 4, 5, 2)
    centred = (aligned - aligned.mean(0)).double().flatten(1).numpy()
    components = np.linalg.svd(centred, full_matrices=False)[2][:2]
    residual = (centred - centred @ components.T @ components).reshape(aligned.shape)
    mean = aligned.mean(0).double().numpy()
    for row, column in ((0, 0), (2, 3)):
        points = residual[:, :, row, column].T
        values, vectors = np.linalg.eigh(points @ points.T / 40)
        matrix = vectors / np.sqrt(values + 0.1 * values.mean()) @ vectors.T
        expected = (points.T + mean[:, row, column]) @ matrix
        np.testing.assert_allclose(whitening(aligned)[:, :, row, column], expected, rtol=1e-3, atol=1e-3)


def test_a_defect_of_one_cell_stays_when_modes_are_removed(aligned):
    whitening = fitted(aligned, max_modes=3, centred=True)
    defect = aligned[:1].clone()
    defect[0, :, 1, 2] += 5
    before, after = (whitening(each).square().sum(1)[0] for each in (aligned[:1], defect))
    assert int((after - before).flatten().argmax()) == 1 * 4 + 2
    assert after[1, 2] > 10 * before.max()


def test_few_or_unaligned_images_have_fewer_modes(aligned):
    assert fitted(aligned, max_modes=32).modes.shape[-1] in (4, 5)
    assert fitted(aligned[:16], max_modes=32).modes.shape[-1] == 1
    textures = torch.randn(40, 5, 3, 4, generator=torch.Generator().manual_seed(0))
    whitening = fitted(textures, max_modes=32)
    assert whitening.aligned_share < 0.01
    torch.testing.assert_close(whitening(textures), fitted(textures)(textures))


def test_many_images_have_the_covariance_of_what_the_modes_of_the_first_ones_leave(aligned, monkeypatch):
    monkeypatch.setattr("anomalib_ot.features.whitening._MAPS_FOR_MODES", 24)
    whitening = fitted(*aligned.split(8), max_modes=3, prior=0.0, shrinkage=1e-9, centred=True)
    first = (aligned[:24] - aligned[:24].mean(0)).flatten(1)
    modes = torch.linalg.svd(first, full_matrices=False)[2][:2].T
    torch.testing.assert_close(
        (whitening.modes.permute(2, 0, 1, 3).flatten(0, 2).T @ modes).abs(), torch.eye(2), atol=1e-3, rtol=0
    )
    white = whitening(aligned).permute(2, 3, 1, 0)
    # With the covariance of these images, what is left is white at each cell.
    torch.testing.assert_close(white @ white.mT / 40, torch.eye(5).expand(3, 4, 5, 5), atol=1e-2, rtol=0)


def test_the_modes_are_sought_once(monkeypatch):
    monkeypatch.setattr("anomalib_ot.features.whitening._MAPS_FOR_MODES", 16)
    generator = torch.Generator().manual_seed(0)
    # Positions explain nothing of the first images and much of the later ones, which alone would have modes.
    first = torch.randn(16, 5, 3, 4, generator=generator)
    later = 20 * torch.randn(1, 5, 3, 4, generator=generator) + torch.randn(64, 1, 1, 1, generator=generator)
    whitening = fitted(first, *later.split(32), max_modes=32)
    assert whitening.aligned_share > 0.5
    assert not whitening.modes.numel()
    torch.testing.assert_close(whitening.matrices, fitted(first, *later.split(32)).matrices)


def test_a_second_fit_replaces_the_first(aligned):
    whitening = fitted(aligned, max_modes=3)
    for part in (torch.randn(40, 5, 3, 4, generator=torch.Generator().manual_seed(0)), aligned + 1):
        whitening.update(part)
        whitening.compute()
        torch.testing.assert_close(whitening(part), fitted(part, max_modes=3)(part), atol=1e-4, rtol=1e-4)


def test_large_maps_give_modes_from_fewer_images(aligned, monkeypatch):
    expected = fitted(aligned[:24], max_modes=3).modes
    monkeypatch.setattr("anomalib_ot.features.whitening._MEMORY_FOR_MODES", 24 * aligned[0].nbytes)
    modes = fitted(*aligned.split(8), max_modes=3).modes
    torch.testing.assert_close(modes, expected, atol=1e-4, rtol=1e-4)


def test_batches_do_not_matter_to_modes(aligned):
    parts = fitted(*aligned.split(7), max_modes=2)
    torch.testing.assert_close(parts(aligned), fitted(aligned, max_modes=2)(aligned), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("arguments", [{}, {"centred": True}, {"max_modes": 2}])
def test_a_larger_map_takes_what_is_known_of_the_nearest_cells(aligned, arguments):
    whitening = fitted(aligned, **arguments)
    doubled = aligned.repeat_interleave(2, 2).repeat_interleave(2, 3)
    corners, expected = (whitening(each)[..., [0, -1], :][..., [0, -1]] for each in (doubled, aligned))
    torch.testing.assert_close(corners, expected, atol=1e-3, rtol=1e-3)


def test_images_all_alike_stay_finite():
    maps = torch.ones(4, 3, 2, 2)
    torch.testing.assert_close(fitted(maps)(maps), maps)


@pytest.mark.parametrize("arguments", [{}, {"centred": True}, {"max_modes": 2, "centred": True}])
def test_state_dict_round_trip(aligned, arguments):
    fresh = LocalWhitening(**arguments)
    fresh.load_state_dict(fitted(aligned, **arguments).state_dict())
    assert torch.equal(fresh(aligned), fitted(aligned, **arguments)(aligned))


def test_use_before_fitting_is_refused(maps):
    with pytest.raises(RuntimeError, match="cannot be whitened yet"):
        LocalWhitening()(maps)
    with pytest.raises(RuntimeError, match="no features to estimate the whitening from"):
        LocalWhitening().compute()


def test_fewer_than_one_channel_is_refused():
    with pytest.raises(ValueError, match="whitened_channels must be at least 1, not 0"):
        LocalWhitening(0)
