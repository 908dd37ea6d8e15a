"""Conditional transport on random sets, compared with its literal form in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anomalib_ot.transport import Navigator, conditional_plan, euclidean_cost, fit_navigator, squared_distance

properties = settings(derandomize=True, deadline=None, database=None, max_examples=30)
seeds = st.integers(0, 2**32 - 1)
starts = st.sampled_from(["metric", "random"])


@st.composite
def sets(draw):
    """Memory (…, N, C) and query (…, M, C), with different or the same points, at any scale."""
    batch = draw(st.sampled_from([(), (1,), (2, 3)]))
    memory, query, channels = draw(st.integers(1, 8)), draw(st.integers(1, 8)), draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(seeds))
    scale = draw(st.sampled_from([1e-3, 1.0, 30.0]))
    memory, query = (scale * torch.randn(*batch, size, channels, generator=generator) for size in (memory, query))
    kind = draw(st.sampled_from(["different", "same", "equal"]))
    if kind == "same":
        query = memory
    elif kind == "equal":
        memory, query = torch.ones_like(memory), torch.ones_like(query)
    return memory, query


def literal(navigator, memory, query):
    """d_φ from all differences, in float64."""
    squares = (query.double().unsqueeze(-2) - memory.double().unsqueeze(-3)).square()
    hidden = (squares @ navigator.weight.double().T + navigator.bias.double()).relu()
    return hidden @ navigator.out.double()


@properties
@given(sets(), starts, st.integers(1, 6), st.sampled_from([0.1, 0.3, 5.0]), seeds)
def test_navigator_is_the_literal_one(sets, start, hidden, temperature, seed):
    torch.manual_seed(seed)
    memory, query = sets
    navigator = Navigator(memory.shape[-1], hidden, start, temperature)
    found, expected = navigator(memory, query).detach(), literal(navigator, memory, query).detach()
    assert found.shape == (*memory.shape[:-2], query.shape[-2], memory.shape[-2])
    # The squares of the norms cancel, and distances much smaller than the norms lose digits.
    largest = float(torch.cat([memory, query], -2).square().sum(-1).max() * navigator.weight.detach().abs().max())
    largest *= float(navigator.out.detach().abs().sum())
    torch.testing.assert_close(found.double(), expected, atol=1e-5 * (largest + 1), rtol=1e-5)


@properties
@given(sets())
def test_distances_are_those_of_the_differences(sets):
    memory, query = sets
    squares = (query.double().unsqueeze(-2) - memory.double().unsqueeze(-3)).square().sum(-1)
    rounding = 1e-6 * float(torch.cat([memory, query], -2).square().sum(-1).max())
    torch.testing.assert_close(squared_distance(memory, query).double(), squares, atol=4 * rounding, rtol=1e-5)
    costs = euclidean_cost(memory, query)
    assert (costs >= 0).all()
    torch.testing.assert_close(costs.double(), squares.sqrt(), atol=2 * rounding**0.5, rtol=1e-4)


@properties
@given(sets(), starts, seeds, st.sampled_from([1e-6, 1.0, 1e6]))
def test_navigators_are_the_softmaxes_and_their_sums_are_one(sets, start, seed, sharpness):
    torch.manual_seed(seed)
    pairwise = sharpness * Navigator(sets[0].shape[-1], 3, start)(*sets).detach()
    plan = conditional_plan(pairwise)
    torch.testing.assert_close(plan.forward.sum(-1), torch.ones(pairwise.shape[:-1]))
    torch.testing.assert_close(plan.backward.sum(-2), torch.ones(*pairwise.shape[:-2], pairwise.shape[-1]))
    for found, dim in ((plan.forward, -1), (plan.backward, -2)):
        # exp(−d) divided by its sum, after subtracting the smallest d.
        weights = (pairwise.double().amin(dim, keepdim=True) - pairwise.double()).exp()
        torch.testing.assert_close(found.double(), weights / weights.sum(dim, keepdim=True), atol=1e-6, rtol=1e-4)


@properties
@given(sets(), st.floats(0, 1), seeds)
def test_objective_is_the_mean_cost_by_loops(sets, rho, seed):
    torch.manual_seed(seed)
    memory, query = sets
    plan = conditional_plan(Navigator(memory.shape[-1], start="random")(memory, query).detach())
    costs = euclidean_cost(memory, query)
    found = plan.cost(costs, rho)
    rows, columns = costs.shape[-2:]
    expected = torch.zeros(costs.shape[:-2])
    for j in range(rows):
        for i in range(columns):
            expected += rho / rows * plan.forward[..., j, i] * costs[..., j, i]
            expected += (1 - rho) / columns * plan.backward[..., j, i] * costs[..., j, i]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)
    assert (found >= costs.amin((-2, -1)) * (1 - 1e-5)).all()
    assert (found <= costs.amax((-2, -1)) * (1 + 1e-5)).all()


@properties
@given(sets(), seeds)
def test_permuted_points_permute_the_plan(sets, seed):
    generator = torch.Generator().manual_seed(seed)
    memory, query = sets
    navigator = Navigator(memory.shape[-1])
    rows, columns = (torch.randperm(each.shape[-2], generator=generator) for each in (query, memory))
    plan = conditional_plan(navigator(memory, query))
    permuted = conditional_plan(navigator(memory[..., columns, :], query[..., rows, :]))
    for found, expected in zip(permuted, plan, strict=True):
        torch.testing.assert_close(found, expected[..., rows, :][..., columns], atol=1e-3, rtol=1e-3)


@properties
@given(st.integers(1, 6), st.integers(1, 6), st.sampled_from([None, 1, 3, 100]), seeds, st.floats(0, 1))
def test_a_fit_repeats_itself_and_leaves_its_arguments(memory, query, features, seed, rho):
    generator = torch.Generator().manual_seed(seed)
    sets = [torch.randn(size, 3, generator=generator) for size in (memory, query)]
    before = [each.clone() for each in sets]
    fits = []
    for _ in range(2):
        torch.manual_seed(seed)
        navigator = Navigator(3, 2).requires_grad_(requires_grad=False)
        fit = fit_navigator(
            navigator, *sets, rho=rho, learning_rate=1e-2, steps=5, features=features, tolerance=0, seed=seed
        )
        assert fit.steps == len(fit.objective) == 5
        assert not any(parameter.requires_grad or parameter.grad is not None for parameter in navigator.parameters())
        fits.append((fit, [parameter.clone() for parameter in navigator.parameters()]))
    assert fits[0][0] == fits[1][0]
    assert all(map(torch.equal, fits[0][1], fits[1][1]))
    assert all(map(torch.equal, sets, before))


def objective(features=None, tolerance=0.0, steps=40):
    """Arguments of a fit to six features of a memory and nine of a query."""
    generator = torch.Generator().manual_seed(0)
    memory, query = torch.randn(6, 3, generator=generator), torch.randn(9, 3, generator=generator)
    torch.manual_seed(0)
    navigator = Navigator(3, temperature=5.0)
    return fit_navigator(
        navigator, memory, query, learning_rate=1e-2, steps=steps, features=features, tolerance=tolerance
    ).objective


def test_a_fit_uses_all_features_up_to_the_limit():
    whole = objective(steps=1)
    assert objective(features=9, steps=1) == objective(features=100, steps=1) == whole
    assert len({*whole, *objective(features=6, steps=1), *objective(features=3, steps=1)}) == 3


@pytest.mark.parametrize("tolerance", [3e-3, 5e-3, 8e-3])
def test_a_fit_ends_after_the_first_step_that_changes_little(tolerance):
    every = objective()
    settled = [abs(every[k - 1] - every[k]) < tolerance * abs(every[k]) for k in range(1, len(every))]
    expected = settled.index(True) + 2
    assert 2 < expected < 40
    assert objective(tolerance=tolerance) == every[:expected]


def test_without_steps_nothing_is_fitted():
    navigator = Navigator(3)
    before = navigator.weight.clone()
    assert fit_navigator(navigator, torch.rand(4, 3), torch.rand(5, 3), steps=0) == (0, [])
    assert torch.equal(navigator.weight, before)


def test_an_empty_memory_or_query_is_refused():
    for sizes in ((0, 4), (4, 0)):
        with pytest.raises(ValueError, match="memory and query must each have at least one feature"):
            fit_navigator(Navigator(3), *(torch.rand(size, 3) for size in sizes))
    with pytest.raises(ValueError, match="features must be at least 1 or None, not 0"):
        fit_navigator(Navigator(3), torch.rand(4, 3), torch.rand(4, 3), features=0)
