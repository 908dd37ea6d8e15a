"""Scores as tensors on bounded scales, on their device and in an exported graph."""

import torch
from torch import Tensor

from .conformal import compressed


def nan_as_infinite(scores: Tensor) -> Tensor:
    """The scores, with infinity for NaN: no comparison with NaN is true, so that it would be normal."""
    return scores.masked_fill(scores.isnan(), torch.inf)


def compressed_scores(units: Tensor) -> Tensor:
    """Shown scores as of :class:`~anomalib_ot.decide.conformal.ConformalScale`, of distances from the threshold."""
    shown: Tensor = compressed(_finite(units))
    return shown


def below_one(scores: Tensor) -> Tensor:
    """Scores between -1 and 1 in the same order, which keep the digits of small ones."""
    finite = _finite(nan_as_infinite(scores))
    return finite / (1 + finite.abs())


def _finite(values: Tensor) -> Tensor:
    # Infinity divided by infinity would be NaN.
    furthest = torch.finfo(values.dtype).max / 2
    return values.clamp(-furthest, furthest)
