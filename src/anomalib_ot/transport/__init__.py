"""Optimal transport on tensors: no anomalib, no Lightning, no images."""

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
from .costs import Cost, DenseCost, FusedCost, SpatialCost, feature_cost, grid_coordinates, spatial_cost
from .processes import Processes
from .sinkhorn import NotConvergedWarning, TransportPlan, sinkhorn
from .workspace import Workspace

__all__ = [
    "ConditionalPlan",
    "Cost",
    "DenseCost",
    "FusedCost",
    "Navigator",
    "NavigatorFit",
    "NavigatorStart",
    "NotConvergedWarning",
    "Processes",
    "SpatialCost",
    "TransportPlan",
    "Workspace",
    "conditional_plan",
    "euclidean_cost",
    "feature_cost",
    "fit_navigator",
    "grid_coordinates",
    "sinkhorn",
    "spatial_cost",
    "squared_distance",
]
