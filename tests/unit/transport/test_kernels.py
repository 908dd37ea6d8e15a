import math
import sys

import pytest
import torch

from anomalib_ot.transport import DenseCost, FusedCost, Workspace, grid_coordinates, sinkhorn
from anomalib_ot.transport._kernels import DenseKernel, RecomputedKernel
from anomalib_ot.transport._sparse import SparseKernel

MEGABYTE = 1e6
CELLS, CHANNELS, PER_CELL, IMAGES = 64, 16, 6, 48
HUNDRED = {"max_iterations": 100, "tolerance": 0}


@pytest.fixture(scope="module")
def problem():
    """Features of similar images, as of one product, and prototypes at some of them: 3072 × 384."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(CELLS, CHANNELS, generator=generator)
    features = common + 0.3 * torch.randn(IMAGES, CELLS, CHANNELS, generator=generator)
    prototypes = common + 0.3 * torch.randn(PER_CELL, CELLS, CHANNELS, generator=generator)
    grid = grid_coordinates(8, 8)
    return features.flatten(0, 1), prototypes.flatten(0, 1), grid, grid.repeat(PER_CELL, 1)


def solve(problem, memory, alpha=0.3, **options):
    cost = FusedCost(*problem, alpha, "euclidean")
    return sinkhorn(cost, 0.01, **{**HUNDRED, "workspace": Workspace(memory), **options})


@pytest.fixture(scope="module")
def exact(problem):
    return sinkhorn(FusedCost(*problem, 0.3, "euclidean")[:].double(), 0.01, 100, 0)


# The dense kernel takes 4.7 MB.
@pytest.mark.parametrize(
    ("memory", "kind", "error"),
    [(2**31, SparseKernel, 1e-4), (5 * MEGABYTE, DenseKernel, 1e-4), (2 * MEGABYTE, RecomputedKernel, 1e-4)],
)
def test_each_form_gives_the_plan_of_the_dense_kernel_in_float64(problem, exact, memory, kind, error, monkeypatch):
    if kind is not SparseKernel:
        monkeypatch.setattr("anomalib_ot.transport._kernels._SPARSE_ENTRIES", math.inf)
        monkeypatch.setattr("anomalib_ot.transport.costs._BLOCK_ENTRIES", 2**18)
    plan = solve(problem, memory)
    assert type(plan.kernel) is kind
    points = problem[0]
    assert (plan.dense() - exact.dense()).abs().sum() < error
    assert (plan.dense().sum(0) - 1 / 384).abs().max() * 384 < 1e-3
    assert plan.transport_cost() == pytest.approx(exact.transport_cost(), rel=error)
    torch.testing.assert_close(plan.barycentres(points), exact.barycentres(points.double()).float(), atol=error, rtol=0)
    assert plan.marginal_error == pytest.approx(float((plan.dense().sum(0) - 1 / 384).abs().sum()), abs=1e-5)


def test_omitted_entries_are_within_the_proven_bound(problem):
    plan = solve(problem, 2**31)
    ratio = plan.column_scaling.max() / plan.column_scaling.min()
    assert math.log(ratio) <= plan.kernel.widest
    full = torch.exp(
        (plan.row_potential[:, None] + plan.column_potential - FusedCost(*problem, 0.3, "euclidean")[:]) / 0.01
    )
    kept = torch.cat([block for _, block in plan.kernel.blocks()])
    dropped = torch.where(kept == 0, full, 0.0)
    assert 0 < float((dropped > 0).float().mean()) < 1
    assert ((dropped @ plan.column_scaling) / (full @ plan.column_scaling)).max() < 1e-4
    assert 384 * ((plan.row_scaling @ dropped) * plan.column_scaling).max() < 1e-4


def test_scalings_far_apart_rebuild_a_sparse_kernel(problem):
    potential = solve(problem, 2**31).potential + 0.3 * torch.rand(384)
    plan = solve(problem, 2**31, potential=potential, max_iterations=400, tolerance=1e-3)
    assert isinstance(plan.kernel, SparseKernel)
    exact = sinkhorn(FusedCost(*problem, 0.3, "euclidean")[:].double(), 0.01, 2000, 1e-6)
    assert plan.marginal_error <= 1e-3
    assert (plan.dense() - exact.dense()).abs().sum() < 0.02


@pytest.fixture
def allowances(monkeypatch):
    """The allowance of each kernel of a solve."""
    module, made = sys.modules["anomalib_ot.transport.entropic"], []
    make = module.make_kernel

    def recording(*arguments):
        made.append(arguments[-1])
        return make(*arguments)

    monkeypatch.setattr(module, "make_kernel", recording)
    return made


def test_a_cold_start_builds_one_kernel(problem, allowances):
    plan = solve(problem, 2**31)
    assert allowances == [2.0]
    assert plan.column_scaling.log().abs().max() < 2


def test_a_kernel_that_is_too_narrow_is_rebuilt_for_twice_the_allowance(problem, allowances):
    wide = solve(problem, 2**31, potential=0.02 * torch.arange(384) / 384)
    assert allowances == [2.0, 4.0]
    assert wide.kernel.widest == 4.0
    assert (wide.dense() - solve(problem, 2**31).dense()).abs().sum() < 1e-3


def test_a_kernel_with_many_entries_is_dense(problem):
    plan = sinkhorn(FusedCost(*problem, 0.3, "euclidean"), 1.0)
    assert isinstance(plan.kernel, DenseKernel)


@pytest.fixture
def solve_rounded(problem, monkeypatch):
    """Solve with similarities in 16 bits, in memory that has room for these and a sparse kernel only."""
    monkeypatch.setattr("anomalib_ot.transport.costs._BLOCK_ENTRIES", 2**18)

    def solved(alpha=0.3, **options):
        workspace = Workspace(3.6 * MEGABYTE)
        cost = FusedCost(*problem, alpha, "euclidean", workspace=workspace)
        assert cost._stored.matrix.dtype == torch.int16
        return sinkhorn(cost, **{"epsilon": 0.01, **HUNDRED, "workspace": workspace, **options}), workspace

    return solved


def test_rounded_similarities_give_the_plan_of_the_dense_kernel_in_float64(exact, solve_rounded):
    plan, workspace = solve_rounded()
    assert isinstance(plan.kernel, SparseKernel)
    assert (plan.dense() - exact.dense()).abs().sum() < 1e-3
    assert plan.transport_cost() == pytest.approx(exact.transport_cost(), rel=1e-4)
    assert workspace._buffers["similarities"].numel() == 2 * 3072 * 384


def test_a_kernel_that_does_not_fit_is_computed_from_rounded_similarities(problem, solve_rounded, monkeypatch):
    monkeypatch.setattr("anomalib_ot.transport._sparse._SPARSE", 0.0)
    # Scalings grow apart, so that the kernel is built more than once.
    plan, workspace = solve_rounded(epsilon=0.004, max_iterations=300)
    assert isinstance(plan.kernel, RecomputedKernel)
    assert set(workspace._buffers) == {"similarities", "values", "columns"}
    exact = sinkhorn(FusedCost(*problem, 0.3, "euclidean")[:].double(), 0.004, 300, 0)
    assert (plan.dense() - exact.dense()).abs().sum() < 0.01


def test_rounding_changes_a_cost_within_the_documented_bound(problem):
    cost = FusedCost(*problem, 0.3, "euclidean", workspace=Workspace(4 * MEGABYTE))
    exponents = cost.exponents(torch.zeros(384), 1.0)
    for rows in cost.blocks():
        assert (exponents(rows) + cost[rows]).abs().max() <= 2**-17
        affine = exponents.affine(rows)
        cells = (torch.arange(len(affine.matrix)) + affine.first) % len(affine.offsets)
        again = affine.offsets[cells] + affine.slopes[:, None] * affine.matrix + affine.shifts[:, None]
        torch.testing.assert_close(again, exponents(rows), rtol=0, atol=1e-6)


def test_rounded_similarities_are_not_used_if_epsilon_is_small(problem):
    workspace = Workspace(4 * MEGABYTE)
    exponents = FusedCost(*problem, 0.3, "euclidean", workspace=workspace).exponents(torch.zeros(384), 1e-3)
    exact = FusedCost(*problem, 0.3, "euclidean")[:64] / -1e-3
    torch.testing.assert_close(exponents(slice(0, 64)), exact, rtol=1e-5, atol=1e-2)
    assert not exponents.bytes_in(workspace)


def test_memory_below_one_block_is_refused(problem):
    with pytest.raises(ValueError, match="memory for transport is 100 bytes, but one block needs 4"):
        solve(problem, 100)
    with pytest.raises(ValueError, match="must be positive, not 0 bytes"):
        Workspace(0)


def test_entries_that_are_not_finite_are_refused_in_every_form(problem):
    features, *others = problem
    broken = features.index_fill(0, torch.tensor([7]), float("nan"))
    with pytest.raises(ValueError, match="NaN or infinite"):
        FusedCost(broken, *others, 0.3)
    with pytest.raises(ValueError, match="NaN or infinite"):
        DenseCost(torch.tensor([[0.0, math.inf]]))
    with pytest.raises(ValueError, match="nothing to transport from 0 features"):
        FusedCost(features[:0], *others, 0.3)


@pytest.mark.parametrize("memory", [2**31, 3.6 * MEGABYTE, 3 * MEGABYTE])
def test_the_default_type_of_new_tensors_does_not_matter(problem, memory, monkeypatch):
    monkeypatch.setattr("anomalib_ot.transport.costs._BLOCK_ENTRIES", 2**18)

    def solved():
        workspace = Workspace(memory)
        plan = sinkhorn(FusedCost(*problem, 0.3, "euclidean", workspace=workspace), 0.01, 5, 0, workspace=workspace)
        return plan.dense(), plan.barycentres(problem[0]), torch.tensor(plan.transport_cost(), dtype=torch.float64)

    expected = solved()
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = solved()
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
