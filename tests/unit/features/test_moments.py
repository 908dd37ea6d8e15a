import numpy as np
import pytest
import torch

from anomalib_ot.features.moments import Blocks, Moments, principal_components, share_of_alignment


def moments_of(maps, longest_side=16, batch=7):
    cells = maps.flatten(2).permute(2, 0, 1).double()
    moments = Moments(maps.shape[-2:], cells[:, :batch].mean(1, keepdim=True), longest_side)
    for part in cells.split(batch, dim=1):
        moments.add(part)
    return moments


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_covariances_equal_those_of_numpy():
    maps = draw(20, 3, 4, 5) + 100
    covariance = moments_of(maps).covariance().view(4, 5, 3, 3)
    for row, column in ((0, 0), (3, 4)):
        expected = np.cov(maps[:, :, row, column].double().numpy().T, bias=True)
        np.testing.assert_allclose(covariance[row, column], expected, atol=1e-9)


@pytest.mark.parametrize(
    ("grid", "blocks"), [((16, 16), (16, 16)), ((17, 9), (9, 5)), ((28, 28), (14, 14)), ((40, 4), (14, 2))]
)
def test_no_side_has_more_blocks_than_allowed(grid, blocks):
    moments = moments_of(draw(3, 2, *grid))
    assert moments.blocks.shape == blocks
    # Every block has cells, and every cell a block.
    assert float(moments.samples().sum()) == 3 * grid[0] * grid[1]
    assert moments.samples().min() >= 3


def test_blocks_collect_and_return_their_cells():
    cells = torch.arange(5 * 7 * 2 * 3.0).view(5, 7, 2, 3)
    blocks = Blocks((5, 7), 3)
    block = blocks.gather(cells)
    assert block.shape == (2 * 3, 9 * 2, 3)
    # The first one has the corner of 3 x 3 cells, the last one what is left, and zeros.
    torch.testing.assert_close(block[0].view(3, 3, 2, 3), cells[:3, :3])
    torch.testing.assert_close(block[5].view(3, 3, 2, 3)[:2, :1], cells[3:, 6:])
    assert not block[5].view(3, 3, 2, 3)[2:].any()
    assert torch.equal(blocks.scatter(block), cells)
    assert blocks.sizes().tolist() == [9, 9, 3, 6, 6, 2]
    assert torch.equal(Blocks((5, 7), 1).scatter(Blocks((5, 7), 1).gather(cells)), cells)


def test_principal_components_equal_those_of_an_svd():
    maps = draw(12, 40) * torch.linspace(3, 0.1, 40)
    components = principal_components(maps, 4)
    rows = torch.linalg.svd(maps, full_matrices=False)[2]
    cosines = (components * rows[:4].T).sum(0).abs()
    torch.testing.assert_close(cosines, torch.ones(4), atol=1e-4, rtol=0)


def test_components_without_variance_are_left_out():
    assert principal_components(draw(1, 40).expand(6, -1), 4).shape == (40, 1)
    assert principal_components(torch.zeros(6, 40), 4).shape == (40, 0)


def test_images_all_alike_are_aligned_and_textures_are_not():
    place = draw(1, 8, 6, 6)
    assert share_of_alignment(moments_of(place + 0.01 * draw(30, 8, 6, 6))) > 0.99
    # Without the correction for few images, five textures would seem to be aligned by a fifth.
    assert share_of_alignment(moments_of(draw(5, 8, 6, 6))) < 0.01
    half = share_of_alignment(moments_of(place + draw(1000, 8, 6, 6)))
    assert half == pytest.approx(0.5, abs=0.1)


def test_one_image_or_no_variance_shows_no_alignment():
    assert share_of_alignment(moments_of(draw(1, 3, 4, 4))) == 0
    assert share_of_alignment(moments_of(torch.ones(5, 3, 4, 4))) == 0
