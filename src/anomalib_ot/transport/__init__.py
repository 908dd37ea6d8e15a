"""Optimal transport on tensors: no anomalib, no Lightning, no images."""

from .costs import Cost, DenseCost, FusedCost, SpatialCost, feature_cost, grid_coordinates, spatial_cost
from .processes import Processes
from .sinkhorn import NotConvergedWarning, TransportPlan, sinkhorn
from .workspace import Workspace

__all__ = [
    "Cost",
    "DenseCost",
    "FusedCost",
    "NotConvergedWarning",
    "Processes",
    "SpatialCost",
    "TransportPlan",
    "Workspace",
    "feature_cost",
    "grid_coordinates",
    "sinkhorn",
    "spatial_cost",
]
