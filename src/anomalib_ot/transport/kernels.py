"""Storage of the Sinkhorn kernel K = exp((f + g − M) / ε): sparse, dense, rounded, or not at all."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from .costs import Cost, row_blocks
from .workspace import Workspace

# Below _TINY a float32 sum counts as underflowed; a dense entry below exp(_NEGLIGIBLE) cannot be told from zero next to
# the largest of its row, which is one.
TINY = 1e-30
_NEGLIGIBLE = -60.0
# A sparse kernel leaves out what changes no marginal by more than this share, as long as the scalings of the columns
# differ by at most exp(±_ALLOWANCE / 2); beyond that it is made anew.
_SCREENING_ERROR = 1e-4
_ALLOWANCE = 8.0
# Beyond this share of entries, a sparse kernel is slower than a dense one.
_SPARSE = 0.15
_SPARSE_ENTRIES = 2**20
_BYTES_OF_SPARSE_ENTRY = 8


class Kernel(Protocol):
    """A kernel K (N, P) whose rows have one as their largest entry, and the products that the solver needs.

    Attributes:
        widest: Largest log of the ratio of two column scalings for which the kernel serves; beyond, make it anew.
        left_out: Bound of the entries that are zero only because they are small.
    """

    widest: float
    left_out: float

    def column_sums(self, u: Tensor) -> Tensor:
        """Kᵀu, (P,)."""

    def scale_rows(self, v: Tensor, row_weights: Tensor) -> tuple[Tensor, Tensor]:
        """New row scaling u = a / Kv (N,), and Kᵀu (P,), in one pass over the kernel."""

    def project(self, u: Tensor, points: Tensor) -> Tensor:
        """Kᵀ diag(u) points, (P, D) for points (N, D)."""

    def entropy(self, u: Tensor, v: Tensor) -> float:
        """Σ u K log(K) v, with 0 log 0 = 0."""

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Slices of rows and the rows of K at them."""


def make_kernel(cost: Cost, g: Tensor, epsilon: float, workspace: Workspace) -> tuple[Kernel, Tensor]:
    """Kernel of a cost matrix, in the cheapest form that its entries and the memory allow.

    - Sparse, where at most 15 % of the entries matter. An entry below exp(−θ) of its row's largest is left out; with
      θ = log(P / δ) + 8 what is left out of a row is a share of at most P exp(−θ) max v / min v ≤ δ = 1e-4 of its sum,
      and no larger a share of a column's marginal 1/P, while log max v / min v ≤ 8. Processors without graphics only.
    - Dense.
    - Dense in bfloat16. Rounding an entry by a share of 2⁻⁹ is a change of the cost by at most ε / 500.
    - Not stored, each pass computes it anew.

    Args:
        cost: M, (N, P).
        g: Potential of the columns, (P,).
        epsilon: Regularisation ε.
        workspace: Memory to put it into.

    Returns:
        The kernel, and the potential f = min_j (M_ij − g_j) of the rows, (N,).

    Raises:
        ValueError: If the workspace does not even hold a block.
    """
    exponents = cost.exponents(g, epsilon)
    blocks = list(cost.blocks())
    # A process may have no rows.
    block = max((rows.stop - rows.start for rows in blocks), default=0) * cost.shape[1] * g.element_size()
    if workspace.memory < block:
        msg = (
            f"{workspace.memory:.0f} bytes of memory for transport do not hold one block of {block} bytes; "
            "give it more (transport_memory)"
        )
        raise ValueError(msg)
    entries = cost.shape.numel()
    highest = g.new_empty(cost.shape[0])
    kernel: Kernel | None = None
    if g.device.type == "cpu" and g.dtype == torch.float32 and entries >= _SPARSE_ENTRIES:
        kernel = _make_sparse(exponents, blocks, cost.shape, highest, workspace)
    for dtype in (g.dtype, torch.bfloat16):
        if kernel is None and entries * dtype.itemsize <= workspace.memory:
            kernel = _make_dense(exponents, blocks, highest, workspace.take("kernel", cost.shape, dtype, g.device))
    if kernel is None:
        for rows in blocks:
            highest[rows] = exponents(rows).amax(1)
        kernel = RecomputedKernel(exponents, blocks, highest, cost.shape[1])
    return kernel, highest * -epsilon


class SparseKernel:
    """The entries that matter, as a compressed sparse row matrix; see :class:`Kernel`.

    Args:
        matrix: K.
        left_out: Bound of the entries that it lacks.
    """

    widest = _ALLOWANCE

    def __init__(self, matrix: csr_array, left_out: float) -> None:
        self.left_out = left_out
        self._matrix = matrix
        self._transposed = matrix.T

    def column_sums(self, u: Tensor) -> Tensor:
        """Kᵀu."""
        return torch.from_numpy(self._transposed @ u.numpy())

    def scale_rows(self, v: Tensor, row_weights: Tensor) -> tuple[Tensor, Tensor]:
        """Scaling u = a / Kv, and Kᵀu."""
        u = row_weights / torch.from_numpy(self._matrix @ v.numpy()).clamp_(min=TINY)
        return u, self.column_sums(u)

    def project(self, u: Tensor, points: Tensor) -> Tensor:
        """Kᵀ diag(u) points."""
        return torch.from_numpy(self._transposed @ (points * u[:, None]).numpy())

    def entropy(self, u: Tensor, v: Tensor) -> float:
        """Σ u K log(K) v."""
        data = _times_log(torch.from_numpy(self._matrix.data)).numpy()
        matrix = csr_array((data, self._matrix.indices, self._matrix.indptr), shape=self._matrix.shape)
        return float(u @ torch.from_numpy(matrix @ v.numpy()))

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Slices of rows and the rows of K at them."""
        shape = torch.Size(self._matrix.shape)
        for rows in row_blocks(shape, shape[0], torch.device("cpu")):
            yield rows, torch.from_numpy(self._matrix[rows].toarray())


class _BlockedKernel(ABC):
    """Products over dense blocks of rows, wherever these come from; see :class:`Kernel`."""

    widest = -_NEGLIGIBLE - 20
    left_out = math.exp(_NEGLIGIBLE)

    def __init__(self, blocks: Sequence[slice], columns: int) -> None:
        self._slices = blocks
        self._columns = columns

    @abstractmethod
    def _block(self, rows: slice) -> Tensor:
        """Rows of K."""

    def column_sums(self, u: Tensor) -> Tensor:
        """Kᵀu."""
        sums = u.new_zeros(self._columns)
        for rows, block in self.blocks():
            sums.addmv_(block.T, u[rows])
        return sums

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
    """All entries, in memory.

    Args:
        matrix: K, (N, P).
        blocks: Slices of rows to work on.
        dtype: Type to compute in.
    """

    def __init__(self, matrix: Tensor, blocks: Sequence[slice], dtype: torch.dtype) -> None:
        super().__init__(blocks, matrix.shape[1])
        self._matrix = matrix
        self._dtype = dtype

    def _block(self, rows: slice) -> Tensor:
        return self._matrix[rows].to(self._dtype)


class RecomputedKernel(_BlockedKernel):
    """No entries, but the way to compute them.

    Args:
        exponents: Maps a slice of rows to the rows of (g − M) / ε.
        blocks: Slices of rows that it takes.
        highest: Largest exponent of each row, (N,).
        columns: P.
    """

    def __init__(
        self, exponents: Callable[[slice], Tensor], blocks: Sequence[slice], highest: Tensor, columns: int
    ) -> None:
        super().__init__(blocks, columns)
        self._exponents = exponents
        self._highest = highest

    def _block(self, rows: slice) -> Tensor:
        return _exponentials(self._exponents(rows), self._highest[rows])


def _make_sparse(
    exponents: Callable[[slice], Tensor],
    blocks: Sequence[slice],
    shape: torch.Size,
    highest: Tensor,
    workspace: Workspace,
) -> SparseKernel | None:
    """The sparse kernel, and the largest exponent of each row into ``highest``; None if too many entries matter."""
    most = int(min(_SPARSE * shape.numel(), workspace.memory / _BYTES_OF_SPARSE_ENTRY))
    values = workspace.take("values", torch.Size([most]), torch.float32, highest.device)
    columns = workspace.take("columns", torch.Size([most]), torch.int32, highest.device)
    counts = torch.zeros(shape[0] + 1, dtype=torch.int64)
    threshold = math.log(shape[1] / _SCREENING_ERROR) + _ALLOWANCE
    done = 0
    for index, rows in enumerate(blocks):
        block = exponents(rows)
        top = torch.amax(block, 1, out=highest[rows])
        kept = (block >= (top - threshold)[:, None]).view(-1).nonzero().squeeze(1)
        # A sixteenth of the matrix tells how dense it is.
        sample = 16 * index >= len(blocks) and done + len(kept) > _SPARSE * rows.stop * shape[1]
        if done + len(kept) > most or sample:
            return None
        row = kept // shape[1]
        here = slice(done, done + len(kept))
        torch.sub(kept, row, alpha=shape[1], out=columns[here])
        torch.exp(block.view(-1)[kept] - top[row], out=values[here])
        counts[rows.start + 1 : rows.stop + 1] = torch.bincount(row, minlength=len(top))
        done = here.stop
    offsets = counts.cumsum(0)
    matrix = csr_array(
        (values[:done].numpy(), columns[:done].numpy(), offsets.numpy().astype(np.int32 if done < 2**31 else np.int64)),
        shape=tuple(shape),
    )
    return SparseKernel(matrix, math.exp(-threshold))


def _make_dense(
    exponents: Callable[[slice], Tensor], blocks: Sequence[slice], highest: Tensor, store: Tensor
) -> DenseKernel:
    """The dense kernel in ``store``, and the largest exponent of each row into ``highest``."""
    for rows in blocks:
        block = exponents(rows)
        torch.amax(block, 1, out=highest[rows])
        _exponentials(block, highest[rows], store[rows])
    return DenseKernel(store, blocks, highest.dtype)


def _times_log(entries: Tensor) -> Tensor:
    """Entries times their logarithm; as ``torch.xlogy``, but in vector instructions."""
    return entries.clamp(min=TINY).log_().mul_(entries)


def _exponentials(exponents: Tensor, highest: Tensor, out: Tensor | None = None) -> Tensor:
    """Exponentials of a block, which is overwritten, relative to the largest of its row."""
    F.threshold(exponents.sub_(highest[:, None]), _NEGLIGIBLE, -math.inf, inplace=True)
    if out is None or out.dtype == exponents.dtype:
        return torch.exp(exponents, out=exponents if out is None else out)
    return out.copy_(exponents.exp_())
