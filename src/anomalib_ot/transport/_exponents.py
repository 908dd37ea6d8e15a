"""Exponents (g − M) / ε of the Sinkhorn kernel, for costs that are affine in a stored matrix or in a product."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ._workspace import Workspace

# Rows of a stored matrix in one block. Large blocks make the time negligible in which torch's threads keep spinning
# after each operation.
_ROWS = 4096


class Rounding(NamedTuple):
    """Affine map from the integers of a rounded matrix to S_ij = middles_i + steps_i · matrix_ij.

    Attributes:
        middles: (N,).
        steps: (N,).
    """

    middles: Tensor
    steps: Tensor


@dataclass(frozen=True)
class Stored:
    """A stored matrix S (N, P), exact or rounded.

    Attributes:
        matrix: S, or the integers of a rounded S.
        rounding: The map from these integers to S, or None if S is exact.
        workspace: The workspace that its memory comes from, or None.
    """

    matrix: Tensor
    rounding: Rounding | None = None
    workspace: Workspace | None = None


@dataclass(frozen=True)
class AffineRows:
    """Rows of exponents E_ij = unit · (offsets_kj + slopes_i · matrix_ij + shifts_i), k = (first + i) mod C.

    Attributes:
        matrix: (n, P).
        offsets: (C, P).
        first: Row of the offsets for the first row.
        slopes: (n,).
        shifts: (n,).
        unit: Positive.
    """

    matrix: Tensor
    offsets: Tensor
    first: int
    slopes: Tensor
    shifts: Tensor
    unit: float


class Exponents(ABC):
    """Rows of (g − M) / ε = unit · (offsets + slope · S).

    Args:
        offsets: (C, P). Row i uses row i mod C; the rows of a block are consecutive.
        slope: Factor of S.
        unit: Common factor, positive.
    """

    def __init__(self, offsets: Tensor, slope: float, unit: float = 1.0) -> None:
        self._offsets = offsets
        self._slope = slope
        self._unit = unit
        self._scratch: Tensor | None = None

    @abstractmethod
    def __call__(self, rows: slice) -> Tensor:
        """The exponents of a block, (n, P), valid until the next call."""

    @abstractmethod
    def affine(self, rows: slice) -> AffineRows:
        """The exponents of a block as an affine function of a matrix, valid until the next call."""

    @cached_property
    def are_finite(self) -> bool:
        """Whether offsets and slope are finite; then all exponents are, unless one overflows."""
        return math.isfinite(self._slope * self._unit) and all(each.isfinite() for each in self._offsets.aminmax())

    def slices(self, blocks: Sequence[slice]) -> Sequence[slice]:
        """Slices of rows for :meth:`affine`, from the slices of rows for calls."""
        return blocks

    def bytes_in(self, _workspace: Workspace) -> int:
        """Bytes of a workspace that S occupies."""
        return 0

    def _first(self, rows: slice) -> int:
        return int(rows.start) % len(self._offsets)

    def _offsets_of(self, rows: slice) -> Tensor:
        if len(self._offsets) == 1:
            return self._offsets
        return self._offsets[self._first(rows) :][: rows.stop - rows.start]

    def _block(self, rows: slice) -> Tensor:
        """Memory for the exponents of a block."""
        count = rows.stop - rows.start
        if self._scratch is None or len(self._scratch) < count:
            self._scratch = torch.empty_like(self._offsets[:1].expand(count, -1), memory_format=torch.contiguous_format)
        return self._scratch[:count]


class StoredExponents(Exponents):
    """Exponents of a stored matrix.

    Args:
        stored: S.
        offsets: See :class:`Exponents`.
        slope: See :class:`Exponents`.
        unit: See :class:`Exponents`.
    """

    def __init__(self, stored: Stored, offsets: Tensor, slope: float, unit: float = 1.0) -> None:
        super().__init__(offsets, slope, unit)
        self._stored = stored

    def __call__(self, rows: slice) -> Tensor:
        """The exponents of a block; see :class:`Exponents`."""
        out = self._block(rows)
        if self._stored.rounding is None:
            torch.add(self._offsets_of(rows), self._stored.matrix[rows], alpha=self._slope, out=out)
        else:
            affine = self.affine(rows)
            torch.mul(affine.matrix, affine.slopes[:, None], out=out)
            out.add_(self._offsets_of(rows)).add_(affine.shifts[:, None])
        return out if self._unit == 1 else out.mul_(self._unit)

    def slices(self, blocks: Sequence[slice]) -> Sequence[slice]:
        """Larger slices, because :meth:`affine` allocates no block; see :class:`Exponents`."""
        last = blocks[-1].stop if blocks else 0
        return [slice(start, min(start + _ROWS, last)) for start in range(0, last, _ROWS)]

    def bytes_in(self, workspace: Workspace) -> int:
        """Bytes of a workspace that S occupies."""
        return self._stored.matrix.nbytes if self._stored.workspace is workspace else 0

    def affine(self, rows: slice) -> AffineRows:
        """The exponents of a block as a function of S; see :class:`Exponents`."""
        stored = self._stored
        if stored.rounding is None:
            slopes = self._offsets.new_full((rows.stop - rows.start,), self._slope)
            shifts = torch.zeros_like(slopes)
        else:
            shifts, slopes = (each[rows] * self._slope for each in stored.rounding)
        return AffineRows(stored.matrix[rows], self._offsets, self._first(rows), slopes, shifts, self._unit)


class ProductExponents(Exponents):
    """Exponents of a product that is computed block by block, on each use.

    Args:
        left: A of S = A Bᵀ, (N, D).
        right: B, (P, D).
        offsets: See :class:`Exponents`.
        slope: Likewise.
    """

    def __init__(self, left: Tensor, right: Tensor, offsets: Tensor, slope: float) -> None:
        super().__init__(offsets, slope)
        self._left = left
        self._right = right

    def __call__(self, rows: slice) -> Tensor:
        """The exponents of a block; see :class:`Exponents`."""
        out = self._block(rows)
        return torch.addmm(self._offsets_of(rows), self._left[rows], self._right.T, alpha=self._slope, out=out)

    def affine(self, rows: slice) -> AffineRows:
        """The exponents of a block, as a function of themselves; see :class:`Exponents`."""
        block = self(rows)
        return AffineRows(
            block, torch.zeros_like(block[:1]), 0, block.new_ones(len(block)), block.new_zeros(len(block)), 1
        )
