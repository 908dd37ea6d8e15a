"""Exponentials of a matrix of exponents, for the CPU: loops compiled by Numba, run in several threads."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from ._compiled import FAST, FINITE, LANES, Floats, Numbers, compiled, largest_of, over_rows, run, shares
from ._exponents import Exponents

# Rows that the loop processes together, while they are in the cache.
_TOGETHER = 8
# Coefficients of the Taylor series of 2ˣ, whose error is below that of float32 for |x| ≤ ½.
_SERIES = tuple(np.float32(math.log(2) ** k / math.factorial(k)) for k in range(8))
# Bits of the fraction of float32, and the offset and the least value of its exponent.
_FRACTION, _OFFSET, _LEAST = np.int32(23), np.int32(127), np.float32(-126)


def sum_exponentials(exponents: Exponents, blocks: Sequence[slice], columns: int) -> tuple[Tensor, Tensor]:
    """Largest entry of each column of a matrix of exponents, and the sum of exp(entry − largest), in one pass.

    Args:
        exponents: Maps a slice of rows to the rows of the matrix, float32, finite.
        blocks: Slices of rows to compute at once.
        columns: P.

    Returns:
        The largest entries and the sums, both (P,). Their rounding errors depend on the number of threads.
    """
    threads = torch.get_num_threads()
    largest = torch.full((threads, columns), -math.inf, dtype=torch.float32)
    sums = torch.zeros_like(largest)
    for rows in exponents.slices(blocks):
        block = exponents.affine(rows)
        unit = np.float32(block.unit / math.log(2))
        affine = (block.matrix, block.offsets, block.slopes, block.shifts)
        arrays = (*(each.numpy() for each in affine), block.first, unit)
        parts = zip(shares(len(block.matrix)), largest.numpy(), sums.numpy(), strict=True)
        run(_add_exponentials, [(*share, *arrays, top, total) for share, top, total in parts])
    top = largest.amax(0)
    return top * math.log(2), (sums * (largest - top).exp2()).sum(0)


def write_exponentials(
    exponents: Exponents, blocks: Sequence[slice], negligible: float, highest: Tensor, store: Tensor
) -> None:
    """Exponentials of a matrix relative to the largest exponent of each row, in one pass.

    Args:
        exponents: Maps a slice of rows to the rows of the matrix, float32, finite.
        blocks: Slices of rows to compute at once.
        negligible: Difference to the largest exponent below which an exponential is written as zero.
        highest: Output, the largest exponent of each row, (N,).
        store: Output, the exponentials, (N, P), float32.
    """
    for rows in exponents.slices(blocks):
        block = exponents.affine(rows)
        unit = block.unit / math.log(2)
        arrays = (block.matrix, block.offsets, block.first, block.slopes)
        tops = highest[rows]
        over_rows(_write_exponentials, len(tops), *arrays, unit, negligible / math.log(2), tops, store[rows])
        tops.add_(block.shifts).mul_(block.unit)


def _power_of_two(x: Any) -> Any:
    """2ˣ of a float32 x, or 2⁻¹²⁶ if x is less."""
    x = max(x, _LEAST)
    whole = np.rint(x)
    x -= whole
    power = _SERIES[7]
    power = power * x + _SERIES[6]
    power = power * x + _SERIES[5]
    power = power * x + _SERIES[4]
    power = power * x + _SERIES[3]
    power = power * x + _SERIES[2]
    power = power * x + _SERIES[1]
    power = power * x + _SERIES[0]
    scale = np.int32((np.int32(whole) + _OFFSET) << _FRACTION).view(np.float32)
    return power * scale


_exp2: Any = njit(fastmath=FAST, inline="always")(_power_of_two)


@compiled(FINITE)
def _add_exponentials(
    start: int,
    stop: int,
    matrix: Numbers,
    offsets: Floats,
    slopes: Floats,
    shifts: Floats,
    first: int,
    unit: float,
    largest: Floats,
    sums: Floats,
) -> None:
    """Add the rows of E = unit · (offsets + slopes · matrix + shifts) from start to stop to largest and sums.

    ``largest`` is that of E, and ``sums`` are the sums of 2 to the power of E − largest.
    """
    before = np.empty_like(largest)
    for begin in range(start, stop, _TOGETHER):
        end = min(begin + _TOGETHER, stop)
        before[:] = largest
        for i in range(begin, end):
            row, offset, slope, shift = matrix[i], offsets[(first + i) % len(offsets)], slopes[i], shifts[i]
            for j in range(len(largest)):
                entry = unit * (offset[j] + (slope * np.float32(row[j]) + shift))
                largest[j] = max(largest[j], entry)
        for j in range(len(sums)):
            sums[j] *= _exp2(before[j] - largest[j])
        for i in range(begin, end):
            row, offset, slope, shift = matrix[i], offsets[(first + i) % len(offsets)], slopes[i], shifts[i]
            for j in range(len(sums)):
                entry = unit * (offset[j] + (slope * np.float32(row[j]) + shift))
                sums[j] += _exp2(entry - largest[j])


@compiled(FINITE)
def _write_exponentials(
    start: int,
    stop: int,
    matrix: Numbers,
    offsets: Floats,
    first: int,
    slopes: Floats,
    unit: float,
    negligible: float,
    highest: Floats,
    store: Floats,
) -> None:
    """Maximum of each row of E = offsets + slopes · matrix, and 2 to the power of unit · (E − maximum)."""
    lanes = np.empty(LANES, np.float32)
    for i in range(start, stop):
        row, offset, slope, out = matrix[i], offsets[(first + i) % len(offsets)], slopes[i], store[i]
        top = largest_of(row, offset, slope, lanes)
        highest[i] = top
        for j in range(len(row)):
            difference = np.float32(unit) * (offset[j] + slope * np.float32(row[j]) - top)
            power = _exp2(difference)
            out[j] = power if difference >= np.float32(negligible) else np.float32(0)
