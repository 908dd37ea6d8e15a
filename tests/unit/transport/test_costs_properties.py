"""Blocks of the fused cost on random problems, compared with the dense formula in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anomalib_ot.transport import (
    DenseCost,
    FusedCost,
    Processes,
    Workspace,
    feature_cost,
    grid_coordinates,
    sinkhorn,
    spatial_cost,
)
from anomalib_ot.transport.costs import row_blocks

properties = settings(derandomize=True, deadline=None, database=None, max_examples=40)
seeds = st.integers(0, 2**32 - 1)


@st.composite
def problems(draw):
    """Arguments of a fused cost whose features are all different, all zero, all equal, or large."""
    height, width, images, columns = (draw(st.integers(1, 4)) for _ in range(4))
    generator = torch.Generator().manual_seed(draw(seeds))
    features = torch.randn(images * height * width, 3, generator=generator)
    prototypes = torch.randn(columns, 3, generator=generator)
    kind = draw(st.sampled_from(["different", "zero", "equal", "large"]))
    if kind == "zero":
        features = torch.zeros_like(features)
    elif kind == "equal":
        features, prototypes = features[:1].expand(len(features), 3), features[:1].expand(columns, 3)
    elif kind == "large":
        features = 1e6 * features
    alpha = draw(st.sampled_from([0.0, 0.3, 1.0]))
    coordinates = torch.rand(columns, 2, generator=generator)
    spatial = draw(st.sampled_from(["squared", "euclidean"]))
    return features, prototypes, grid_coordinates(height, width), coordinates, alpha, spatial


def dense(features, prototypes, grid, coordinates, alpha, spatial):
    features, prototypes, grid, coordinates = (each.double() for each in (features, prototypes, grid, coordinates))
    space = spatial_cost(grid, coordinates, spatial).repeat(len(features) // len(grid), 1)
    feature = feature_cost(features, prototypes)
    farthest = feature.max() if feature.max() > 1e-6 else 1
    return (1 - alpha) * feature / farthest + alpha * space / (space.max() or 1)


@properties
@given(problems(), st.integers(1, 60), st.booleans(), seeds)
def test_every_block_equals_the_dense_formula(problem, entries, kept, seed):
    cost = FusedCost(*problem, workspace=Workspace() if kept else None)
    expected = dense(*problem)
    torch.testing.assert_close(cost[:].double(), expected, atol=1e-5, rtol=1e-5)
    potential = torch.randn(expected.shape[1], generator=torch.Generator().manual_seed(seed))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("anomalib_ot.transport.costs._BLOCK_ENTRIES", entries)
        for matrix in (cost, DenseCost(expected.float())):
            exponents = matrix.exponents(potential, 0.1)
            rows = torch.cat([exponents(block).clone() for block in matrix.blocks()])
            torch.testing.assert_close(rows.double(), (potential - expected) / 0.1, atol=1e-4, rtol=1e-4)


@properties
@given(problems(), st.floats(1e-3, 1e3))
def test_length_of_features_does_not_matter(problem, factor):
    features, prototypes, *others = problem
    scaled = FusedCost(factor * features, factor * prototypes, *others)
    torch.testing.assert_close(scaled[:], FusedCost(*problem)[:], atol=1e-5, rtol=1e-5)


@properties
@given(st.integers(0, 6), st.integers(1, 20), st.integers(1, 12), st.integers(1, 100))
def test_blocks_follow_one_another_and_do_not_cut_across_images(images, cells, columns, entries):
    shape = torch.Size([images * cells, columns])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("anomalib_ot.transport.costs._BLOCK_ENTRIES", entries)
        blocks = list(row_blocks(shape, cells, torch.device("cpu")))
    assert [row for block in blocks for row in range(block.start, block.stop)] == list(range(shape[0]))
    for block in blocks:
        size = block.stop - block.start
        assert 0 < size <= max(1, entries // columns)
        is_whole = block.start % cells == 0 and block.stop % cells == 0
        assert is_whole or block.start // cells == (block.stop - 1) // cells


def test_rounding_errors_do_not_count_as_distances():
    generator = torch.Generator().manual_seed(0)
    # All have the same direction up to rounding.
    points = torch.randn(1, 50, generator=generator) * torch.rand(36, 1, generator=generator)
    grid = grid_coordinates(6, 6)
    assert feature_cost(points, points).abs().max() > 0
    assert FusedCost(points, points, grid, grid, 0.0)[:].abs().max() < 1e-5


def test_feature_costs_of_a_batch_are_those_of_its_members():
    features, prototypes = torch.randn(2, 7, 4), torch.randn(5, 4)
    costs = feature_cost(features, prototypes)
    torch.testing.assert_close(costs, torch.stack([feature_cost(each, prototypes) for each in features]))
    with pytest.raises(ValueError, match="features have 4 channels but prototypes have 3 channels"):
        feature_cost(features, prototypes[:, :3])


class Others(Processes):
    """Simulates further processes with four features, the farthest at a cosine distance of 0.5."""

    def total(self, value, device):
        del device
        return value + 4

    def min(self, tensor):
        return tensor.clamp(max=0.5)


@pytest.mark.parametrize("workspace", [None, Workspace()])
def test_a_process_may_have_no_images(workspace):
    grid = grid_coordinates(2, 2)
    cost = FusedCost(torch.rand(0, 3), torch.rand(4, 3), grid, grid, 0.3, processes=Others(), workspace=workspace)
    assert cost[:].shape == (0, 4)
    assert list(cost.blocks()) == []


def test_a_single_row_is_the_row_of_the_matrix():
    grid = grid_coordinates(2, 3)
    features, prototypes = torch.randn(12, 4), torch.randn(5, 4)
    cost = FusedCost(features, prototypes, grid, torch.rand(5, 2), 0.4)
    for row in range(12):
        torch.testing.assert_close(cost[row : row + 1], cost[:][row : row + 1])


@pytest.mark.parametrize("alpha", [-0.1, 1.1, math.nan])
def test_a_weight_out_of_range_is_refused(alpha):
    grid = grid_coordinates(2, 2)
    with pytest.raises(ValueError, match=rf"alpha must be in \[0, 1\], not {alpha}"):
        FusedCost(torch.rand(4, 3), torch.rand(4, 3), grid, grid, alpha)


@pytest.mark.parametrize("count", [1, 4])
def test_prototypes_need_a_coordinate_each(count):
    grid = grid_coordinates(2, 2)
    with pytest.raises(ValueError, match=f"5 prototypes cannot have {count} coordinates"):
        FusedCost(torch.rand(4, 3), torch.rand(5, 3), grid, grid[:count], 0.3)


def test_images_without_cells_are_refused():
    grid = grid_coordinates(2, 2)
    with pytest.raises(ValueError, match="4 features are not whole images of 0 cells"):
        FusedCost(torch.rand(4, 3), torch.rand(4, 3), grid[:0], grid, 0.3)


def test_coordinates_that_are_not_finite_are_refused():
    grid = grid_coordinates(2, 2)
    with pytest.raises(ValueError, match="NaN or infinite entries"):
        sinkhorn(FusedCost(torch.rand(4, 3), torch.rand(4, 3), grid, math.nan * grid, 0.3))


def test_one_dimension_may_be_a_single_cell():
    assert grid_coordinates(1, 3).tolist() == [[0, 0], [0, 0.5], [0, 1]]
    assert grid_coordinates(2, 1).tolist() == [[0, 0], [1, 0]]
