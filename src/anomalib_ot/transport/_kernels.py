"""Storage of the Sinkhorn kernel K = exp((f + g − M) / ε): sparse, dense, or not stored."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from ._exponents import Exponents
from ._precision import TINY
from ._workspace import Workspace
from .costs import Cost, spread_of

# A dense entry below exp(_NEGLIGIBLE) is indistinguishable from zero beside the largest of its row, which is one.
_NEGLIGIBLE = -60.0
# Smallest matrix for which a sparse kernel is tried.
_SPARSE_ENTRIES = 2**20


class Scaled(Protocol):
    """What the iterations need of a kernel K (N, P) whose largest entry in each row is one.

    Attributes:
        widest: Largest log ratio of two column scalings for which the kernel is valid. Beyond it, build the kernel
            again.
        left_out: Upper bound of the entries that are set to zero.
    """

    widest: float
    left_out: float

    def scale_rows(self, v: Tensor, row_weights: Tensor) -> tuple[Tensor, Tensor]:
        """New row scaling u = a / Kv (N,), and Kᵀu (P,), in one pass over the kernel."""


class Kernel(Scaled, Protocol):
    """The kernel of a plan, with the products that results need."""

    def project(self, u: Tensor, points: Tensor) -> Tensor:
        """Kᵀ diag(u) points, (P, D) for points (N, D)."""

    def entropy(self, u: Tensor, v: Tensor) -> float:
        """Σ u K log(K) v, with 0 log 0 = 0."""

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Slices of rows and the rows of K at them."""


def make_kernel(
    cost: Cost, g: Tensor, epsilon: float, workspace: Workspace, error: float, allowance: float
) -> tuple[Kernel, Tensor]:
    """Build the kernel of a cost matrix in the cheapest form that its entries and the memory allow.

    - Sparse, if few of the entries matter; see :func:`anomalib_ot.transport._sparse.make_sparse`. On the CPU only.
    - Dense, with four bytes per entry (eight in double precision).
    - Not stored; each pass computes it.

    With Pradot's defaults all kernels are sparse, with 1 to 5 % of the entries; see the table in docs/results.md.

    Args:
        cost: M, (N, P).
        g: Potential of the columns, (P,).
        epsilon: Regularisation ε.
        workspace: Memory for the kernel.
        error: Share of a marginal that a sparse kernel may omit.
        allowance: Largest difference of the logs of the column scalings for which a sparse kernel must be valid. The
            smaller it is, the fewer entries the kernel needs.

    Returns:
        The kernel, and the potential f = min_j (M_ij − g_j) of the rows, (N,).

    Raises:
        ValueError: If the workspace cannot hold one block of rows.
    """
    exponents = cost.exponents(g, epsilon)
    blocks = list(cost.blocks())
    # A process may have no rows.
    block = max((rows.stop - rows.start for rows in blocks), default=0) * cost.shape[1] * g.element_size()
    if workspace.memory < block:
        msg = (
            f"the memory for transport is {workspace.memory:.0f} bytes, but one block needs {block} bytes; "
            "increase transport_memory"
        )
        raise ValueError(msg)
    entries = cost.shape.numel()
    highest = g.new_empty(cost.shape[0])
    kernel: Kernel | None = None
    if g.device.type == "cpu" and g.dtype == torch.float32 and entries >= _SPARSE_ENTRIES:
        from ._sparse import make_sparse  # noqa: PLC0415 - imports Numba, which scoring does not need

        spread = (spread_of(cost) + float(g.max() - g.min())) / epsilon
        kernel = make_sparse(exponents, blocks, cost.shape, highest, workspace, error, allowance, spread)
    if kernel is None and entries * g.element_size() <= workspace.memory - exponents.bytes_in(workspace):
        kernel = _make_dense(exponents, blocks, highest, workspace.take("kernel", cost.shape, g.dtype, g.device))
    if kernel is None:
        for rows in blocks:
            highest[rows] = exponents(rows).amax(1)
        kernel = RecomputedKernel(exponents, blocks, highest, cost.shape[1])
    return kernel, highest * -epsilon


class _BlockedKernel(ABC):
    """Products over dense blocks of rows, which a subclass provides; see :class:`Kernel`."""

    widest = -_NEGLIGIBLE - 20
    left_out = math.exp(_NEGLIGIBLE)

    def __init__(self, blocks: Sequence[slice], columns: int) -> None:
        self._slices = blocks
        self._columns = columns

    @abstractmethod
    def _block(self, rows: slice) -> Tensor:
        """Rows of K."""

    def scale_rows(self, v: Tensor, row_weights: Tensor) -> tuple[Tensor, Tensor]:
        """Scaling u = a / Kv, and Kᵀu."""
        u = torch.empty_like(row_weights)
        sums = torch.zeros_like(v)
        for rows, block in self.blocks():
            torch.div(row_weights[rows], (block @ v).clamp_(min=TINY), out=u[rows])
            sums.addmv_(block.T, u[rows])
        return u, sums

    def project(self, u: Tensor, points: Tensor) -> Tensor:
        """Kᵀ diag(u) points."""
        total = points.new_zeros(self._columns, points.shape[1])
        for rows, block in self.blocks():
            total.addmm_(block.T, points[rows] * u[rows, None])
        return total

    def entropy(self, u: Tensor, v: Tensor) -> float:
        """Σ u K log(K) v."""
        return sum(float(u[rows] @ (_times_log(block) @ v)) for rows, block in self.blocks())

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Slices of rows and the rows of K at them."""
        for rows in self._slices:
            yield rows, self._block(rows)


class DenseKernel(_BlockedKernel):
    """A kernel with all entries in memory.

    Args:
        matrix: K, (N, P).
        blocks: Slices of rows for blocked products.
    """

    def __init__(self, matrix: Tensor, blocks: Sequence[slice]) -> None:
        super().__init__(blocks, matrix.shape[1])
        self._matrix = matrix

    def scale_rows(self, v: Tensor, row_weights: Tensor) -> tuple[Tensor, Tensor]:
        """Scaling u = a / Kv, and Kᵀu."""
        if self._matrix.device.type == "cpu" and self._matrix.dtype == torch.float32:
            from ._compiled import scale_dense_rows  # noqa: PLC0415 - imports Numba

            return scale_dense_rows(self._matrix, v, row_weights)
        return super().scale_rows(v, row_weights)

    def _block(self, rows: slice) -> Tensor:
        return self._matrix[rows]


class BatchKernel:
    """The kernels of several problems of one size; it implements :class:`Scaled`.

    Args:
        matrix: K, (B, N, P).
    """

    widest = -_NEGLIGIBLE - 20
    left_out = math.exp(_NEGLIGIBLE)

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix

    def scale_rows(self, v: Tensor, row_weights: Tensor) -> tuple[Tensor, Tensor]:
        """Scaling u = a / Kv, (B, N), and Kᵀu, (B, P)."""
        u = row_weights / (self.matrix @ v[..., None])[..., 0].clamp_(min=TINY)
        return u, (u[..., None, :] @ self.matrix)[..., 0, :]


class RecomputedKernel(_BlockedKernel):
    """A kernel that is not stored; each pass computes its entries.

    Args:
        exponents: Maps a slice of rows to the rows of (g − M) / ε.
        blocks: Slices of rows to compute at once.
        highest: Largest exponent of each row, (N,).
        columns: P.
    """

    def __init__(self, exponents: Exponents, blocks: Sequence[slice], highest: Tensor, columns: int) -> None:
        super().__init__(blocks, columns)
        self._exponents = exponents
        self._highest = highest

    def _block(self, rows: slice) -> Tensor:
        return _exponentials(self._exponents(rows), self._highest[rows])


def _make_dense(exponents: Exponents, blocks: Sequence[slice], highest: Tensor, store: Tensor) -> DenseKernel:
    """Write the kernel to ``store`` and the largest exponent of each row to ``highest``."""
    if store.device.type == "cpu" and store.dtype == torch.float32 and exponents.are_finite:
        from ._exponentials import write_exponentials  # noqa: PLC0415 - imports Numba

        write_exponentials(exponents, blocks, _NEGLIGIBLE, highest, store)
    else:
        for rows in blocks:
            block = exponents(rows)
            torch.amax(block, 1, out=highest[rows])
            _exponentials(block, highest[rows], store[rows])
    return DenseKernel(store, blocks)


def make_batch(costs: Tensor, g: Tensor, epsilon: float) -> tuple[BatchKernel, Tensor]:
    """Build the dense kernels of several cost matrices (B, N, P) from potentials g (B, P).

    Returns:
        The kernels, and the potentials f = min_j (M_ij − g_j) of the rows, (B, N).
    """
    exponents = (g[:, None, :] - costs).div_(epsilon)
    highest = exponents.amax(2)
    return BatchKernel(_exponentials(exponents, highest)), highest * -epsilon


def _times_log(entries: Tensor) -> Tensor:
    """Entries times their logarithm, as ``torch.xlogy`` but with vector instructions."""
    return entries.clamp(min=TINY).log_().mul_(entries)


def _exponentials(exponents: Tensor, highest: Tensor, out: Tensor | None = None) -> Tensor:
    """Exponentials of a block relative to the largest of each row. Overwrites the block."""
    F.threshold(exponents.sub_(highest[..., None]), _NEGLIGIBLE, -math.inf, inplace=True)
    return torch.exp(exponents, out=exponents if out is None else out)
