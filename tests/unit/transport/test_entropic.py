import warnings
from typing import get_args

import ot
import pytest
import torch

from anomalib_ot.transport import (
    DenseCost,
    FusedCost,
    NotConvergedWarning,
    Processes,
    Workspace,
    grid_coordinates,
    sinkhorn,
)
from anomalib_ot.transport.entropic import Method


def reference(cost, epsilon, iterations):
    """The plan of POT's log-domain solver, in float64."""
    cost = cost.double()
    rows, columns = (torch.full((size,), 1 / size, dtype=cost.dtype) for size in cost.shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ot.bregman.sinkhorn_log(rows, columns, cost, epsilon, numItermax=iterations, stopThr=0)


@pytest.mark.parametrize("epsilon", [1.0, 0.1, 0.01, 0.001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_plan_equals_pots_log_domain_solver(epsilon, dtype):
    cost = torch.rand(60, 25, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plan = sinkhorn(cost.to(dtype), epsilon, 200, 0)
    expected = reference(cost, epsilon, 200)
    assert (plan.dense() - expected).abs().max() * 60 < (1e-4 if dtype == torch.float32 else 1e-6)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("iterations", "epsilon"), [(1, 0.05), (7, 0.05), (100, 0.05), (1, 0.5), (3, 0.5)])
def test_the_reference_is_pots_solver_and_gives_the_same_plan(iterations, epsilon, weighted):
    generator = torch.Generator().manual_seed(0)
    cost, points = torch.rand(60, 25, generator=generator), torch.randn(60, 3, generator=generator)
    rows, columns = ((torch.rand(size, generator=generator) + 0.1).softmax(0) for size in (60, 25))
    marginals = {"row_weights": rows, "column_weights": columns} if weighted else {}
    ours, theirs = (sinkhorn(cost, epsilon, iterations, 0, method=method, **marginals) for method in get_args(Method))
    assert theirs.dense().dtype == torch.float64
    assert theirs.iterations == ours.iterations == iterations
    if not weighted:
        torch.testing.assert_close(theirs.dense(), reference(cost, epsilon, iterations))
    torch.testing.assert_close(ours.dense().double(), theirs.dense(), atol=1e-7, rtol=1e-4)
    torch.testing.assert_close(ours.barycentres(points).double(), theirs.barycentres(points), atol=1e-5, rtol=0)
    assert ours.transport_cost() == pytest.approx(theirs.transport_cost(), rel=1e-5)
    assert ours.marginal_error == pytest.approx(theirs.marginal_error, abs=1e-5)
    shift = ours.potential - theirs.potential
    torch.testing.assert_close(shift, shift.mean().expand(25), atol=1e-5, rtol=0)


class OwnCost:
    """A cost that tells no spread."""

    def __init__(self, matrix):
        self._cost = DenseCost(matrix)
        self.shape, self.blocks, self.exponents = matrix.shape, self._cost.blocks, self._cost.exponents

    def __getitem__(self, rows):
        return self._cost[rows]


@pytest.mark.parametrize(("iterations", "offset"), [(1, 0), (3, 0), (3, 100)])
@pytest.mark.parametrize("scale", [0.1, 1, 5])
def test_the_start_on_the_plain_kernel_changes_no_iterate(iterations, offset, scale):
    cost = torch.rand(60, 25, generator=torch.Generator().manual_seed(0)) * scale + offset
    plain, other = (sinkhorn(each, 0.5, iterations, 0) for each in (DenseCost(cost), OwnCost(cost)))
    torch.testing.assert_close(plain.dense(), other.dense(), atol=1e-7, rtol=1e-3 if offset else 1e-5)
    assert plain.marginal_error == pytest.approx(other.marginal_error, abs=1e-3 if offset else 1e-6)
    assert not plain.column_potential.any()
    assert other.column_potential.any()


def test_the_reference_has_a_tolerance_and_a_warm_start():
    cost = torch.rand(50, 20, generator=torch.Generator().manual_seed(0))
    cold = sinkhorn(cost, 0.05, 1000, 1e-5, method="reference")
    assert cold.marginal_error <= 1e-5
    assert 1 < cold.iterations < 1000
    # POT tests the error after the first iteration and then in every tenth.
    assert sinkhorn(cost, 0.05, 1000, 1e-5, cold.potential, method="reference").iterations == 1


def test_the_reference_refuses_unsupported_arguments():
    with pytest.warns(NotConvergedWarning, match="after 2 iterations"):
        sinkhorn(torch.rand(50, 20), 0.001, 2, 1e-6, method="reference")
    with pytest.raises(ValueError, match="'reference' does not accelerate its iterations; leave anderson at 0, not 5"):
        sinkhorn(torch.rand(3, 5), method="reference", anderson=5)
    with pytest.raises(ValueError, match="'reference' solves in one process"):
        sinkhorn(torch.rand(3, 5), method="reference", processes=Processes(object()))
    with pytest.raises(ValueError, match="the cost divided by ε = 1e-320 has NaN"):
        sinkhorn(torch.rand(3, 5), 1e-320, method="reference")


def test_marginals():
    plan = sinkhorn(torch.rand(50, 20), 0.05, max_iterations=1000, tolerance=1e-5)
    assert plan.iterations < 1000
    assert plan.marginal_error <= 1e-5
    torch.testing.assert_close(plan.dense().sum(1), torch.full((50,), 1 / 50))
    torch.testing.assert_close(plan.dense().sum(0), torch.full((20,), 1 / 20), atol=1e-6, rtol=1e-4)


def test_reported_error_is_that_of_the_plan():
    plan = sinkhorn(torch.rand(50, 20), 0.01, 3, 0)
    assert plan.iterations == 3
    error = (plan.dense().sum(0) - 1 / 20).abs().sum()
    assert plan.marginal_error == pytest.approx(float(error), rel=1e-3)
    assert plan.marginal_error > 1e-3


def test_columns_far_from_every_row_get_their_mass_without_overflow():
    cost = torch.rand(40, 30) * 0.01
    cost[:, :15] += 1.0
    plan = sinkhorn(cost, 0.001, max_iterations=2000, tolerance=1e-4)
    assert plan.dense().isfinite().all()
    assert plan.marginal_error <= 1e-4


def test_small_epsilon_converges_to_the_reference():
    cost = torch.rand(30, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plan = sinkhorn(cost.float(), 3e-4, max_iterations=20_000, tolerance=1e-4)
    assert plan.marginal_error <= 1e-4
    assert (plan.dense() - reference(cost, 3e-4, 20_000)).abs().max() * 30 < 1e-3


def test_barycentres_and_cost_equal_those_of_the_dense_plan():
    cost, points = torch.rand(33, 12), torch.randn(33, 5)
    plan = sinkhorn(cost, 0.05)
    torch.testing.assert_close(plan.barycentres(points), 12 * plan.dense().T @ points)
    assert plan.transport_cost() == pytest.approx(float((plan.dense() * cost).sum()), rel=1e-5)


def test_fused_cost_gives_the_plan_of_its_dense_matrix():
    grid = grid_coordinates(4, 4)
    problem = torch.randn(6 * 16, 8), torch.randn(32, 8), grid, grid.repeat(2, 1), 0.3
    expected = sinkhorn(FusedCost(*problem)[:]).dense()
    torch.testing.assert_close(sinkhorn(FusedCost(*problem)).dense(), expected, atol=1e-6, rtol=1e-4)
    kept = FusedCost(*problem, workspace=Workspace())
    torch.testing.assert_close(sinkhorn(kept).dense(), expected, atol=1e-6, rtol=1e-4)


def test_order_of_the_rows_does_not_matter():
    cost, points = torch.rand(40, 10), torch.randn(40, 3)
    order = torch.randperm(40)
    there = sinkhorn(cost[order]).barycentres(points[order])
    torch.testing.assert_close(sinkhorn(cost).barycentres(points), there, atol=1e-4, rtol=1e-4)


def test_warm_start_needs_fewer_iterations_for_the_same_plan():
    cost = torch.rand(80, 40)
    moved = cost + 0.001 * torch.rand(80, 40)
    cold = sinkhorn(moved, 0.02, max_iterations=2000, tolerance=1e-4)
    warm = sinkhorn(moved, 0.02, 2000, 1e-4, potential=sinkhorn(cost, 0.02, 2000, 1e-4).potential)
    assert warm.iterations < cold.iterations / 2
    torch.testing.assert_close(warm.dense(), cold.dense(), atol=1e-5, rtol=1e-2)


def test_a_workspace_reuses_its_memory():
    workspace = Workspace()
    sinkhorn(torch.rand(40, 20), workspace=workspace)
    before = workspace.take("kernel", torch.Size([1]), torch.float32, torch.device("cpu")).data_ptr()
    cost = torch.rand(30, 20)
    plan = sinkhorn(cost, workspace=workspace)
    assert workspace.take("kernel", torch.Size([1]), torch.float32, torch.device("cpu")).data_ptr() == before
    torch.testing.assert_close(plan.dense(), sinkhorn(cost).dense())


def test_blocks_cover_a_matrix_larger_than_one(monkeypatch):
    cost = torch.rand(50, 20)
    whole = sinkhorn(cost).dense()
    monkeypatch.setattr("anomalib_ot.transport.costs._BLOCK_ENTRIES", 60)
    torch.testing.assert_close(sinkhorn(cost).dense(), whole, atol=1e-7, rtol=1e-4)


def test_cost_is_not_changed():
    cost = torch.rand(10, 10)
    before = cost.clone()
    sinkhorn(cost)
    assert torch.equal(cost, before)


def test_given_marginals_are_met():
    rows, columns = torch.rand(40) + 0.1, torch.rand(15) + 0.1
    rows, columns = rows / rows.sum(), columns / columns.sum()
    cost, points = torch.rand(40, 15), torch.randn(40, 3)
    plan = sinkhorn(cost, 0.1, 1000, 1e-5, row_weights=rows, column_weights=columns)
    torch.testing.assert_close(plan.dense().sum(1), rows)
    torch.testing.assert_close(plan.dense().sum(0), columns, atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(plan.barycentres(points), plan.dense().T @ points / columns[:, None])
    expected = ot.bregman.sinkhorn_log(rows, columns, cost, 0.1, numItermax=1000, stopThr=1e-9, warn=False)
    assert (plan.dense() - expected).abs().max() * 40 < 1e-3


def test_a_solve_that_does_not_converge_warns_with_the_error():
    with pytest.warns(NotConvergedWarning, match="after 2 iterations with a marginal error of"):
        sinkhorn(torch.rand(50, 20), 0.001, max_iterations=2, tolerance=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sinkhorn(torch.rand(50, 20), 0.001, 2, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cost": torch.rand(3)}, "non-empty matrix"),
        ({"cost": torch.rand(0, 3)}, "non-empty matrix"),
        ({"method": "exact"}, "method must be one of stabilized, reference, not 'exact'"),
        ({"epsilon": 0}, "epsilon must be positive"),
        ({"epsilon": float("nan")}, "epsilon must be positive"),
        ({"max_iterations": 0}, "at least 1"),
        ({"anderson": -1}, "anderson must be a whole number of at least 0, not -1"),
        ({"anderson": 2.5}, "anderson must be a whole number of at least 0, not 2.5"),
        (
            {"potential": torch.zeros(4)},
            r"potential must be of shape \(5,\), an entry for each column of cost, not \(4,\)",
        ),
        ({"row_weights": torch.tensor([0.5, 0.5, 0.0])}, "row_weights must be positive"),
        ({"column_weights": torch.tensor([1, -1, 1, 1, 1.0])}, "column_weights must be positive"),
        ({"column_weights": torch.ones(3)}, r"column_weights must be of shape \(5,\), not \(3,\)"),
        ({"column_weights": torch.ones(5)}, "row_weights sum to 1 but column_weights to 5"),
        ({"cost": torch.full((3, 5), float("nan"))}, "NaN or infinite"),
        ({"cost": torch.rand(3, 5).index_fill(1, torch.tensor([2]), float("inf"))}, "NaN or infinite"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        sinkhorn(**{"cost": torch.rand(3, 5), **arguments})
