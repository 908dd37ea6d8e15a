"""Arrays and lists where tensors are asked for are refused by the name of the argument."""

import numpy as np
import pytest
import torch

from anomalib_ot.transport import (
    DenseCost,
    FusedCost,
    IndependentCoupling,
    Navigator,
    OptimalCoupling,
    conditional_plan,
    euclidean_cost,
    feature_cost,
    fit_navigator,
    sinkhorn,
    spatial_cost,
    squared_distance,
)

ARRAY = np.ones((4, 4), dtype=np.float32)
TENSOR = torch.ones(4, 4)
CALLS = {
    "cost": lambda: sinkhorn(ARRAY),
    "potential": lambda: sinkhorn(TENSOR, potential=ARRAY[0]),
    "row_weights": lambda: sinkhorn(TENSOR, row_weights=[1.0] * 4),
    "column_weights": lambda: sinkhorn(TENSOR, column_weights=ARRAY[0]),
    "matrix": lambda: DenseCost(ARRAY),
    "features": lambda: FusedCost(ARRAY, TENSOR, TENSOR[:, :2], TENSOR[:, :2], 0.3),
    "coords": lambda: FusedCost(TENSOR, TENSOR, ARRAY[:, :2], TENSOR[:, :2], 0.3),
    "prototypes": lambda: feature_cost(TENSOR, ARRAY),
    "prototype_coords": lambda: spatial_cost(TENSOR[:, :2], ARRAY[:, :2]),
    "memory": lambda: euclidean_cost(ARRAY, TENSOR),
    "query": lambda: squared_distance(TENSOR, ARRAY),
    "pairwise": lambda: conditional_plan(ARRAY),
    "memory, fitted": lambda: fit_navigator(Navigator(4), ARRAY, TENSOR),
    "data": lambda: OptimalCoupling()(ARRAY, TENSOR),
    "noise": lambda: IndependentCoupling()(TENSOR, ARRAY),
}


@pytest.mark.parametrize("name", CALLS)
def test_what_is_no_tensor_is_refused_by_name(name):
    argument = name.partition(",")[0]
    with pytest.raises(TypeError, match=rf"^{argument} must be a torch tensor, not .*torch\.as_tensor\({argument}\)"):
        CALLS[name]()
