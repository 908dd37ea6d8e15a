"""Loops over the rows of a kernel, compiled by Numba and run in several threads on the CPU.

This module and :mod:`~anomalib_ot.transport._sparse` import Numba. They are imported at the first solve, so that
scoring does not load Numba.
"""

import logging
import os
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numba import njit
from numba.core.caching import FunctionCache
from numpy.typing import NDArray
from torch import Tensor

from ._precision import LEVELS, TINY

logger = logging.getLogger(__name__)

# Reductions may be reordered, which allows vector instructions. NaN and infinity keep their meaning.
FAST = {"reassoc", "contract", "nsz"}
# For loops that find the maximum of finite numbers: if NaN were possible, they could not use vector instructions.
FINITE = FAST | {"nnan"}
# Running maxima of a loop that finds a maximum. With only one, each comparison would wait for the one before.
LANES = 64
# Rows that a loop processes together, so that it reads the scalings and the sums of the columns once for all of them.
_TOGETHER = 4

# Arguments of compiled loops. Numba ignores annotations and compiles a loop for each data type that it is called with.
Floats = NDArray[np.float32]
Integers = NDArray[np.integer[Any]]
Numbers = Floats | Integers


@cache
def _threads() -> ThreadPoolExecutor:
    """Threads for the loops, which release the interpreter's lock. Numba's own threads do not survive a fork."""
    return ThreadPoolExecutor(thread_name_prefix="sinkhorn")


if hasattr(os, "register_at_fork"):
    # A forked process does not have its parent's threads.
    os.register_at_fork(after_in_child=_threads.cache_clear)


class _Cache(FunctionCache):
    """Numba's cache on disk, ignored if it cannot be read or written, for example on a full disk."""

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """The compiled code for a signature, or None if the cache does not have it."""
        try:
            return super().load_overload(sig, target_context)  # type: ignore[no-untyped-call]
        except Exception:  # noqa: BLE001 - a damaged file can raise anything in pickle
            # A damaged index would also prevent saving the next entry.
            with suppress(OSError):
                self.flush()
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Save the compiled code for a signature."""
        with suppress(OSError):
            super().save_overload(sig, data)  # type: ignore[no-untyped-call]


def compiled(fastmath: Collection[str] = ()) -> Callable[[Callable[..., None]], Any]:
    """Decorator that compiles a loop on its first call, and caches the code on disk if a folder can be written to.

    Numba's own ``cache=True`` raises without such a folder, for example in a read-only installation for a user without
    a home directory.

    Args:
        fastmath: Assumptions about floating-point numbers that LLVM may make.
    """

    def decorate(function: Callable[..., None]) -> Any:
        # Division by zero gives infinity, as in torch, and not an error, for which each division would be checked.
        dispatcher: Any = njit(nogil=True, error_model="numpy", fastmath=set(fastmath))(function)
        try:
            # The attribute that Numba's enable_caching sets.
            dispatcher._cache = _Cache(function)  # noqa: SLF001
        except RuntimeError:
            _log_missing_cache()
        return dispatcher

    return decorate


@cache
def _log_missing_cache() -> None:
    logger.info(
        "Numba found no writable folder for compiled code, so each process compiles it again, which takes some "
        "seconds. Set NUMBA_CACHE_DIR to a writable folder."
    )


def _largest_of(row: Numbers, offset: Floats, slope: float, lanes: Floats) -> Any:
    """Maximum of offset + slope · row; ``lanes`` is scratch memory of LANES numbers."""
    lanes[:] = offset[0] + slope * np.float32(row[0])
    whole = len(row) - len(row) % LANES
    for begin in range(0, whole, LANES):
        for k in range(LANES):
            lanes[k] = max(lanes[k], offset[begin + k] + slope * np.float32(row[begin + k]))
    for j in range(whole, len(row)):
        lanes[0] = max(lanes[0], offset[j] + slope * np.float32(row[j]))
    return lanes.max()


# Its comparisons take the assumptions of the loop that it becomes a part of.
largest_of: Any = njit(fastmath=FINITE, inline="always")(_largest_of)


def run(function: Callable[..., None], arguments: Sequence[tuple[Any, ...]]) -> None:
    """Call a compiled function with each tuple of arguments, each in its own thread; the last one in this thread."""
    *others, last = arguments
    calls = [_threads().submit(function, *each) for each in others]
    function(*last)
    for call in calls:
        call.result()


def shares(count: int, together: int = 1) -> list[tuple[int, int]]:
    """First row of the share of each thread of torch, and the row after its last.

    Args:
        count: Number of rows.
        together: Rows that a loop processes together; only the last share may have a remainder.
    """
    threads = torch.get_num_threads()
    bounds = [count // together * thread // threads * together for thread in range(threads)]
    return list(pairwise([*bounds, count]))


def scale_dense_rows(matrix: Tensor, v: Tensor, row_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Scaling u = a / Kv and Kᵀu in one pass over a dense kernel, a few rows at a time while they are in the cache.

    Args:
        matrix: K, (N, P), float32, on the CPU.
        v: (P,), float32.
        row_weights: a, (N,), float32.

    Returns:
        u, (N,), and Kᵀu, (P,), both float32. Their rounding errors depend on the number of threads.
    """
    u = torch.empty_like(row_weights)
    parts = shares(matrix.shape[0], _TOGETHER)
    sums = v.new_zeros(len(parts), matrix.shape[1])
    arrays = (matrix.numpy(), v.numpy(), row_weights.numpy(), u.numpy())
    run(_scale_dense_rows, [(*rows, *arrays, part) for rows, part in zip(parts, sums.numpy(), strict=True)])
    return u, sums.sum(0)


def scale_columns(v: Tensor, sums: Tensor, b: Tensor) -> tuple[Tensor, list[float]]:
    """Scaling b / Kᵀu of the columns in one pass, instead of a dozen operations on short vectors.

    Args:
        v: Present scaling, (P,), float32, on the CPU.
        sums: Kᵀu, (P,), float32.
        b: Marginal of the columns, (P,), float32.

    Returns:
        The new scaling; the least sum, the marginal error, which is the L1 norm of v Kᵀu − b, and the least and the
        largest logarithm of the new scaling.
    """
    following, found = torch.empty_like(b), np.empty(4)
    _scale_columns(v.numpy(), sums.numpy(), b.numpy(), following.numpy(), found)
    return following, found.tolist()


def over_rows(function: Callable[..., None], count: int, *arguments: Tensor | float) -> None:
    """Call a compiled function on one range of rows per thread."""
    arrays = [each.numpy() if isinstance(each, Tensor) else each for each in arguments]
    run(function, [(*rows, *arrays) for rows in shares(count)])


def round_rows(block: Tensor, rounded: Tensor, middles: Tensor, steps: Tensor) -> None:
    """Round each entry of a matrix to one of 65,535 values between the minimum and the maximum of its row.

    Args:
        block: (N, P), float32, finite.
        rounded: Output r, (N, P), int16. An entry is its row's middle plus r of its row's steps, up to half a step.
        middles: Output, the middles (N,), float32.
        steps: Output, the steps (N,), float32.
    """
    over_rows(_round_rows, len(block), block, rounded, middles, steps)


@compiled(FAST)
def _scale_dense_rows(first: int, stop: int, entries: Numbers, v: Floats, a: Floats, u: Floats, sums: Floats) -> None:
    """Compute u = a / Kv and add Kᵀu, for the rows of K from first to stop."""
    tiny = np.float32(TINY)
    whole = stop - (stop - first) % _TOGETHER
    for i in range(first, whole, _TOGETHER):
        k0, k1, k2, k3 = entries[i], entries[i + 1], entries[i + 2], entries[i + 3]
        t0 = t1 = t2 = t3 = np.float32(0)
        for j in range(len(v)):
            t0 += k0[j] * v[j]
            t1 += k1[j] * v[j]
            t2 += k2[j] * v[j]
            t3 += k3[j] * v[j]
        u0, u1 = a[i] / max(t0, tiny), a[i + 1] / max(t1, tiny)
        u2, u3 = a[i + 2] / max(t2, tiny), a[i + 3] / max(t3, tiny)
        u[i], u[i + 1], u[i + 2], u[i + 3] = u0, u1, u2, u3
        for j in range(len(sums)):
            sums[j] += k0[j] * u0 + k1[j] * u1 + k2[j] * u2 + k3[j] * u3
    for i in range(whole, stop):
        row = entries[i]
        total = np.float32(0)
        for j in range(len(v)):
            total += row[j] * v[j]
        u[i] = a[i] / max(total, tiny)
        for j in range(len(sums)):
            sums[j] += row[j] * u[i]


@compiled(FAST)
def _scale_columns(v: Floats, sums: Floats, b: Floats, following: Floats, found: NDArray[np.float64]) -> None:
    """Write the scaling and what is found; see :func:`scale_columns`."""
    least, error = sums[0], 0.0
    smallest = largest = b[0] / sums[0]
    for j in range(len(b)):
        following[j] = b[j] / sums[j]
        error += abs(v[j] * sums[j] - b[j])
        least = min(least, sums[j])
        smallest = min(smallest, following[j])
        largest = max(largest, following[j])
    found[0], found[1], found[2], found[3] = least, error, np.log(smallest), np.log(largest)


@compiled(FINITE)
def _round_rows(first: int, stop: int, block: Floats, rounded: Integers, middles: Floats, steps: Floats) -> None:
    """Round the rows from first to stop."""
    least, largest = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    for i in range(first, stop):
        row, out = block[i], rounded[i]
        least[:] = row[0]
        largest[:] = row[0]
        whole = len(row) - len(row) % LANES
        for start in range(0, whole, LANES):
            for k in range(LANES):
                least[k] = min(least[k], row[start + k])
                largest[k] = max(largest[k], row[start + k])
        for j in range(whole, len(row)):
            least[0] = min(least[0], row[j])
            largest[0] = max(largest[0], row[j])
        low, width = least.min(), largest.max() - least.min()
        step = width / np.float32(2 * LEVELS)
        inverse = np.float32(2 * LEVELS) / width if width > 0 else np.float32(0)
        middle = low + width / np.float32(2)
        middles[i], steps[i] = middle, step
        for j in range(len(row)):
            out[j] = np.int16(np.rint((row[j] - middle) * inverse))
