"""The fused feature-and-space cost of PRADOT (Trombetta and Lartizien, 2025, arXiv 2508.12927)."""

import math
from collections.abc import Iterator
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from ._arguments import require_floats, require_vectors
from ._exponents import Exponents, ProductExponents, Rounding, Stored, StoredExponents
from ._precision import LEVELS
from ._processes import Processes
from ._workspace import Workspace

SpatialCost = Literal["squared", "euclidean"]

_BLOCK_ENTRIES = 2**20
# Cosine distances below so many roundings cannot be told from zero.
_ROUNDINGS = 16
# Bytes for each entry that rounded similarities need, with a sparse kernel beside them.
_BYTES_ROUNDED = 3
# Rows to round at once: enough for torch's threads, which go on spinning for a while after a product, not to matter.
_ROWS = 1024
# By how much rounding changes a cost at most, of 1, and the share of ε that it may be.
_ROUNDED = 2**-17
_SHARE_OF_EPSILON = 1 / 500


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
        TypeError: If an argument is no tensor.
        ValueError: If the feature sizes differ.

    Example:
        >>> feature_cost(torch.eye(2), torch.eye(2)).tolist()
        [[0.0, 1.0], [1.0, 0.0]]
    """
    require_vectors(features=features, prototypes=prototypes)
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
        TypeError: If the coordinates are no tensors.
        ValueError: If ``kind`` is neither.
    """
    require_vectors(coords=coords, prototype_coords=prototype_coords)
    if kind == "euclidean":
        return torch.cdist(coords, prototype_coords)
    if kind == "squared":
        return (coords.unsqueeze(-2) - prototype_coords.unsqueeze(-3)).square().sum(-1)
    msg = f"spatial cost must be 'squared' or 'euclidean', not {kind!r}"
    raise ValueError(msg)


class Cost(Protocol):
    """A cost matrix M that hands out its rows a block at a time.

    Attributes:
        shape: (N, P).
    """

    shape: torch.Size

    def __getitem__(self, rows: slice) -> Tensor:
        """Rows of M, (len(rows), P)."""

    def blocks(self) -> Iterator[slice]:
        """Consecutive slices of rows, each small enough to stay in a processor's cache."""

    def exponents(self, potential: Tensor, epsilon: float) -> Exponents:
        """The way to rows of (g − M) / ε; g is (P,)."""


class DenseCost:
    """A cost matrix that is at hand.

    Args:
        matrix: M, (N, P), finite.

    Raises:
        TypeError: If it is no tensor.
        ValueError: If it is no matrix, is empty, or has NaN or infinite entries.
    """

    def __init__(self, matrix: Tensor) -> None:
        require_floats(cost=matrix)
        if matrix.ndim != 2 or not matrix.numel():  # noqa: PLR2004 - a matrix has two dimensions
            msg = f"the cost must be a non-empty matrix, not of shape {tuple(matrix.shape)}"
            raise ValueError(msg)
        if not matrix.isfinite().all():
            msg = "the cost has NaN or infinite entries"
            raise ValueError(msg)
        self.shape = matrix.shape
        self._matrix = matrix

    def __getitem__(self, rows: slice) -> Tensor:
        """Rows of M."""
        return self._matrix[rows]

    def blocks(self) -> Iterator[slice]:
        """Slices of rows; see :class:`Cost`."""
        return row_blocks(self.shape, self.shape[0], self._matrix.device)

    def exponents(self, potential: Tensor, epsilon: float) -> Exponents:
        """The way to rows of (g − M) / ε; see :class:`Cost`."""
        return StoredExponents(Stored(self._matrix), potential[None], -1.0, 1 / epsilon)


class FusedCost:
    """Cost matrix of the transport from the features of a batch to the prototypes, PRADOT's eq. 3, row by row.

    M = (1 − α) M_feat / max M_feat + α M_struct / max M_struct, the maxima taken over the whole batch. The matrix is
    never held. M_struct is the same for all images, so it is computed once, for one image.

    Args:
        features: (B·N, D), the N cells of B images, image after image.
        prototypes: (P, D).
        coords: (N, 2), coordinates of the cells of one image, in [0, 1].
        prototype_coords: (P, 2), in [0, 1].
        alpha: Weight of the spatial term, in [0, 1].
        kind: See :func:`spatial_cost`.
        processes: Processes that hold further images of the batch.
        workspace: Memory to keep the similarities in, where they and the kernel fit: as they are, or, on a processor,
            rounded to 16 bits. This changes a cost by at most 2⁻¹⁷, and serves where that is no more than a 500th of ε.
            Else, or without a workspace, similarities are computed anew on each use.

    Attributes:
        shape: (B·N, P).

    Raises:
        TypeError: If an argument is no tensor where one is due.
        ValueError: If there are no features or prototypes, their sizes differ, they are not finite, the features are
            not whole images, there is not one coordinate for each prototype, or α is out of its range.

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
        processes: Processes | None = None,
        workspace: Workspace | None = None,
    ) -> None:
        require_vectors(features=features, prototypes=prototypes)
        require_vectors(coords=coords, prototype_coords=prototype_coords)
        for name, matrix in (("features", features), ("prototypes", prototypes), ("coords", coords)):
            if matrix.ndim != 2:  # noqa: PLR2004 - a matrix has two dimensions
                msg = f"{name} must be a matrix, not of shape {tuple(matrix.shape)}"
                raise ValueError(msg)
        self.shape = torch.Size([features.shape[0], prototypes.shape[0]])
        self.cells = coords.shape[0]
        processes = processes or Processes()
        if not self.shape[1] or not processes.total(self.shape[0], features.device):
            msg = f"there is nothing to transport from {self.shape[0]} features to {self.shape[1]} prototypes"
            raise ValueError(msg)
        if not self.cells or features.shape[0] % self.cells:
            msg = f"{features.shape[0]} features are not whole images of {self.cells} cells"
            raise ValueError(msg)
        if len(prototype_coords) != self.shape[1]:
            msg = f"{self.shape[1]} prototypes cannot have {len(prototype_coords)} coordinates"
            raise ValueError(msg)
        if not 0 <= alpha <= 1:
            msg = f"alpha must be in [0, 1], not {alpha}"
            raise ValueError(msg)
        self._features = F.normalize(features, dim=-1)
        self._prototypes = F.normalize(prototypes, dim=-1)
        self._stored = self._store(workspace) if workspace else None
        farthest = 1 - float(processes.min(self._lowest_similarity()))
        if not math.isfinite(farthest):
            msg = "features and prototypes must be finite, but some are NaN or infinite"
            raise ValueError(msg)
        # A term that is zero, up to rounding, is left as it is: a single prototype cell say, or equal features.
        rounding = _ROUNDINGS * torch.finfo(features.dtype).eps
        self._scale = (1 - alpha) / (farthest if farthest > rounding else 1.0)
        # The part of the cost that does not depend on the features, for the cells of one image: (N, P), or (1, 1).
        self._offsets = torch.full((1, 1), self._scale, device=features.device, dtype=features.dtype)
        if alpha > 0:
            space = spatial_cost(coords, prototype_coords, kind)
            self._offsets = space.mul_(alpha / (float(space.max()) or 1.0)).add_(self._scale)

    def __getitem__(self, rows: slice) -> Tensor:
        """Rows of M, (len(rows), P), in [0, 1] up to rounding."""
        cells = torch.arange(self.shape[0], device=self._features.device)[rows] % len(self._offsets)
        similarities = self._features[rows] @ self._prototypes.T
        return self._offsets[cells].sub(similarities, alpha=self._scale)

    def blocks(self) -> Iterator[slice]:
        """Slices of rows, each of whole images or of a part of one; see :class:`Cost`."""
        return row_blocks(self.shape, self.cells, self._features.device)

    def exponents(self, potential: Tensor, epsilon: float) -> Exponents:
        """The way to rows of (g − M) / ε; see :class:`Cost`."""
        offsets = (potential - self._offsets).div_(epsilon)
        if len(offsets) > 1:
            offsets = offsets.repeat(max(1, _block_rows(self.shape, self._features.device) // self.cells), 1)
        slope = self._scale / epsilon
        stored = self._stored
        if stored and (stored.rounding is None or epsilon * _SHARE_OF_EPSILON >= _ROUNDED):
            return StoredExponents(stored, offsets, slope)
        return ProductExponents(self._features, self._prototypes, offsets, slope)

    def _store(self, workspace: Workspace) -> Stored | None:
        """Memory for the similarities, as far as there is any."""
        like, entries = self._features, self.shape.numel()
        if 2 * entries * like.element_size() <= workspace.memory:
            matrix = workspace.take("similarities", self.shape, like.dtype, like.device)
            return Stored(matrix, workspace=workspace)
        if like.device.type == "cpu" and like.dtype == torch.float32 and _BYTES_ROUNDED * entries <= workspace.memory:
            matrix = workspace.take("similarities", self.shape, torch.int16, like.device)
            return Stored(matrix, Rounding(*like.new_empty(2, len(like))), workspace)
        return None

    def _lowest_similarity(self) -> Tensor:
        """Least similarity of a feature and a prototype, NaN where some are not finite; all are stored if wanted."""
        lowest = self._features.new_tensor(math.inf)
        stored = self._stored
        if stored and stored.rounding:
            return self._round_similarities(stored.matrix, stored.rounding)
        if stored:
            torch.mm(self._features, self._prototypes.T, out=stored.matrix)
            # A process may have no rows.
            return stored.matrix.amin() if len(stored.matrix) else lowest
        for rows in self.blocks():
            lowest = torch.minimum(lowest, (self._features[rows] @ self._prototypes.T).amin())
        return lowest

    def _round_similarities(self, matrix: Tensor, rounding: Rounding) -> Tensor:
        """Store all similarities rounded, and return the least, NaN where some are not finite."""
        if not (self._features.isfinite().all() and self._prototypes.isfinite().all()):
            return self._features.new_tensor(math.nan)
        from ._compiled import round_rows  # noqa: PLC0415 - brings Numba, which scoring does without

        middles, steps = rounding
        scratch = self._features.new_empty(min(_ROWS, len(matrix)), len(self._prototypes))
        for start in range(0, len(matrix), _ROWS):
            rows = slice(start, min(start + _ROWS, len(matrix)))
            block = torch.mm(self._features[rows], self._prototypes.T, out=scratch[: rows.stop - start])
            round_rows(block, matrix[rows], middles[rows], steps[rows])
        # Each row's least is kept, up to rounding.
        lowest = torch.addcmul(middles, steps, steps.new_tensor(-LEVELS))
        return lowest.amin() if len(lowest) else lowest.new_tensor(math.inf)


def row_blocks(shape: torch.Size, cells: int, device: torch.device) -> Iterator[slice]:
    """Slices of consecutive rows of a matrix (N, P), each small enough to stay in a processor's cache.

    Args:
        shape: (N, P).
        cells: Rows of one image; a block has whole images or a part of one.
        device: Where the matrix is; graphics processors get larger blocks.
    """
    count = _block_rows(shape, device)
    if count >= cells:
        step = count - count % cells
        yield from (slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step))
        return
    for image in range(0, shape[0], cells):
        end = image + cells
        yield from (slice(start, min(start + count, end)) for start in range(image, end, count))


def _block_rows(shape: torch.Size, device: torch.device) -> int:
    return max(1, (_BLOCK_ENTRIES if device.type == "cpu" else 64 * _BLOCK_ENTRIES) // shape[1])
