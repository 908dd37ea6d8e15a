"""The solver with the names and results of ``ot.solve``, compared with it on small problems."""

import subprocess
import sys
import warnings

import ot
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from anomalib_ot.transport import (
    DenseCost,
    FusedCost,
    NotConvergedWarning,
    Workspace,
    grid_coordinates,
    sinkhorn,
    solve,
)

LOADED = """
import sys
import torch
from anomalib_ot.transport import solve
solve(torch.rand(30, 20), reg=0.1)
heavy = {"anomalib", "lightning", "matplotlib", "numba", "ot", "pandas", "scipy", "sklearn", "timm", "torchvision"}
ours = {name.partition(".")[2].partition(".")[0] for name in sys.modules if name.startswith("anomalib_ot.")}
print(sorted(heavy & {*sys.modules}), sorted(ours))
"""


def problem(*shape, dtype=torch.float64, seed=0):
    """Costs and weights of both sides, drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    *batch, rows, columns = shape
    sides = (torch.rand(*batch, size, generator=generator, dtype=dtype).softmax(-1) for size in (rows, columns))
    return torch.rand(shape, generator=generator, dtype=dtype), *sides


def pot(cost, a, b, reg, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ot.solve(cost, a, b, reg=reg, max_iter=20_000, tol=1e-12, **options)


def centred(vector):
    return vector - vector.mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("epsilon", [1.0, 0.1, 0.01])
def test_the_result_is_that_of_ot_solve(epsilon, dtype):
    cost, a, b = problem(40, 25)
    result, expected = solve(cost.to(dtype), a.to(dtype), b.to(dtype), epsilon), pot(cost, a, b, epsilon)
    error = 1e-4 if dtype == torch.float32 else 1e-7
    assert result.marginal_error <= (1e-5 if dtype == torch.float32 else 1e-9)
    assert result.value.dtype == result.plan.dtype == dtype
    assert (result.plan - expected.plan).abs().sum() < error
    assert float(result.value) == pytest.approx(float(expected.value), abs=error)
    assert float(result.value_linear) == pytest.approx(float(expected.value_linear), abs=error)
    for ours, theirs in zip(result.potentials, expected.potentials, strict=True):
        torch.testing.assert_close(centred(ours).double(), epsilon * centred(theirs), atol=error, rtol=0)


def test_gradients_are_those_that_pot_computes_through_its_iterations():
    given = [each.requires_grad_() for each in problem(12, 9)]
    ours = torch.autograd.grad(solve(*given, 0.1).value, given)
    theirs = torch.autograd.grad(pot(*given, 0.1).value, given)
    torch.testing.assert_close(ours[0], theirs[0], atol=1e-8, rtol=1e-6)
    # A gradient for weights of a fixed sum is defined up to a constant.
    for mine, other in zip(ours[1:], theirs[1:], strict=True):
        torch.testing.assert_close(mine, centred(other), atol=1e-7, rtol=1e-5)


def test_the_gradient_of_a_batch_is_that_of_each_problem():
    costs = problem(3, 10, 8)[0].requires_grad_()
    weights = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    (solve(costs, reg=0.1).value * weights).sum().backward()
    for cost, gradient, weight in zip(costs, costs.grad, weights, strict=True):
        torch.testing.assert_close(gradient, weight * solve(cost.detach(), reg=0.1).plan, atol=1e-8, rtol=0)


def test_points_that_follow_the_gradient_lower_the_value():
    points, targets = torch.rand(20, 2), torch.rand(30, 2)
    points.requires_grad_()
    before = solve(torch.cdist(points, targets).square(), reg=0.05).value
    before.backward()
    moved = points.detach() - points.grad
    assert solve(torch.cdist(moved, targets).square(), reg=0.05).value < before


@pytest.mark.parametrize("shared", [False, True])
def test_a_batch_gives_the_results_of_its_problems(shared):
    costs, a, b = problem(4, 15, 10)
    a, b = (a[0], b[0]) if shared else (a, b)
    together = solve(costs, a, b, 0.02)
    assert together.plan.shape == costs.shape
    assert [each.shape for each in together.potentials] == [(4, 15), (4, 10)]
    for index, cost in enumerate(costs):
        alone = solve(cost, *((a, b) if shared else (a[index], b[index])), 0.02)
        torch.testing.assert_close(together.plan[index], alone.plan, atol=1e-8, rtol=0)
        torch.testing.assert_close(together.value[index], alone.value, atol=1e-8, rtol=0)
        torch.testing.assert_close(together.value_linear[index], alone.value_linear, atol=1e-8, rtol=0)


@pytest.mark.parametrize("kind", ["small", "large", "cost", "fused"])
def test_each_way_to_give_a_problem_gives_the_plan_of_sinkhorn(kind, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    if kind == "fused":
        grid = grid_coordinates(4, 4)
        features, prototypes = (torch.rand(count, 8, generator=generator) for count in (64, 32))
        cost = FusedCost(features, prototypes, grid, grid.repeat(2, 1), 0.3)
    else:
        cost = torch.rand(64, 32, generator=generator)
    monkeypatch.setattr("anomalib_ot.transport.solvers._SMALL", 0 if kind == "large" else 2**18)
    result = solve(DenseCost(cost) if kind == "cost" else cost, reg=0.02, workspace=Workspace())
    plan = sinkhorn(cost, 0.02)
    assert (result.plan - plan.dense()).abs().sum() < 1e-4
    assert float(result.value_linear) == pytest.approx(plan.transport_cost(), rel=1e-4)
    f, g = result.potentials
    torch.testing.assert_close(((f[:, None] + g - cost[:]) / 0.02).exp(), result.plan, atol=1e-7, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_solved_in_single_precision(dtype):
    cost = torch.rand(30, 20, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    result = solve(cost, reg=0.1)
    result.value.backward()
    assert torch.equal(result.value, solve(cost.detach().float(), reg=0.1).value)
    assert torch.equal(cost.grad, result.plan.to(dtype))
    assert torch.equal(sinkhorn(cost.detach(), 0.1).dense(), sinkhorn(cost.detach().float(), 0.1).dense())
    grid, vectors = grid_coordinates(2, 2), torch.rand(4, 3).to(dtype)
    assert sinkhorn(FusedCost(vectors, vectors, grid.to(dtype), grid, 0.3), 0.1).dense().dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_acceleration_needs_a_third_of_the_iterations_for_the_same_plan(dtype):
    cost, a, b = problem(60, 40, dtype=dtype)
    plain, accelerated = (solve(cost, a, b, 0.003, max_iter=20_000, anderson=memory) for memory in (0, 5))
    assert accelerated.iterations < plain.iterations / 3
    assert (plain.plan - accelerated.plan).abs().sum() < (1e-3 if dtype == torch.float32 else 1e-7)


def test_potentials_of_a_similar_problem_are_a_start():
    cost, a, b = problem(60, 40)
    start = solve(cost, a, b, 0.02).potentials
    assert solve(cost, a, b, 0.02, potentials_init=start).iterations <= 2
    costs, many, weights = problem(3, 60, 40, seed=1)
    starts = solve(costs, many, weights, 0.02).potentials
    assert solve(costs, many, weights, 0.02, potentials_init=starts).iterations <= 2


@pytest.mark.parametrize(
    "solver", [lambda cost: solve(cost, reg=1e-4, max_iter=5), lambda cost: sinkhorn(cost, 1e-4, 5)]
)
def test_a_default_tolerance_that_is_not_reached_warns(solver):
    with pytest.warns(NotConvergedWarning, match="after 5 iterations") as caught:
        solver(torch.rand(50, 20))
    assert caught[0].filename == __file__


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.float64, 1e-9)])
def test_the_default_tolerance_depends_on_the_precision(dtype, error):
    plan = sinkhorn(problem(50, 20, dtype=dtype)[0], 0.1)
    assert plan.marginal_error <= error
    assert plan.iterations < 1000


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["batch", "single", "large"])
@pytest.mark.filterwarnings("error")
def test_the_default_tolerance_is_relative_to_the_weights(kind, dtype, monkeypatch):
    monkeypatch.setattr("anomalib_ot.transport.solvers._SMALL", 0 if kind == "large" else 2**18)
    costs, a, b = problem(3, 30, 20, dtype=dtype)
    masses = torch.tensor([[1e-4], [1.0], [1e3]], dtype=dtype)
    results = (
        [solve(costs, masses * a, masses * b, 0.02)]
        if kind == "batch"
        else [solve(*each, 0.02) for each in zip(costs, masses * a, masses * b, strict=True)]
    )
    sums = torch.cat([result.plan.reshape(-1, 30, 20).sum(1) for result in results])
    errors = (sums / masses - b).abs().sum(1)
    assert errors.max() <= (2e-5 if dtype == torch.float32 else 2e-9)
    assert max(result.iterations for result in results) < 1000


def test_a_default_tolerance_warns_of_the_problem_that_misses_it():
    costs, a, b = problem(2, 30, 20)
    masses = torch.tensor([[1e-6], [1.0]]).double()
    # The first problem needs more iterations, but its error is by far the smaller one.
    scales = torch.tensor([1.0, 0.01]).double()[:, None, None]
    with pytest.warns(NotConvergedWarning, match=r"above the tolerance of 1e-15"):
        solve(scales * costs, masses * a, masses * b, 0.01, max_iter=15, anderson=0)


@pytest.mark.parametrize("size", [2**18, 0])
@pytest.mark.filterwarnings("error")
def test_weights_of_another_precision_stop_at_the_difference_of_their_sums(size, monkeypatch):
    monkeypatch.setattr("anomalib_ot.transport.solvers._SMALL", size)
    cost, a, b = problem(40, 25)
    result = solve(cost, a.float(), b.float(), 0.05)
    assert 1e-9 < result.marginal_error < 1e-6
    assert result.iterations < 200


def test_a_batch_takes_twice_its_memory():
    costs = torch.rand(20, 100, 80)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        solve(costs, reg=0.1)
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        held += event.nbytes() if event.name() == "[memory]" else 0
        peak = max(peak, held)
    assert peak < 2.5 * costs.nbytes


def test_the_value_of_weights_of_any_sum_is_that_of_pot():
    cost, a, b = problem(20, 15)
    assert float(solve(cost, 3 * a, 3 * b, 0.1).value) == pytest.approx(float(pot(cost, 3 * a, 3 * b, 0.1).value))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"M": torch.tensor(1.0)}, r"M must be a matrix \(N, P\) or a batch \(B, N, P\).*not of shape \(\)"),
        ({"M": torch.rand(3)}, r"M must be a matrix \(N, P\) or a batch \(B, N, P\).*not of shape \(3,\)"),
        ({"M": torch.rand(0, 3, 5)}, r"not be empty, not of shape \(0, 3, 5\)"),
        ({"M": torch.rand(2, 0, 5)}, r"not be empty, not of shape \(2, 0, 5\)"),
        ({"M": torch.full((3, 5), float("nan"))}, "M has NaN or infinite entries"),
        ({"M": torch.ones(3, 5).long()}, "M must be a tensor of floating-point numbers, not of torch.int64"),
        ({"reg": 0.0}, "reg must be positive and finite, not 0.0"),
        ({"max_iter": 0}, "max_iter must be at least 1"),
        ({"tol": -1.0}, "^tol must be at least 0"),
        ({"a": torch.ones(4)}, r"a must be of shape \(3,\), not \(4,\)"),
        ({"b": torch.zeros(5)}, "b must be positive"),
        ({"a": torch.ones(3)}, "^a sum to 3 but b to 1"),
        ({"a": torch.ones(3, device="meta")}, "a is on meta but M is on cpu; move one of them"),
        (
            {"potentials_init": (torch.zeros(3), torch.zeros(3))},
            r"init\[1\] must be of shape \(5,\), .* of M.*\(3,\)",
        ),
        (
            {"M": torch.rand(2, 3, 5), "potentials_init": (torch.zeros(3), torch.zeros(5))},
            r"potentials_init\[1\] must be of shape \(2, 5\), .* of M, not \(5,\)",
        ),
        ({"potentials_init": (torch.zeros(3), torch.full((5,), float("nan")))}, r"potentials_init\[1\] has NaN"),
        ({"anderson": -1}, "anderson must be a whole number of at least 0, not -1"),
        ({"anderson": 2.5}, "anderson must be a whole number of at least 0, not 2.5"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        solve(**{"M": torch.rand(3, 5), **arguments})


@pytest.mark.parametrize("name", ["cost", "potential", "row_weights", "column_weights"])
def test_gradients_are_refused_where_the_result_has_none(name):
    given = {"cost": torch.rand(3, 5), "potential": torch.zeros(5), "row_weights": torch.full((3,), 1 / 3)}
    given["column_weights"] = torch.full((5,), 0.2)
    given[name].requires_grad_()
    with pytest.raises(ValueError, match=f"^{name} requires gradients, but a plan has none"):
        sinkhorn(**given)


def test_devices_that_differ_are_refused():
    cost, there = torch.rand(3, 5), torch.device("meta")
    for name, size in (("potential", 5), ("row_weights", 3), ("column_weights", 5)):
        with pytest.raises(ValueError, match=f"{name} is on meta but cost is on cpu"):
            sinkhorn(cost, **{name: torch.ones(size, device=there)})
    grid = grid_coordinates(2, 2)
    with pytest.raises(ValueError, match="prototypes is on meta but features is on cpu"):
        FusedCost(torch.rand(4, 3), torch.rand(4, 3, device=there), grid, grid, 0.3)


def test_the_package_loads_torch_and_nothing_heavy():
    done = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] ['_autoload', 'transport']"
