"""Every function of transport that expects tensors has an error message for NumPy arrays."""

import numpy as np
import pytest
import torch

from anomalib_ot.transport import (
    ConditionalPlan,
    FusedCost,
    Navigator,
    OptimalCoupling,
    conditional_plan,
    euclidean_cost,
    feature_cost,
    fit_navigator,
    grid_coordinates,
    sinkhorn,
    spatial_cost,
    squared_distance,
)

SQUARE = torch.eye(2)
GRID = grid_coordinates(1, 2)
MAPS = torch.rand(2, 3, 2, 2)
# Calls with one open argument, by the argument's name, and a valid value.
CALLS = {
    "cost": (sinkhorn, SQUARE),
    "potential": (lambda given: sinkhorn(SQUARE, potential=given), torch.zeros(2)),
    "row_weights": (lambda given: sinkhorn(SQUARE, row_weights=given), torch.full((2,), 0.5)),
    "column_weights": (lambda given: sinkhorn(SQUARE, column_weights=given), torch.full((2,), 0.5)),
    "points": (lambda given: sinkhorn(SQUARE).barycentres(given), SQUARE),
    "features": (lambda given: feature_cost(given, SQUARE), SQUARE),
    "prototypes": (lambda given: feature_cost(SQUARE, given), SQUARE),
    "coords": (lambda given: spatial_cost(given, GRID), GRID),
    "prototype_coords": (lambda given: spatial_cost(GRID, given, "euclidean"), GRID),
    "features of FusedCost": (lambda given: FusedCost(given, SQUARE, GRID, GRID, 0.5), SQUARE),
    "coords of FusedCost": (lambda given: FusedCost(SQUARE, SQUARE, given, GRID, 0.5), GRID),
    "memory": (lambda given: euclidean_cost(given, SQUARE), SQUARE),
    "query": (lambda given: squared_distance(SQUARE, given), SQUARE),
    "memory of a navigator": (lambda given: Navigator(2)(given, SQUARE), SQUARE),
    "query to fit to": (lambda given: fit_navigator(Navigator(2), SQUARE, given, steps=1), SQUARE),
    "pairwise": (conditional_plan, SQUARE),
    "costs": (lambda given: ConditionalPlan(SQUARE, SQUARE).cost(given), SQUARE),
    "data": (lambda given: OptimalCoupling()(given, MAPS), MAPS),
    "noise": (lambda given: OptimalCoupling().gap(MAPS, given), MAPS),
}


@pytest.fixture(params=CALLS)
def call(request):
    return (request.param.split()[0], *CALLS[request.param])


def test_an_array_is_refused(call):
    name, function, right = call
    function(right)
    with pytest.raises(
        TypeError,
        match=rf"^{name} must be a tensor, not numpy\.ndarray; convert an array or a list with torch\.as_tensor",
    ):
        function(right.numpy())
    with pytest.raises(TypeError, match=rf"^{name} must be a tensor, not list"):
        function(right.tolist())


def test_integers_are_refused(call):
    name, function, right = call
    if name in {"potential", "row_weights", "column_weights"}:
        pytest.skip("they are brought to the type of the cost")
    with pytest.raises(ValueError, match=rf"^{name} must be a tensor of floating-point numbers, not of torch\.int64"):
        function(right.long())


def test_the_error_for_wrong_dimensions_has_the_shape(call):
    name, function, right = call
    if name in {"pairwise", "costs"}:
        pytest.skip("its dimensions are those of the features")
    with pytest.raises(ValueError, match=rf"(?s){name.split('_')[-1]}.*shape"):
        function(right[0])


@pytest.mark.parametrize("function", [euclidean_cost, squared_distance, Navigator(2), feature_cost])
def test_the_error_for_different_channels_has_the_names(function):
    with pytest.raises(ValueError, match=r"have 3 channels but .* have 2 channels"):
        function(torch.rand(4, 3), torch.rand(5, 2))


def test_a_numpy_matrix_is_solved_as_a_tensor():
    cost = np.random.default_rng(0).random((3, 2))
    torch.testing.assert_close(sinkhorn(torch.as_tensor(cost), 0.1).dense().sum(), torch.tensor(1.0).double())
