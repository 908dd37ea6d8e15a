"""The fused feature-and-space cost of PRADOT (Trombetta and Lartizien, 2025, arXiv 2508.12927)."""

from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

SpatialCost = Literal["squared", "euclidean"]

_BLOCK_ENTRIES = 2**20


def grid_coordinates(height: int, width: int, *, device: torch.device | None = None) -> Tensor:
    """Coordinates of the cells of a regular grid, the first cell at (0, 0) and the last at (1, 1).

    Args:
        height: Number of rows.
        width: Number of columns.
        device: Where to put the result.

    Returns:
        Float32 tensor (height·width, 2), rows first, in [0, 1].

    Example:
        >>> grid_coordinates(2, 2).tolist()
        [[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]
    """
    rows = torch.linspace(0, 1, height, device=device, dtype=torch.float32)
    columns = torch.linspace(0, 1, width, device=device, dtype=torch.float32)
    return torch.cartesian_prod(rows, columns)


def feature_cost(features: Tensor, prototypes: Tensor) -> Tensor:
    """Cosine distance, the feature term of PRADOT's eq. 1 and 3.

    Args:
        features: (..., N, D).
        prototypes: (..., P, D), batch dimensions broadcast against those of ``features``.

    Returns:
        (..., N, P), in [0, 2]; 1 where either vector is zero.

    Raises:
        ValueError: If the feature sizes differ.

    Example:
        >>> feature_cost(torch.eye(2), torch.eye(2)).tolist()
        [[0.0, 1.0], [1.0, 0.0]]
    """
    _check_channels(features, prototypes)
    similarity = F.normalize(features, dim=-1) @ F.normalize(prototypes, dim=-1).mT
    return 1 - similarity


def spatial_cost(coords: Tensor, prototype_coords: Tensor, kind: SpatialCost = "squared") -> Tensor:
    """Distance between positions, the spatial term of PRADOT's eq. 1 and 3.

    Args:
        coords: (N, 2), in [0, 1].
        prototype_coords: (..., P, 2), in [0, 1].
        kind: ``squared`` as in the paper, ``euclidean`` as in the authors' code.

    Returns:
        (..., N, P), in [0, 2] for ``squared`` and [0, √2] for ``euclidean``.

    Raises:
        ValueError: If ``kind`` is neither.
    """
    if kind == "euclidean":
        return torch.cdist(coords, prototype_coords)
    if kind == "squared":
        return (coords.unsqueeze(-2) - prototype_coords.unsqueeze(-3)).square().sum(-1)
    msg = f"spatial cost must be 'squared' or 'euclidean', not {kind!r}"
    raise ValueError(msg)


class FusedCost:
    """Cost matrix of the transport from the features of a batch to the prototypes, PRADOT's eq. 3, row by row.

    M = (1 − α) M_feat / max M_feat + α M_struct / max M_struct, the maxima taken over the whole batch. The matrix is
    never held: indexing with a slice of rows computes these rows.

    Args:
        features: (B·N, D), the N cells of B images, image after image.
        prototypes: (P, D).
        coords: (N, 2), coordinates of the cells of one image, in [0, 1].
        prototype_coords: (P, 2), in [0, 1].
        alpha: Weight of the spatial term, in [0, 1].
        kind: See :func:`spatial_cost`.

    Attributes:
        shape: (B·N, P).

    Raises:
        ValueError: If the feature sizes differ or the features are not whole images.

    Example:
        >>> corners = grid_coordinates(1, 2)
        >>> FusedCost(torch.eye(2), torch.eye(2), corners, corners, alpha=0.5)[:].tolist()
        [[0.0, 1.0], [1.0, 0.0]]
    """

    def __init__(
        self,
        features: Tensor,
        prototypes: Tensor,
        coords: Tensor,
        prototype_coords: Tensor,
        alpha: float,
        kind: SpatialCost = "squared",
    ) -> None:
        _check_channels(features, prototypes)
        self.cells = coords.shape[0]
        if features.shape[0] % self.cells:
            msg = f"{features.shape[0]} features are not whole images of {self.cells} cells"
            raise ValueError(msg)
        self.shape = torch.Size([features.shape[0], prototypes.shape[0]])
        self._features = F.normalize(features, dim=-1)
        self._prototypes = F.normalize(prototypes, dim=-1)
        lowest = min(float((self._features[rows] @ self._prototypes.T).amin()) for rows in row_blocks(self.shape))
        # An all-zero term, a single prototype cell say, is left as it is.
        scale = (1 - alpha) / ((1 - lowest) or 1.0)
        self._features *= scale
        self._offsets = torch.full((self.cells, self.shape[1]), scale, device=features.device, dtype=features.dtype)
        if alpha > 0:
            space = spatial_cost(coords, prototype_coords, kind)
            self._offsets.add_(space, alpha=alpha / (float(space.max()) or 1.0))
        self._cell = torch.arange(features.shape[0], device=features.device) % self.cells

    def __getitem__(self, rows: slice) -> Tensor:
        """Rows of M, (len(rows), P), in [0, 1] up to rounding."""
        return self._offsets[self._cell[rows]].addmm_(self._features[rows], self._prototypes.T, alpha=-1)

    def exponents(self, potential: Tensor, epsilon: float) -> Callable[[slice], Tensor]:
        """Rows of (g − M) / ε without the passes over memory that forming M first would take.

        Args:
            potential: g, (P,).
            epsilon: ε.

        Returns:
            Maps a slice of rows to (len(rows), P).
        """
        offsets = (potential - self._offsets).div_(epsilon)
        return lambda rows: offsets[self._cell[rows]].addmm_(
            self._features[rows], self._prototypes.T, alpha=1 / epsilon
        )


def row_blocks(shape: torch.Size) -> Iterator[slice]:
    """Slices of consecutive rows of a matrix, each small enough to stay in a processor's cache."""
    step = max(1, _BLOCK_ENTRIES // shape[1])
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


def _check_channels(features: Tensor, prototypes: Tensor) -> None:
    if features.shape[-1] != prototypes.shape[-1]:
        msg = f"features have {features.shape[-1]} channels but prototypes have {prototypes.shape[-1]}"
        raise ValueError(msg)
