"""Reference detectors on given features: the rules of AnomalyDINO and of SubspaceAD, for any backbone.

The detectors that these papers describe also choose a backbone, an image size and a foreground. The references are the
scores alone, so that a comparison on the same features shows the effect of the scores. Both papers turn the training
images when there are few; add the features of the turned views to the training features for that.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

# Rows of the training features that are compared at a time.
_BLOCK = 2**16


class NearestCell:
    """AnomalyDINO's rule: the cosine distance of a cell to the nearest of all cells of the training images.

    Damm et al., AnomalyDINO, WACV 2025, https://arxiv.org/abs/2405.14529

    Args:
        features: Feature maps (N, D, H, W) of the training images.
    """

    def __init__(self, features: Tensor) -> None:
        self.cells = F.normalize(_cells(features), dim=1)

    def __call__(self, features: Tensor) -> Tensor:
        """Distances (B, H, W), in [0, 2], of the cells of feature maps (B, D, H, W)."""
        batch, _, height, width = features.shape
        queries = F.normalize(_cells(features), dim=1)
        nearest = [(queries @ block.T).amax(1) for block in self.cells.split(_BLOCK)]
        return (1 - torch.stack(nearest).amax(0)).clamp(0, 2).view(batch, height, width)


class Subspace:
    """SubspaceAD's rule: the squared distance of a cell to the principal subspace of all cells of the training images.

    Lendering et al., SubspaceAD, CVPR 2026, https://arxiv.org/abs/2602.23013

    Args:
        features: Feature maps (N, D, H, W) of the training images.
        variance: Share of the variance in the subspace, in (0, 1]; it has the smallest sufficient number of directions.
    """

    def __init__(self, features: Tensor, variance: float = 0.99) -> None:
        # The smallest directions matter, and single precision loses them.
        cells = _cells(features).double()
        self.mean = cells.mean(0)
        values, directions = torch.linalg.eigh(torch.cov(cells.T, correction=0))
        values, directions = values.flip(0).clamp(min=0), directions.flip(1)
        explained = values.cumsum(0) / values.sum()
        self.directions = directions[:, : int((explained < variance).sum()) + 1]

    def __call__(self, features: Tensor) -> Tensor:
        """Squared residuals (B, H, W) of the cells of feature maps (B, D, H, W)."""
        batch, _, height, width = features.shape
        centred = _cells(features).double() - self.mean
        residuals = centred - centred @ self.directions @ self.directions.T
        return residuals.square().sum(1).view(batch, height, width).to(features.dtype)


def joined(maps: Sequence[Tensor]) -> Tensor:
    """Feature maps (B, D, H, W) of several layers together, resized to those of the first layer as in PatchCore."""
    return torch.cat([F.interpolate(each, maps[0].shape[-2:], mode="bilinear") for each in maps], dim=1)


def top_mean(maps: Tensor, share: float = 0.01) -> Tensor:
    """Image scores (B,) of both papers: the mean of the highest share of the cells of maps (B, H, W), at least one."""
    values = maps.flatten(1)
    return values.topk(max(1, int(share * values.shape[1])), dim=1).values.mean(1)


def _cells(features: Tensor) -> Tensor:
    """The cells (B · H · W, D) of feature maps (B, D, H, W)."""
    return features.movedim(1, -1).flatten(0, 2)
