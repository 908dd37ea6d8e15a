"""The sparse Sinkhorn kernel for the CPU: loops over its entries, compiled by Numba and run in several threads."""

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ._compiled import FAST, FINITE, LANES, Floats, Integers, Numbers, compiled, largest_of, over_rows, run
from ._exponents import Exponents
from ._precision import TINY
from ._workspace import Workspace
from .costs import row_blocks

# With more than this share of the entries, a sparse kernel is slower than a dense one.
_SPARSE = 0.2
_BYTES_OF_ENTRY = 8


class SparseKernel:
    """A kernel as a compressed sparse row matrix, without its smallest entries.

    It implements :class:`anomalib_ot.transport._kernels.Kernel`.

    Args:
        offsets: Index of the first entry of each row, and the number of entries, (N + 1,).
        columns: Column of each entry.
        values: The entries.
        width: P.
        widest: Largest log ratio of two column scalings for which the omitted entries are negligible.
        left_out: Upper bound of the omitted entries.
        error: Share of a column that a projection may omit.
    """

    def __init__(
        self, offsets: Tensor, columns: Tensor, values: Tensor, width: int, widest: float, left_out: float, error: float
    ) -> None:
        self.widest = widest
        self.left_out = left_out
        self._error = error
        self._offsets = offsets
        self._columns = columns
        self._values = values
        self._width = width
        self._entries = (offsets.numpy(), columns.numpy().view(np.uint32), values.numpy())
        self._parts = _shares(offsets)

    def column_sums(self, u: Tensor) -> Tensor:
        """Kᵀu, (P,)."""
        return self._summed((self._width,), _add_columns, u.numpy())

    def scale_rows(self, v: Tensor, row_weights: Tensor) -> tuple[Tensor, Tensor]:
        """Scaling u = a / Kv (N,), and Kᵀu (P,)."""
        u = torch.empty_like(row_weights)
        return u, self._summed((self._width,), _scale_rows, v.numpy(), row_weights.numpy(), u.numpy())

    def project(self, u: Tensor, points: Tensor) -> Tensor:
        """Kᵀ diag(u) points, (P, D) for points (N, D), without the smallest entries of each column.

        The omitted entries of a column are together at most the share ``error`` of its sum.
        """
        floor = self.column_sums(u).mul_(self._error / len(u))
        arrays = (u.numpy(), floor.numpy(), points.contiguous().numpy())
        return self._summed((self._width, points.shape[1]), _add_points, *arrays)

    def entropy(self, u: Tensor, v: Tensor) -> float:
        """Σ u K log(K) v, with 0 log 0 = 0."""
        return float(self._summed((1,), _add_entropy, u.numpy(), v.numpy()))

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Slices of rows and the rows of K at them."""
        shape = torch.Size([len(self._offsets) - 1, self._width])
        for part in row_blocks(shape, shape[0], self._values.device):
            offsets = self._offsets[part.start : part.stop + 1]
            here = slice(int(offsets[0]), int(offsets[-1]))
            rows = torch.arange(len(offsets) - 1).repeat_interleave(offsets.diff())
            block = self._values.new_zeros(len(offsets) - 1, self._width)
            block[rows, self._columns[here].long()] = self._values[here]
            yield part, block

    def _summed(self, shape: tuple[int, ...], add: Callable[..., None], *arguments: np.ndarray) -> Tensor:
        """Call ``add`` on a part of the rows in each thread, and sum the results."""
        sums = self._values.new_zeros(len(self._parts), *shape)
        run(
            add,
            [(*rows, *self._entries, *arguments, part) for rows, part in zip(self._parts, sums.numpy(), strict=True)],
        )
        return sums.sum(0)


def make_sparse(
    exponents: Exponents,
    blocks: Sequence[slice],
    shape: torch.Size,
    highest: Tensor,
    workspace: Workspace,
    error: float,
    allowance: float,
    spread: float = math.inf,
) -> SparseKernel | None:
    """Build the sparse kernel of a matrix of exponents, unless too many of its entries matter.

    Entries below exp(−θ) times the largest of their row are omitted. Let θ = log(P / δ) + w. As long as
    log max v / min v ≤ w, the omitted entries are at most a share P exp(−θ) max v / min v ≤ δ of the sum of a row, and
    at most the same share of a column's marginal 1/P.

    Args:
        exponents: Maps a slice of rows to the rows of (g − M) / ε.
        blocks: Slices of rows to compute at once.
        shape: (N, P).
        highest: Output, the largest exponent of each row (N,).
        workspace: Memory for the kernel.
        error: δ, the share of a marginal that may be omitted.
        allowance: w, by how much the logs of the column scalings may differ.
        spread: Upper bound of the differences of exponents.

    Returns:
        The kernel, or None if an exponent is not finite, or if the kernel would have more than a fifth of the entries
        or would not fit the memory.
    """
    threshold = math.log(shape[1] / error) + allowance
    if spread <= threshold or not exponents.are_finite:
        return None
    most = int(min(_SPARSE * shape.numel(), (workspace.memory - exponents.bytes_in(workspace)) / _BYTES_OF_ENTRY))
    values = workspace.take("values", torch.Size([most]), torch.float32, highest.device)
    columns = workspace.take("columns", torch.Size([most]), torch.int32, highest.device)
    offsets = torch.zeros(shape[0] + 1, dtype=torch.int64)
    done = 0
    blocks = exponents.slices(blocks)
    for index, rows in enumerate(blocks):
        block = exponents.affine(rows)
        parts = (block.matrix, block.offsets, block.first, block.slopes, threshold / block.unit)
        here, tops = offsets[rows.start : rows.stop + 1], highest[rows]
        over_rows(_count, len(tops), *parts, tops, here[1:])
        here.cumsum_(0)
        end = int(here[-1])
        # After a sixteenth of the matrix, its density is known. The entries need room for one more, because the loop
        # writes each entry before it decides whether to keep it.
        sample = 16 * index >= len(blocks) and end > _SPARSE * rows.stop * shape[1]
        if end + 1 > most or sample:
            return None
        over_rows(_gather, len(tops), *parts, tops, here, columns, values)
        values[done:end].mul_(block.unit).exp_()
        tops.add_(block.shifts).mul_(block.unit)
        done = end
    return SparseKernel(offsets, columns[:done], values[:done], shape[1], allowance, math.exp(-threshold), error)


def _shares(offsets: Tensor) -> list[tuple[int, int]]:
    """First and last row of each thread's share, with about the same number of entries."""
    threads = torch.get_num_threads()
    bounds = torch.searchsorted(offsets, int(offsets[-1]) * torch.arange(1, threads) // threads).tolist()
    return list(zip([0, *bounds], [*bounds, len(offsets) - 1], strict=True))


# The loops run over views of a row, and columns are unsigned, so that Numba does not check for negative indices.


@compiled(FINITE)
def _count(
    start: int,
    stop: int,
    matrix: Numbers,
    offsets: Floats,
    first: int,
    slopes: Floats,
    margin: float,
    highest: Floats,
    counts: Integers,
) -> None:
    """Maximum of each row of offsets + slopes · matrix, and the number of entries within the margin below it."""
    lanes = np.empty(LANES, np.float32)
    for i in range(start, stop):
        row, offset, slope = matrix[i], offsets[(first + i) % len(offsets)], slopes[i]
        highest[i] = largest_of(row, offset, slope, lanes)
        lowest, count = highest[i] - np.float32(margin), np.int32(0)
        for j in range(len(row)):
            count += np.int32(offset[j] + slope * np.float32(row[j]) >= lowest)
        counts[i] = count


@compiled(FINITE)
def _gather(
    start: int,
    stop: int,
    matrix: Numbers,
    offsets: Floats,
    first: int,
    slopes: Floats,
    margin: float,
    highest: Floats,
    places: Integers,
    columns: Integers,
    values: Floats,
) -> None:
    """Columns of the entries that :func:`_count` counts, and their differences to the maximum of the row."""
    for i in range(start, stop):
        row, offset, slope, top = matrix[i], offsets[(first + i) % len(offsets)], slopes[i], highest[i]
        lowest = top - np.float32(margin)
        kept, where = values[places[i] : places[i + 1]], columns[places[i] : places[i + 1]]
        k = 0
        for j in range(len(row)):
            if k == len(kept):
                break
            # Every entry is written, because a branch that cannot be predicted costs more. The next entry overwrites
            # one that is not kept.
            entry = offset[j] + slope * np.float32(row[j])
            where[k] = j
            kept[k] = entry - top
            k += entry >= lowest


@compiled()
def _add_columns(
    first: int, stop: int, offsets: Integers, columns: Integers, values: Floats, u: Floats, sums: Floats
) -> None:
    """Add Kᵀu to the sums."""
    for i in range(first, stop):
        row, where = values[offsets[i] : offsets[i + 1]], columns[offsets[i] : offsets[i + 1]]
        for k in range(len(row)):
            sums[where[k]] += row[k] * u[i]


@compiled(FAST)
def _scale_rows(
    first: int,
    stop: int,
    offsets: Integers,
    columns: Integers,
    values: Floats,
    v: Floats,
    a: Floats,
    u: Floats,
    sums: Floats,
) -> None:
    """Compute u = a / Kv, and add Kᵀu while the row is in the cache."""
    for i in range(first, stop):
        row, where = values[offsets[i] : offsets[i + 1]], columns[offsets[i] : offsets[i + 1]]
        total = np.float32(0)
        for k in range(len(row)):
            total += row[k] * v[where[k]]
        scaling = a[i] / max(total, np.float32(TINY))
        u[i] = scaling
        for k in range(len(row)):
            sums[where[k]] += row[k] * scaling


@compiled(FAST)
def _add_points(
    first: int,
    stop: int,
    offsets: Integers,
    columns: Integers,
    values: Floats,
    u: Floats,
    floor: Floats,
    points: Floats,
    sums: Floats,
) -> None:
    """Add Kᵀ diag(u) points to the sums, without the entries of diag(u) K below the floor of their column."""
    for i in range(first, stop):
        row, where = values[offsets[i] : offsets[i + 1]], columns[offsets[i] : offsets[i + 1]]
        point = points[i]
        for k in range(len(row)):
            weight = row[k] * u[i]
            if weight >= floor[where[k]]:
                target = sums[where[k]]
                for d in range(len(point)):
                    target[d] += weight * point[d]


@compiled(FAST)
def _add_entropy(
    first: int, stop: int, offsets: Integers, columns: Integers, values: Floats, u: Floats, v: Floats, sums: Floats
) -> None:
    """Add Σ u K log(K) v to the sum."""
    for i in range(first, stop):
        row, where = values[offsets[i] : offsets[i + 1]], columns[offsets[i] : offsets[i + 1]]
        total = np.float32(0)
        for k in range(len(row)):
            total += row[k] * np.log(max(row[k], np.float32(TINY))) * v[where[k]]
        sums[0] += u[i] * total
