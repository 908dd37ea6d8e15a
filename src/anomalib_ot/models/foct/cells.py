"""Features of cells from the layers of a backbone, the finest layer first."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812


def averaged(layers: Sequence[Tensor]) -> Tensor:
    """Features averaged over 3 x 3 cells, as in PatchCore: less noise, and no detail.

    Args:
        layers: Feature maps (B, D, H, W) of each layer.

    Returns:
        (B, D, H, W), layers concatenated at the finest grid.
    """
    return _joined([F.avg_pool2d(each, 3, 1, 1) for each in layers])


def unaveraged(layers: Sequence[Tensor]) -> Tensor:
    """Features of single cells as vectors of unit length.

    Args:
        layers: Feature maps (B, D, H, W) of each layer.

    Returns:
        (B, M, D) for the M cells of the finest grid, row by row.
    """
    return F.normalize(_joined(layers), dim=1).flatten(2).movedim(1, -1)


def _joined(layers: Sequence[Tensor]) -> Tensor:
    first, *others = layers
    return torch.cat([first, *(F.interpolate(each, first.shape[-2:], mode="bilinear") for each in others)], 1)
