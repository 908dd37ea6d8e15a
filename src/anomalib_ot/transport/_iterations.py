"""Stabilised Sinkhorn iterations, for kernels in any form."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from ._anderson import Anderson
from ._kernels import Scaled
from ._precision import TINY
from ._processes import Processes

K = TypeVar("K", bound=Scaled)

# Scalings beyond exp(±_ABSORB) are absorbed into the potentials.
_ABSORB = 40.0
# Logs of column scalings seldom differ by more. If they do, a sparse kernel is built again for twice as much.
ALLOWANCE = 2.0
# Plain iterations before the first accelerated one, which takes longer: many problems are solved by then.
_UNACCELERATED = 10


@dataclass(frozen=True)
class Iterates(Generic[K]):
    """Result of the iterations: the plan diag(u) K diag(v). The shapes may have leading batch dimensions.

    Attributes:
        kernel: K (N, P) = exp((f + g − M) / ε).
        row_potential: f, (N,).
        column_potential: g, (P,).
        row_scaling: u, (N,).
        column_scaling: v, (P,).
        column_sums: v Kᵀu, (P,), over all processes.
        iterations: Number of iterations.
        marginal_error: L1 distance between the column sums and b; the largest of a batch.
    """

    kernel: K
    row_potential: Tensor
    column_potential: Tensor
    row_scaling: Tensor
    column_scaling: Tensor
    column_sums: Tensor
    iterations: int
    marginal_error: float


def iterate(
    make_kernel: Callable[[Tensor, float], tuple[K, Tensor]],
    g: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    epsilon: float,
    max_iterations: int,
    tolerance: float | Tensor,
    anderson: int = 0,
    processes: Processes | None = None,
    first: tuple[K, Tensor] | None = None,
) -> Iterates[K]:
    """Alternate u = a / Kv and v = b / Kᵀu until the column marginals are met; g absorbs v when v grows large.

    Args:
        make_kernel: Returns K and f for a potential g of the columns and the largest difference of the logs of the
            column scalings for which K must be valid.
        g: First potential of the columns, (P,).
        v: First scaling of the columns, (P,).
        a: Marginal of the rows, (N,).
        b: Marginal of the columns, (P,).
        epsilon: Regularisation ε.
        max_iterations: Upper bound on the iterations.
        tolerance: Stop when the L1 error of the column marginals is at most this; one number, or one for each problem.
        anderson: Number of past steps of log v that accelerate the iterations after the first ones; 0 for plain
            iterations.
        processes: Processes that hold further rows.
        first: K and f for the first potential, if they are known.

    Returns:
        Kernel, potentials and scalings.
    """
    processes = processes or Processes()
    acceleration = Anderson(anderson) if anderson else None
    allowance = ALLOWANCE
    kernel, f = first or make_kernel(g, allowance)
    widest, missing = _limits(kernel, processes, g.device)
    smallest, largest = torch.stack(v.log().aminmax()).tolist()
    for iteration in range(1, max_iterations + 1):
        is_narrow = largest - smallest > widest
        if is_narrow or max(largest, -smallest) > _ABSORB:
            allowance *= 2 if is_narrow else 1
            g = g + epsilon * v.log()
            kernel, f = make_kernel(g, allowance)
            widest, missing = _limits(kernel, processes, g.device)
            v = torch.ones_like(v)
        u, sums = kernel.scale_rows(v, a)
        sums = processes.sum(sums)
        following, (least, error, excess, smallest, largest) = _scale_columns(v, sums, b, tolerance)
        is_changed = not least > TINY
        if is_changed:
            # The sum of an empty column is replaced by the bound of the omitted entries, which limits its scaling.
            most = (missing * processes.sum(u.sum(-1, keepdim=True))).clamp(min=TINY)
            following = b / torch.where(sums > TINY, sums, most)
        if acceleration and iteration > _UNACCELERATED:
            is_changed = True
            logs = v.log()
            # Rounding may differ between processes, whose scalings must not.
            following = processes.first((logs + acceleration.step(following.log() - logs)).exp())
        if is_changed:
            smallest, largest = torch.stack(following.log().aminmax()).tolist()
        if excess <= 0 or iteration == max_iterations:
            break
        v = following
    return Iterates(kernel, f, g, u, v, v * sums, iteration, error)


def _scale_columns(v: Tensor, sums: Tensor, b: Tensor, tolerance: float | Tensor) -> tuple[Tensor, list[float]]:
    """Scaling b / Kᵀu of the columns, and all that decisions depend on, read at once, as a read waits for the device.

    Args:
        v: Present scaling, (P,).
        sums: Kᵀu, (P,).
        b: Marginal of the columns, (P,).
        tolerance: See :func:`iterate`.

    Returns:
        The new scaling; the least sum, the marginal error, its excess over the tolerance, and the least and the largest
        logarithm of the new scaling, with the largest error and excess of a batch.
    """
    if sums.ndim == 1 and sums.device.type == "cpu" and sums.dtype == torch.float32:
        from ._compiled import scale_columns  # noqa: PLC0415 - imports Numba

        following, (least, error, *logs) = scale_columns(v, sums, b)
        return following, [least, error, error - float(tolerance), *logs]
    following = b / sums
    errors = (v * sums - b).abs().sum(-1)
    excess = (errors.double() - tolerance).amax()
    return following, torch.stack([sums.amin(), errors.amax(), excess, *following.log().aminmax()]).tolist()


def _limits(kernel: Scaled, processes: Processes, device: torch.device) -> tuple[float, float]:
    """``widest`` and ``left_out`` that hold for the kernels of all processes.

    Their storage may differ, for example if a process has no rows, but all must be built again at the same time.
    """
    return processes.least(kernel.widest, device), -processes.least(-kernel.left_out, device)
