import pytest
import torch

from anomalib_ot.transport import FusedCost, feature_cost, grid_coordinates, spatial_cost


def test_grid_coordinates_are_row_major_and_span_the_unit_square():
    grid = grid_coordinates(3, 5)
    assert grid.shape == (15, 2)
    assert grid[1].tolist() == [0, 0.25]
    assert grid[5].tolist() == [0.5, 0]
    assert grid[-1].tolist() == [1, 1]


def test_feature_cost_is_the_cosine_distance():
    features, prototypes = torch.randn(7, 4), torch.randn(5, 4)
    expected = 1 - torch.cosine_similarity(features[:, None], prototypes[None], dim=-1)
    torch.testing.assert_close(feature_cost(features, prototypes), expected)
    assert torch.allclose(feature_cost(features, 3 * features).diagonal(), torch.zeros(7), atol=1e-6)


@pytest.mark.parametrize(("kind", "power"), [("squared", 2), ("euclidean", 1)])
def test_spatial_cost_against_loops(kind, power):
    coords, others = torch.rand(6, 2), torch.rand(2, 4, 2)
    cost = spatial_cost(coords, others, kind)
    assert cost.shape == (2, 6, 4)
    for group in range(2):
        for i in range(6):
            for j in range(4):
                distance = (coords[i] - others[group, j]).norm() ** power
                torch.testing.assert_close(cost[group, i, j], distance, atol=1e-4, rtol=1e-4)


def test_unknown_spatial_cost_is_refused():
    with pytest.raises(ValueError, match="'squared' or 'euclidean', not 'manhattan'"):
        spatial_cost(torch.rand(2, 2), torch.rand(2, 2), "manhattan")


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", ["squared", "euclidean"])
def test_fused_cost_rows_equal_the_dense_formula(alpha, kind):
    grid = grid_coordinates(3, 4)
    features, prototypes, coords = torch.randn(5 * 12, 8), torch.randn(20, 8), torch.rand(20, 2)
    space = spatial_cost(grid, coords, kind).repeat(5, 1)
    feature = feature_cost(features, prototypes)
    dense = (1 - alpha) * feature / feature.max() + alpha * space / space.max()
    cost = FusedCost(features, prototypes, grid, coords, alpha, kind)
    assert cost.shape == dense.shape
    torch.testing.assert_close(cost[:], dense, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(cost[10:31], dense[10:31], atol=1e-5, rtol=1e-5)
    assert cost[:].max() <= 1 + 1e-5


def test_positions_do_not_matter_if_alpha_is_zero():
    grid = grid_coordinates(2, 2)
    features, prototypes = torch.randn(8, 3), torch.randn(6, 3)
    here = FusedCost(features, prototypes, grid, torch.rand(6, 2), alpha=0)
    there = FusedCost(features, prototypes, grid, torch.rand(6, 2), alpha=0)
    assert torch.equal(here[:], there[:])


def test_features_of_invalid_shapes_are_refused():
    grid = grid_coordinates(2, 2)
    with pytest.raises(ValueError, match="3 channels but prototypes have 4"):
        FusedCost(torch.rand(4, 3), torch.rand(5, 4), grid, torch.rand(5, 2), 0.3)
    with pytest.raises(ValueError, match="7 features are not whole images of 4 cells"):
        FusedCost(torch.rand(7, 3), torch.rand(5, 3), grid, torch.rand(5, 2), 0.3)
