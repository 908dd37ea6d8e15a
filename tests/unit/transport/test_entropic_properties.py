"""Entropic transport on random problems: properties of the plan, and POT's log-domain solver in float64."""

import math
import warnings
from contextlib import contextmanager

import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anomalib_ot.transport import FusedCost, Workspace, grid_coordinates, sinkhorn
from anomalib_ot.transport._kernels import DenseKernel, RecomputedKernel
from anomalib_ot.transport._sparse import SparseKernel

properties = settings(derandomize=True, deadline=None, database=None, max_examples=40)
sizes = st.integers(1, 10)
seeds = st.integers(0, 2**32 - 1)
precisions = st.sampled_from([torch.float32, torch.float64])


def powers(lowest, highest):
    return st.floats(lowest, highest).map(lambda power: 10**power)


epsilons = powers(-4, 1)
# Largest cost in units of ε. Up to about 60, no entry of the first kernel is negligible, and iterations equal POT's.
moderate = powers(-6, 1.5)
# Up to this ratio, plans converge in few iterations and can be compared.
easy = powers(-6, 0.7)


@st.composite
def matrices(draw, rows=sizes, columns=sizes):
    """Costs in [0, 1], in float64: all different, with ties, with duplicated points, or all equal."""
    rows, columns, generator = draw(rows), draw(columns), torch.Generator().manual_seed(draw(seeds))
    cost = torch.rand(rows, columns, generator=generator, dtype=torch.float64)
    kind = draw(st.sampled_from(["different", "ties", "zeros", "duplicates", "equal"]))
    if kind == "ties":
        cost = (4 * cost).round() / 4
    elif kind == "zeros":
        cost = cost.round()
    elif kind == "duplicates":
        cost = cost[torch.arange(rows) // 2][:, torch.arange(columns) // 2]
    elif kind == "equal":
        cost = cost[:1, :1].expand(rows, columns).clone()
    return cost


def weights(size, seed):
    drawn = torch.rand(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1
    return drawn / drawn.sum()


def reference(cost, epsilon, iterations, a=None, b=None):
    cost = cost.double()
    a, b = (cost.new_full((n,), 1 / n) if w is None else w for n, w in zip(cost.shape, (a, b), strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ot.bregman.sinkhorn_log(a, b, cost, epsilon, numItermax=iterations, stopThr=0)


def distance(plan, other):
    """L1 distance of two plans, each with a mass of one."""
    return float((plan - other).abs().sum())


def converged(cost, epsilon, **arguments):
    plan = sinkhorn(cost, epsilon, 2000, 1e-9, **arguments)
    assert plan.marginal_error <= 1e-9
    return plan.dense()


@properties
@given(matrices(), moderate, epsilons, st.integers(1, 60), precisions, st.booleans())
def test_plan_after_so_many_iterations_is_pots(cost, ratio, epsilon, iterations, dtype, weighted):
    cost = ratio * epsilon * cost
    marginals = {"a": weights(cost.shape[0], 1), "b": weights(cost.shape[1], 2)} if weighted else {}
    plan = sinkhorn(
        cost.to(dtype), epsilon, iterations, 0, row_weights=marginals.get("a"), column_weights=marginals.get("b")
    )
    assert plan.dense().dtype == dtype
    rounding = torch.finfo(dtype).eps * (1 + ratio)
    assert distance(plan.dense(), reference(cost, epsilon, iterations, **marginals)) < 10 * rounding


@properties
@given(matrices(), powers(-6, 6), epsilons, precisions)
def test_extreme_costs_give_a_plan_between_the_best_and_its_entropy(cost, ratio, epsilon, dtype):
    cost = (ratio * epsilon * cost).to(dtype)
    plan = sinkhorn(cost, epsilon, 300, 0)
    dense = plan.dense().double()
    rows, columns = cost.shape
    rounding = 10 * torch.finfo(dtype).eps
    assert dense.isfinite().all()
    assert (dense >= 0).all()
    assert (rows * dense.sum(1) - 1).abs().max() < rounding * columns
    assert plan.marginal_error == pytest.approx(float((dense.sum(0) - 1 / columns).abs().sum()), abs=rounding)
    # Unregularised transport has the minimum cost, and the entropy of the plan adds at most ε log min(N, P).
    least = float(ot.emd2([], [], cost.double().numpy()))
    slack = (plan.marginal_error + rounding) * float(cost.max() - cost.min()) + rounding * float(cost.max())
    found = float((dense * cost).sum())
    assert least - slack <= found <= least + epsilon * math.log(min(rows, columns)) + slack + rounding * epsilon
    assert plan.transport_cost() == pytest.approx(found, abs=rounding * (epsilon + float(cost.max())))


@properties
@given(matrices(), easy, epsilons, st.booleans())
def test_swapped_sides_transpose_the_plan(cost, ratio, epsilon, weighted):
    cost = ratio * epsilon * cost
    a, b = (weights(size, size) if weighted else None for size in cost.shape)
    plan = converged(cost, epsilon, row_weights=a, column_weights=b)
    swapped = converged(cost.T.contiguous(), epsilon, row_weights=b, column_weights=a)
    assert distance(plan, swapped.T) < 1e-6


@properties
@given(matrices(), moderate, epsilons, st.integers(-30, 30), precisions)
def test_costs_and_epsilon_in_another_unit_give_the_same_plan(cost, ratio, epsilon, power, dtype):
    cost = (ratio * epsilon * cost).to(dtype)
    plan = sinkhorn(cost, epsilon, 20, 0)
    # Scaling by a power of two has no rounding error, so all digits are the same.
    scaled = sinkhorn(2.0**power * cost, 2.0**power * epsilon, 20, 0)
    assert torch.equal(scaled.dense(), plan.dense())
    assert torch.equal(scaled.potential, 2.0**power * plan.potential)


@properties
@given(matrices(), easy, epsilons, seeds)
def test_what_each_point_pays_in_any_case_does_not_matter(cost, ratio, epsilon, seed):
    generator = torch.Generator().manual_seed(seed)
    tolls = torch.randn(sum(cost.shape), generator=generator, dtype=torch.float64).split(list(cost.shape))
    taxed = cost + tolls[0][:, None] + tolls[1]
    unit = ratio * epsilon
    assert distance(converged(unit * cost, epsilon), converged(unit * taxed, epsilon)) < 1e-6


@properties
@given(matrices(), easy, epsilons, st.data())
def test_a_duplicated_point_shares_what_one_would_get(cost, ratio, epsilon, data):
    cost = ratio * epsilon * cost
    a, b = (weights(size, size) for size in cost.shape)
    expected = converged(cost, epsilon, row_weights=a, column_weights=b)
    row, column = (data.draw(st.integers(0, size - 1)) for size in cost.shape)
    rows, columns = torch.tensor([*range(len(a)), row]), torch.tensor([*range(len(b)), column])
    half_rows, half_columns = torch.where(rows == row, 0.5, 1.0), torch.where(columns == column, 0.5, 1.0)
    plan = converged(
        cost[rows][:, columns], epsilon, row_weights=half_rows * a[rows], column_weights=half_columns * b[columns]
    )
    assert distance(plan, half_rows[:, None] * half_columns * expected[rows][:, columns]) < 1e-6


@properties
@given(st.one_of(matrices(rows=st.just(1)), matrices(columns=st.just(1))), powers(-6, 6), epsilons)
def test_one_point_on_a_side_leaves_no_choice(cost, ratio, epsilon):
    a, b = (weights(size, size).float() for size in cost.shape)
    plan = sinkhorn((ratio * epsilon * cost).float(), epsilon, 200, 0, row_weights=a, column_weights=b)
    torch.testing.assert_close(plan.dense(), a[:, None] * b, atol=1e-7, rtol=1e-5)


@properties
@given(sizes, sizes, st.floats(-1e6, 1e6), epsilons)
def test_equal_points_share_alike(rows, columns, cost, epsilon):
    a, b = weights(rows, 1).float(), weights(columns, 2).float()
    plan = sinkhorn(torch.full((rows, columns), cost), epsilon, 1, 0, row_weights=a, column_weights=b)
    torch.testing.assert_close(plan.dense(), a[:, None] * b, atol=1e-7, rtol=1e-5)


@properties
@given(matrices(), moderate, epsilons, seeds)
def test_permuted_points_permute_the_plan(cost, ratio, epsilon, seed):
    cost = ratio * epsilon * cost
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (torch.randperm(size, generator=generator) for size in cost.shape)
    plan, permuted = sinkhorn(cost, epsilon, 30, 0), sinkhorn(cost[rows][:, columns], epsilon, 30, 0)
    assert distance(permuted.dense(), plan.dense()[rows][:, columns]) < 1e-12 * (1 + ratio)
    assert permuted.transport_cost() == pytest.approx(plan.transport_cost(), abs=1e-12 * epsilon * (1 + ratio))


@properties
@given(matrices(), easy, epsilons, seeds, st.floats(0, 20))
def test_a_warm_start_from_anywhere_ends_at_the_same_plan(cost, ratio, epsilon, seed, spread):
    cost = ratio * epsilon * cost
    start = spread * epsilon * torch.randn(cost.shape[1], generator=torch.Generator().manual_seed(seed))
    assert distance(converged(cost, epsilon, potential=start), converged(cost, epsilon)) < 1e-6


@properties
@given(matrices(), easy, epsilons)
def test_a_warm_start_from_the_solution_is_the_solution(cost, ratio, epsilon):
    cold = sinkhorn(ratio * epsilon * cost, epsilon, 2000, 1e-9)
    warm = sinkhorn(ratio * epsilon * cost, epsilon, 2000, 1e-8, potential=cold.potential)
    assert warm.iterations == 1
    assert distance(warm.dense(), cold.dense()) < 1e-8


@properties
@given(matrices(), moderate, epsilons, st.integers(1, 30), st.booleans())
def test_barycentres_and_cost_are_those_of_the_explicit_plan(cost, ratio, epsilon, iterations, weighted):
    cost = ratio * epsilon * cost
    a, b = (weights(size, size) if weighted else None for size in cost.shape)
    plan = sinkhorn(cost, epsilon, iterations, 0, row_weights=a, column_weights=b)
    points = torch.randn(cost.shape[0], 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = plan.dense().T @ points / plan.column_weights[:, None]
    torch.testing.assert_close(plan.barycentres(points), expected)
    # The cost is a sum of potentials and entropy of the size of ε, and has no more digits than these.
    assert plan.transport_cost() == pytest.approx(float((plan.dense() * cost).sum()), abs=1e-13 * epsilon * (1 + ratio))
    torch.testing.assert_close(plan.column_sums, plan.dense().sum(0))


@contextmanager
def only(form, entries):
    """A workspace in which a problem gets a kernel of a given form, in blocks of a quarter."""
    bytes_of_entry = {"sparse": 100, "dense": 4, "none": 1}[form]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("anomalib_ot.transport._kernels._SPARSE_ENTRIES", 0 if form == "sparse" else math.inf)
        patch.setattr("anomalib_ot.transport._sparse._SPARSE", 2.0)
        if form == "sparse":
            # It is also tried for costs that vary too little for it to pay.
            patch.setattr("anomalib_ot.transport._kernels.spread_of", lambda _: math.inf)
        patch.setattr("anomalib_ot.transport.costs._BLOCK_ENTRIES", entries // 4)
        yield Workspace(bytes_of_entry * entries)


# Tolerance of each form: entries of 10⁻⁴ of a marginal, or rounding.
FORMS = {
    "sparse": (SparseKernel, 1e-3),
    "dense": (DenseKernel, 1e-4),
    "none": (RecomputedKernel, 1e-4),
}


@pytest.mark.parametrize("form", FORMS)
@settings(properties, max_examples=15)
@given(
    images=st.integers(1, 4),
    side=st.integers(2, 4),
    per_cell=st.integers(1, 3),
    alpha=st.sampled_from([0.0, 0.3, 1.0]),
    epsilon=st.sampled_from([0.02, 0.1, 1.0]),
    kind=st.sampled_from(["squared", "euclidean"]),
    kept=st.booleans(),
    seed=seeds,
)
def test_every_form_of_the_kernel_gives_pots_plan_of_the_dense_cost(
    form, images, side, per_cell, alpha, epsilon, kind, kept, seed
):
    generator = torch.Generator().manual_seed(seed)
    grid = grid_coordinates(side, side)
    features = torch.randn(images * side**2, 5, generator=generator)
    prototypes = torch.randn(per_cell * side**2, 5, generator=generator)
    problem = features, prototypes, grid, grid.repeat(per_cell, 1), alpha, kind
    dense = FusedCost(*(each.double() if isinstance(each, torch.Tensor) else each for each in problem))[:]
    expected = reference(dense, epsilon, 50)
    with only(form, expected.numel()) as workspace:
        cost = FusedCost(*problem, workspace=Workspace() if kept else None)
        plan = sinkhorn(cost, epsilon, 50, 0, workspace=workspace)
        found, barycentres, price = plan.dense(), plan.barycentres(features), plan.transport_cost()
    kernel, error = FORMS[form]
    assert type(plan.kernel) is kernel
    assert distance(found, expected) < error
    assert (len(found) * found.sum(1) - 1).abs().max() < 1e-5
    expected_barycentres = expected.T.float() @ features * expected.shape[1]
    assert (barycentres - expected_barycentres).abs().max() < 4 * error * expected.shape[1]
    assert price == pytest.approx(float((expected * dense).sum()), abs=2 * error * (epsilon + 1))


@properties
@given(matrices(), moderate, epsilons, st.sampled_from([1, 7, 30]))
def test_single_precision_loses_no_more_than_its_digits(cost, ratio, epsilon, iterations):
    cost = ratio * epsilon * cost
    plans = [sinkhorn(cost.to(dtype), epsilon, iterations, 0).dense() for dtype in (torch.float32, torch.float64)]
    assert distance(*plans) < 1e-6 * (1 + ratio)


def test_entries_that_cannot_be_told_from_zero_are_zero():
    cost = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    assert torch.equal(sinkhorn(cost, 1 / 65).dense(), torch.eye(2) / 2)
    assert (sinkhorn(cost, 1 / 55).dense() > 0).all()


@pytest.mark.parametrize("entry", [math.nan, math.inf, -math.inf])
def test_a_warm_start_that_is_not_finite_is_refused(entry):
    with pytest.raises(ValueError, match=r"^potential has NaN or infinite entries"):
        sinkhorn(torch.rand(3, 2), potential=torch.tensor([0.0, entry]))


@pytest.mark.parametrize("tolerance", [-1e-3, math.nan])
def test_a_tolerance_below_zero_is_refused(tolerance):
    with pytest.raises(ValueError, match=f"tolerance must be at least 0, not {tolerance}"):
        sinkhorn(torch.rand(3, 2), tolerance=tolerance)


def test_an_epsilon_too_small_for_the_precision_is_refused_by_name():
    with pytest.raises(ValueError, match="the cost divided by ε = 1e-45 has NaN or infinite entries"):
        sinkhorn(torch.rand(3, 2), 1e-45)


def test_the_largest_costs_are_not_taken_for_infinite():
    plan = sinkhorn(torch.tensor([[3e38, 2e38], [3e38, 2e38], [3e38, 2e38]]), 1e36)
    torch.testing.assert_close(plan.dense(), torch.full((3, 2), 1 / 6))


@pytest.mark.parametrize("mass", [1e-3, 1.0, 1e3])
def test_both_sides_must_weigh_the_same_up_to_rounding(mass):
    rows, columns = torch.full((4,), mass / 4), torch.full((5,), mass / 5)
    plan = sinkhorn(torch.rand(4, 5), 0.5, row_weights=rows, column_weights=(1 + 5e-5) * columns)
    assert float(plan.dense().sum()) == pytest.approx(mass, rel=1e-4)
    with pytest.raises(ValueError, match="scale them to the same sum"):
        sinkhorn(torch.rand(4, 5), 0.5, row_weights=rows, column_weights=(1 + 5e-4) * columns)
