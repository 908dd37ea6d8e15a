"""Optimal transport on tensors: no anomalib, no Lightning, no images."""

from ._processes import Processes
from ._workspace import Workspace
from .conditional import (
    ConditionalPlan,
    Navigator,
    NavigatorFit,
    NavigatorStart,
    conditional_plan,
    euclidean_cost,
    fit_navigator,
    squared_distance,
)
from .costs import Cost, DenseCost, FusedCost, SpatialCost, feature_cost, grid_coordinates, row_blocks, spatial_cost
from .coupling import (
    Coupling,
    CouplingName,
    IndependentCoupling,
    OptimalCoupling,
    Scope,
    Solver,
    WorstCoupling,
    create_coupling,
)
from .entropic import NotConvergedWarning, TransportPlan, sinkhorn
from .solvers import TransportResult, solve

__all__ = [
    "ConditionalPlan",
    "Cost",
    "Coupling",
    "CouplingName",
    "DenseCost",
    "FusedCost",
    "IndependentCoupling",
    "Navigator",
    "NavigatorFit",
    "NavigatorStart",
    "NotConvergedWarning",
    "OptimalCoupling",
    "Processes",
    "Scope",
    "Solver",
    "SpatialCost",
    "TransportPlan",
    "TransportResult",
    "Workspace",
    "WorstCoupling",
    "conditional_plan",
    "create_coupling",
    "euclidean_cost",
    "feature_cost",
    "fit_navigator",
    "grid_coordinates",
    "row_blocks",
    "sinkhorn",
    "solve",
    "spatial_cost",
    "squared_distance",
]
