"""Loops over a kernel's rows on a processor, compiled by Numba and shared by threads.

This module and :mod:`~anomalib_ot.transport._sparse` are imported when a problem is first solved, and Numba with them:
whoever only scores does without.
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

# Reductions may be reordered, so that they use vector instructions; NaN and infinity keep their meaning.
FAST = {"reassoc", "contract", "nsz"}
# For loops that look for the largest of finite numbers: with NaN in mind they would not use vector instructions.
FINITE = FAST | {"nnan"}
# A loop that looks for the largest keeps so many at a time, as one alone would have it wait for each comparison.
LANES = 64
# Rows that a loop takes together, so that the scalings and the sums of the columns are read once for all of them.
_TOGETHER = 4

# What compiled loops take. Numba reads no annotations: it compiles a loop for each type of entries that it meets.
Floats = NDArray[np.float32]
Integers = NDArray[np.integer[Any]]
Numbers = Floats | Integers


@cache
def _threads() -> ThreadPoolExecutor:
    """Threads for the loops, which let go of the interpreter's lock; Numba's own do not survive a fork."""
    return ThreadPoolExecutor(thread_name_prefix="sinkhorn")


if hasattr(os, "register_at_fork"):
    # A forked process has none of its parent's threads.
    os.register_at_fork(after_in_child=_threads.cache_clear)


class _Cache(FunctionCache):
    """Numba's code on disk, without which things go on where it cannot be read or written: on a full disk, say."""

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """The code for these types, None if there is none."""
        try:
            return super().load_overload(sig, target_context)  # type: ignore[no-untyped-call]
        except Exception:  # noqa: BLE001 - a damaged file fails anywhere in pickle
            # A damaged index would stop the next entry too.
            with suppress(OSError):
                self.flush()
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep the code for these types."""
        with suppress(OSError):
            super().save_overload(sig, data)  # type: ignore[no-untyped-call]


def compiled(fastmath: Collection[str] = ()) -> Callable[[Callable[..., None]], Any]:
    """Decorator that compiles a loop on its first call, and keeps the code on disk where there is a place for it.

    Numba's own ``cache=True`` raises where there is none: on an installation that may not be written to, by a user
    without a home.

    Args:
        fastmath: What LLVM may assume of floating-point numbers.
    """

    def decorate(function: Callable[..., None]) -> Any:
        dispatcher: Any = njit(nogil=True, fastmath=set(fastmath))(function)
        try:
            # What Numba's enable_caching sets.
            dispatcher._cache = _Cache(function)  # noqa: SLF001
        except RuntimeError:
            _tell_there_is_no_place()
        return dispatcher

    return decorate


@cache
def _tell_there_is_no_place() -> None:
    logger.info(
        "Numba finds no place to keep compiled code in: each process compiles it anew, which takes some seconds. Set "
        "NUMBA_CACHE_DIR to a folder that may be written to."
    )


def run(function: Callable[..., None], arguments: Sequence[tuple[Any, ...]]) -> None:
    """Call a compiled function in one thread for each tuple of arguments."""
    if len(arguments) == 1:
        function(*arguments[0])
        return
    for call in [_threads().submit(function, *each) for each in arguments]:
        call.result()


def scale_dense_rows(matrix: Tensor, v: Tensor, row_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Scaling u = a / Kv and Kᵀu in one pass over a dense kernel, while a few of its rows are near.

    Args:
        matrix: K, (N, P), float32, on the processor.
        v: (P,), float32.
        row_weights: a, (N,), float32.

    Returns:
        u, (N,), and Kᵀu, (P,), both float32. They depend on the number of threads by rounding.
    """
    u = torch.empty_like(row_weights)
    bounds = np.linspace(0, len(matrix) // _TOGETHER, torch.get_num_threads() + 1).astype(int) * _TOGETHER
    bounds[-1] = len(matrix)
    sums = v.new_zeros(len(bounds) - 1, len(v))
    arrays = (matrix.numpy(), v.numpy(), row_weights.numpy(), u.numpy())
    run(_scale_dense_rows, [(*rows, *arrays, part) for rows, part in zip(pairwise(bounds), sums.numpy(), strict=True)])
    return u, sums.sum(0)


def over_rows(function: Callable[..., None], count: int, *arguments: Tensor | float) -> None:
    """Call a compiled function on a range of rows in each thread."""
    bounds = np.linspace(0, count, torch.get_num_threads() + 1).astype(int)
    arrays = [each.numpy() if isinstance(each, Tensor) else each for each in arguments]
    run(function, [(start, stop, *arrays) for start, stop in pairwise(bounds)])


def round_rows(block: Tensor, rounded: Tensor, middles: Tensor, steps: Tensor) -> None:
    """Round the entries of a matrix to one of 65,535 values between the least and the largest of their row.

    Args:
        block: (N, P), float32, finite.
        rounded: Where to put r, (N, P), int16: an entry is its row's middle plus r of its steps, up to half a step.
        middles: Where to put the middles (N,), float32.
        steps: Where to put the steps (N,), float32.
    """
    over_rows(_round_rows, len(block), block, rounded, middles, steps)


@compiled(FAST)
def _scale_dense_rows(first: int, stop: int, entries: Numbers, v: Floats, a: Floats, u: Floats, sums: Floats) -> None:
    """The scaling u = a / Kv, and add Kᵀu, of the rows of K from first to stop."""
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
