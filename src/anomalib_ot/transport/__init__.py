"""Optimal transport on tensors: no anomalib, no Lightning, no images."""

from .costs import FusedCost, SpatialCost, feature_cost, grid_coordinates, spatial_cost
from .sinkhorn import TransportPlan, sinkhorn

__all__ = [
    "FusedCost",
    "SpatialCost",
    "TransportPlan",
    "feature_cost",
    "grid_coordinates",
    "sinkhorn",
    "spatial_cost",
]
