"""Conditional transport compared with its literal form, which computes all differences."""

import pytest
import torch

from anomalib_ot.transport import Navigator, conditional_plan, euclidean_cost, fit_navigator


@pytest.fixture
def sets():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(7, 5, generator=generator), torch.randn(9, 5, generator=generator)


def literal(navigator, memory, query):
    """d_φ from the (M, N, C) tensor of squared differences, as two linear layers with a ReLU between."""
    squares = (query[:, None] - memory[None]) ** 2
    return (squares @ navigator.weight.T + navigator.bias).relu() @ navigator.out


@pytest.mark.parametrize("start", ["metric", "random"])
def test_factored_navigator_equals_the_literal_one(sets, start):
    memory, query = sets
    torch.manual_seed(1)
    navigator = Navigator(5, 8, start)
    torch.testing.assert_close(navigator(memory, query), literal(navigator, memory, query), atol=1e-5, rtol=1e-5)


def test_gradients_equal_those_of_the_literal_form(sets):
    memory, query = sets
    torch.manual_seed(1)
    navigator = Navigator(5, 8, "random")
    costs = euclidean_cost(memory, query)
    gradients = [
        torch.autograd.grad(conditional_plan(form(memory, query)).cost(costs), list(navigator.parameters()))
        for form in (navigator, lambda memory, query: literal(navigator, memory, query))
    ]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_metric_start_is_the_squared_distance(sets):
    memory, query = sets
    expected = torch.cdist(query, memory) ** 2 / 0.2
    torch.testing.assert_close(Navigator(5, 3, temperature=0.2)(memory, query), expected, atol=1e-4, rtol=1e-4)


def test_batches_are_independent(sets):
    memory, query = sets
    navigator = Navigator(5)
    batch = navigator(torch.stack([memory, 2 * memory]), torch.stack([query, query]))
    torch.testing.assert_close(batch[1], navigator(2 * memory, query))


def test_cost_is_the_euclidean_distance(sets):
    torch.testing.assert_close(euclidean_cost(*sets), torch.cdist(sets[1], sets[0]), atol=1e-5, rtol=1e-5)


def test_marginals_and_objective(sets):
    memory, query = sets
    plan = conditional_plan(Navigator(5)(memory, query))
    torch.testing.assert_close(plan.forward.sum(1), torch.ones(9))
    torch.testing.assert_close(plan.backward.sum(0), torch.ones(7))
    costs = euclidean_cost(memory, query)
    expected = sum(
        0.3 / 9 * plan.forward[j, i] * costs[j, i] + 0.7 / 7 * plan.backward[j, i] * costs[j, i]
        for i in range(7)
        for j in range(9)
    )
    torch.testing.assert_close(plan.cost(costs, 0.3), expected)


def test_sharp_navigator_selects_the_nearest(sets):
    memory, query = sets
    forward = conditional_plan(Navigator(5, temperature=1e-3)(memory, query)).forward
    costs = euclidean_cost(memory, query)
    torch.testing.assert_close((forward * costs).sum(1), costs.amin(1), atol=1e-3, rtol=1e-3)


def test_fit_lowers_the_objective_and_stops_when_it_settles(sets):
    navigator = Navigator(5, temperature=5.0)
    fit = fit_navigator(navigator, *sets, learning_rate=1e-2, steps=30, tolerance=0)
    assert fit.steps == 30
    assert fit.objective[-1] < fit.objective[0]
    again = fit_navigator(navigator, *sets, learning_rate=1e-2, steps=200, tolerance=1e-2)
    assert again.steps < 200


def test_fit_in_inference_mode_is_the_same(sets):
    navigators = [Navigator(5, 4, temperature=1.0) for _ in range(2)]
    navigators[1].load_state_dict(navigators[0].state_dict())
    fit_navigator(navigators[0], *sets, steps=3)
    with torch.inference_mode():
        fit_navigator(navigators[1], *(each * 1 for each in sets), steps=3)
    for ours, theirs in zip(*(navigator.parameters() for navigator in navigators), strict=True):
        assert torch.equal(ours, theirs)


def test_sample_depends_only_on_the_seed(sets):
    memory, query = (each.repeat(50, 1) for each in sets)
    fits = []
    for noise in (1, 2):
        torch.manual_seed(0)
        navigator = Navigator(5)
        torch.manual_seed(noise)
        fits.append(fit_navigator(navigator, memory, query, steps=4, features=20, tolerance=0).objective)
    assert fits[0] == fits[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"rho": 1.5}, "rho"), ({"steps": -1}, "steps"), ({"learning_rate": 0.0}, "learning_rate")],
)
def test_bad_settings_of_a_fit(sets, arguments, message):
    with pytest.raises(ValueError, match=message):
        fit_navigator(Navigator(5), *sets, **arguments)


def test_features_that_are_not_finite(sets):
    sets[0][0, 0] = torch.nan
    with pytest.raises(ValueError, match="finite"):
        fit_navigator(Navigator(5), *sets)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": 0}, "channel"),
        ({"channels": 2, "hidden": 0}, "hidden"),
        ({"channels": 2, "temperature": 0.0}, "temperature"),
        ({"channels": 2, "start": "zero"}, "start must be one of metric, random"),
    ],
)
def test_bad_settings_of_a_navigator(arguments, message):
    with pytest.raises(ValueError, match=message):
        Navigator(**arguments)
