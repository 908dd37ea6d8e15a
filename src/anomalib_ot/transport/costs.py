"""The fused feature-and-space cost of PRADOT (Trombetta and Lartizien, 2025, arXiv 2508.12927)."""

import math
from collections.abc import Iterator
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from ._arguments import at_least_single, require_floats, require_same_device, require_vectors
from ._exponents import Exponents, ProductExponents, Rounding, Stored, StoredExponents
from ._precision import LEVELS
from ._processes import Processes
from ._workspace import Workspace

SpatialCost = Literal["squared", "euclidean"]

_BLOCK_ENTRIES = 2**20
# Cosine distances below this many rounding errors are indistinguishable from zero.
_ROUNDINGS = 16
# Bytes per entry of rounded similarities together with a sparse kernel.
_BYTES_ROUNDED = 3
# Rows to round at once. Large blocks make the time negligible in which torch's threads keep spinning after a product.
_ROWS = 1024
# Largest change of a cost by rounding, for costs up to 1, and the largest share of ε that this may be.
_ROUNDED = 2**-17
_SHARE_OF_EPSILON = 1 / 500


def grid_coordinates(height: int, width: int, *, device: torch.device | None = None) -> Tensor:
    """Coordinates of the cells of a regular grid, the first cell at (0, 0) and the last at (1, 1).

    Args:
        height: Number of rows.
        width: Number of columns.
        device: Device of the result.

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
        TypeError: If an argument is not a tensor.
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
        TypeError: If the coordinates are not tensors.
        ValueError: If ``kind`` is not one of the two.
    """
    require_vectors(coords=coords, prototype_coords=prototype_coords)
    if kind == "euclidean":
        return torch.cdist(coords, prototype_coords)
    if kind == "squared":
        # A sum over a last dimension of two is slow.
        pairs = zip(coords.unbind(-1), prototype_coords.unbind(-1), strict=True)
        down, right = ((cells[..., :, None] - others[..., None, :]).square_() for cells, others in pairs)
        return down.add_(right)
    msg = f"spatial cost must be 'squared' or 'euclidean', not {kind!r}"
    raise ValueError(msg)


class Cost(Protocol):
    """A cost matrix M that computes blocks of its rows on request.

    It may have an attribute ``spread``, an upper bound of max M − min M. Where this is a few ε, solves start sooner.

    Attributes:
        shape: (N, P).
    """

    shape: torch.Size

    def __getitem__(self, rows: slice) -> Tensor:
        """Rows of M, (len(rows), P)."""

    def blocks(self) -> Iterator[slice]:
        """Consecutive slices of rows, each small enough for the cache of a CPU."""

    def exponents(self, potential: Tensor, epsilon: float) -> Exponents:
        """Rows of (g − M) / ε, for a potential g (P,)."""


class DenseCost:
    """A cost matrix given as a tensor.

    Args:
        matrix: M, (N, P), finite.

    Attributes:
        shape: (N, P).
        spread: max M − min M.

    Raises:
        TypeError: If the matrix is not a tensor.
        ValueError: If the tensor is not a matrix, is empty, or has NaN or infinite entries.
    """

    def __init__(self, matrix: Tensor) -> None:
        require_floats(cost=matrix)
        if matrix.ndim != 2 or not matrix.numel():  # noqa: PLR2004 - a matrix has two dimensions
            msg = f"the cost must be a non-empty matrix, not of shape {tuple(matrix.shape)}"
            raise ValueError(msg)
        least, largest = matrix.aminmax()
        if not (least.isfinite() and largest.isfinite()):
            msg = "the cost has NaN or infinite entries"
            raise ValueError(msg)
        self.shape = matrix.shape
        self.spread = float(largest) - float(least)
        self._matrix = at_least_single(matrix)

    def __getitem__(self, rows: slice) -> Tensor:
        """Rows of M."""
        return self._matrix[rows]

    def blocks(self) -> Iterator[slice]:
        """Slices of rows; see :class:`Cost`."""
        return row_blocks(self.shape, self.shape[0], self._matrix.device)

    def exponents(self, potential: Tensor, epsilon: float) -> Exponents:
        """Rows of (g − M) / ε; see :class:`Cost`."""
        return StoredExponents(Stored(self._matrix), potential[None], -1.0, 1 / epsilon)


class FusedCost:
    """Cost matrix of the transport from the features of a batch to the prototypes, PRADOT's eq. 3, row by row.

    M = (1 − α) M_feat / max M_feat + α M_struct / max M_struct, with the maxima over the whole batch. The matrix is
    never stored. M_struct is the same for all images and is computed once, for one image.

    Args:
        features: (B·N, D), the N cells of B images, image after image.
        prototypes: (P, D).
        coords: (N, 2), coordinates of the cells of one image, in [0, 1].
        prototype_coords: (P, 2), in [0, 1].
        alpha: Weight of the spatial term, in [0, 1].
        kind: See :func:`spatial_cost`.
        processes: Processes that hold further images of the batch.
        workspace: Memory for the similarities, if they and the kernel fit. They are stored exactly or, on the CPU,
            rounded to 16 bits. Rounding changes a cost by at most 2⁻¹⁷, and rounded similarities are used only if this
            is at most ε / 500. Otherwise, or without a workspace, similarities are computed again on each use.

    Attributes:
        shape: (B·N, P).
        spread: 1, as M is in [0, 1] up to rounding.

    Raises:
        TypeError: If features, prototypes or coordinates are not tensors.
        ValueError: If there are no features or no prototypes, their sizes differ, they are not finite, the features are
            not whole images, the number of prototypes and of their coordinates differ, or α is out of its range.

    Example:
        >>> corners = grid_coordinates(1, 2)
        >>> FusedCost(torch.eye(2), torch.eye(2), corners, corners, alpha=0.5)[:].tolist()
        [[0.0, 1.0], [1.0, 0.0]]
    """

    spread = 1.0

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
        processes = processes or Processes()
        _check(features, prototypes, coords, prototype_coords, alpha, processes)
        self.shape = torch.Size([features.shape[0], prototypes.shape[0]])
        self.cells = coords.shape[0]
        features, prototypes = at_least_single(features), at_least_single(prototypes)
        self._features = F.normalize(features, dim=-1)
        self._prototypes = F.normalize(prototypes, dim=-1)
        self._stored = self._store(workspace) if workspace else None
        farthest = 1 - float(processes.min(self._lowest_similarity()))
        if not math.isfinite(farthest):
            msg = "features and prototypes must be finite, but some entries are NaN or infinite"
            raise ValueError(msg)
        # A term that is zero up to rounding is not scaled: that of a single prototype cell, or of equal features.
        rounding = _ROUNDINGS * torch.finfo(features.dtype).eps
        self._scale = (1 - alpha) / (farthest if farthest > rounding else 1.0)
        # The part of the cost that does not depend on the features, for the cells of one image: (N, P) or (1, 1).
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
        """Rows of (g − M) / ε; see :class:`Cost`."""
        offsets = (potential - self._offsets).div_(epsilon)
        if len(offsets) > 1:
            offsets = offsets.repeat(max(1, _block_rows(self.shape, self._features.device) // self.cells), 1)
        slope = self._scale / epsilon
        stored = self._stored
        if stored and (stored.rounding is None or epsilon * _SHARE_OF_EPSILON >= _ROUNDED):
            return StoredExponents(stored, offsets, slope)
        return ProductExponents(self._features, self._prototypes, offsets, slope)

    def _store(self, workspace: Workspace) -> Stored | None:
        """Memory for the similarities in the best form that fits, or None."""
        like, entries = self._features, self.shape.numel()
        if 2 * entries * like.element_size() <= workspace.memory:
            matrix = workspace.take("similarities", self.shape, like.dtype, like.device)
            return Stored(matrix, workspace=workspace)
        if like.device.type == "cpu" and like.dtype == torch.float32 and _BYTES_ROUNDED * entries <= workspace.memory:
            matrix = workspace.take("similarities", self.shape, torch.int16, like.device)
            return Stored(matrix, Rounding(*like.new_empty(2, len(like))), workspace)
        return None

    def _lowest_similarity(self) -> Tensor:
        """Smallest similarity of a feature and a prototype, NaN if some are not finite; stores all if they fit."""
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
        """Store all similarities rounded, and return the smallest, NaN if some are not finite."""
        if not (self._features.isfinite().all() and self._prototypes.isfinite().all()):
            return self._features.new_tensor(math.nan)
        from ._compiled import round_rows  # noqa: PLC0415 - imports Numba, which scoring does not need

        middles, steps = rounding
        scratch = self._features.new_empty(min(_ROWS, len(matrix)), len(self._prototypes))
        for start in range(0, len(matrix), _ROWS):
            rows = slice(start, min(start + _ROWS, len(matrix)))
            block = torch.mm(self._features[rows], self._prototypes.T, out=scratch[: rows.stop - start])
            round_rows(block, matrix[rows], middles[rows], steps[rows])
        # The minimum of each row is exact up to float32 rounding.
        lowest = torch.addcmul(middles, steps, steps.new_tensor(-LEVELS))
        return lowest.amin() if len(lowest) else lowest.new_tensor(math.inf)


def spread_of(cost: Cost) -> float:
    """Upper bound of max M − min M of a cost, infinite if it tells none."""
    return float(getattr(cost, "spread", math.inf))


def row_blocks(shape: torch.Size, cells: int, device: torch.device) -> Iterator[slice]:
    """Slices of consecutive rows of a matrix (N, P), each small enough for the cache of a CPU.

    Args:
        shape: (N, P).
        cells: Rows of one image; a block has whole images or a part of one.
        device: Device of the matrix; blocks are larger on a GPU.
    """
    count = _block_rows(shape, device)
    if count >= cells:
        step = count - count % cells
        yield from (slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step))
        return
    for image in range(0, shape[0], cells):
        end = image + cells
        yield from (slice(start, min(start + count, end)) for start in range(image, end, count))


def _check(
    features: Tensor, prototypes: Tensor, coords: Tensor, prototype_coords: Tensor, alpha: float, processes: Processes
) -> None:
    """Check the arguments of :class:`FusedCost`."""
    require_vectors(features=features, prototypes=prototypes)
    require_vectors(coords=coords, prototype_coords=prototype_coords)
    require_same_device(features=features, prototypes=prototypes, coords=coords, prototype_coords=prototype_coords)
    for name, matrix in (("features", features), ("prototypes", prototypes), ("coords", coords)):
        if matrix.ndim != 2:  # noqa: PLR2004 - a matrix has two dimensions
            msg = f"{name} must be a matrix, not of shape {tuple(matrix.shape)}"
            raise ValueError(msg)
    rows, columns, cells = len(features), len(prototypes), len(coords)
    if not columns or not processes.total(rows, features.device):
        msg = f"there is nothing to transport from {rows} features to {columns} prototypes"
        raise ValueError(msg)
    if not cells or rows % cells:
        msg = f"{rows} features are not whole images of {cells} cells"
        raise ValueError(msg)
    if len(prototype_coords) != columns:
        msg = f"{columns} prototypes cannot have {len(prototype_coords)} coordinates"
        raise ValueError(msg)
    if not 0 <= alpha <= 1:
        msg = f"alpha must be in [0, 1], not {alpha}"
        raise ValueError(msg)


def _block_rows(shape: torch.Size, device: torch.device) -> int:
    return max(1, (_BLOCK_ENTRIES if device.type == "cpu" else 64 * _BLOCK_ENTRIES) // shape[1])
