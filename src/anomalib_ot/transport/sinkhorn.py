"""Entropic optimal transport with uniform marginals (Cuturi, 2013), stabilised as by Schmitzer (2019)."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from .costs import FusedCost, row_blocks

# Scalings beyond exp(±_ABSORB) move into the potentials; below _TINY a float32 sum counts as underflowed.
_ABSORB = 40.0
_TINY = 1e-30
# Kernel entries below exp(_NEGLIGIBLE) cannot be told from zero next to a row's largest, which is one.
_NEGLIGIBLE = -60.0


@dataclass(frozen=True)
class TransportPlan:
    """An entropic transport plan T = diag(u) K diag(v), kept as its factors.

    Attributes:
        cost: (N, P), the cost matrix M.
        kernel: (N, P), K = exp((f + g − M) / ε) for the stabilising potentials f and g.
        row_scaling: (N,), u.
        column_scaling: (P,), v.
        potential: (P,), the dual potential of the columns, g + ε log v: the warm start of a similar problem.
        iterations: Sinkhorn iterations done.
        marginal_error: L1 distance between the plan's column sums and the uniform marginal; the rows' is zero.
    """

    cost: Tensor | FusedCost
    kernel: Tensor
    row_scaling: Tensor
    column_scaling: Tensor
    potential: Tensor
    iterations: int
    marginal_error: float

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Row slices and the rows of the plan T at them, a block at a time."""
        for rows in row_blocks(self.kernel.shape):
            yield rows, (self.kernel[rows] * self.column_scaling).mul_(self.row_scaling[rows, None])

    def dense(self) -> Tensor:
        """The plan T as one matrix (N, P), with entries that sum to one."""
        return torch.cat([block for _, block in self.blocks()])

    def barycentres(self, points: Tensor) -> Tensor:
        """Barycentric projection P · Tᵀ points, the mean of the points sent to each column (PRADOT, eq. 5).

        Args:
            points: (N, D).

        Returns:
            (P, D).
        """
        total = points.new_zeros(self.kernel.shape[1], points.shape[1])
        for rows in row_blocks(self.kernel.shape):
            total.addmm_(self.kernel[rows].T, points[rows] * self.row_scaling[rows, None])
        return total.mul_(self.column_scaling[:, None] * total.shape[0])

    def transport_cost(self) -> float:
        """⟨T, M⟩, without the entropy."""
        products = ((rows, self.kernel[rows] * self.cost[rows]) for rows in row_blocks(self.kernel.shape))
        return sum(float(self.row_scaling[rows] @ (block @ self.column_scaling)) for rows, block in products)


def sinkhorn(
    cost: Tensor | FusedCost,
    epsilon: float = 0.01,
    max_iterations: int = 100,
    tolerance: float = 0.0,
    potential: Tensor | None = None,
    out: Tensor | None = None,
) -> TransportPlan:
    """Solve min_T ⟨T, M⟩ − ε H(T) over plans with uniform marginals 1/N and 1/P (PRADOT, eq. 4).

    Alternates v = (1/P) / Kᵀu and u = (1/N) / Kv, in this order, on the kernel K = exp((f + g − M) / ε). The potentials
    f and g start at c-transforms of the cost, so that each row of K holds a one (each column too without a warm start),
    and absorb u and v whenever these grow large: a small ε does not overflow. The cost is computed a block of rows at a
    time and only the kernel is held; the two products of an iteration share one pass over it.

    Args:
        cost: M, (N, P), finite. Left as it is.
        epsilon: Regularisation ε > 0, in the unit of the cost.
        max_iterations: Upper bound on the iterations, at least 1.
        tolerance: Stop once the L1 error of the column marginals is at most this; 0 runs all iterations.
        potential: Dual potential (P,) of the columns from an earlier, similar problem, to start from.
        out: Kernel of an earlier plan that is no longer needed, to be overwritten where it is large enough.

    Returns:
        The plan, whose row marginals are exact and whose column marginals are off by ``marginal_error``.

    Raises:
        ValueError: If an argument is out of its range or the cost has NaN or infinite entries.

    Example:
        >>> plan = sinkhorn(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), epsilon=0.1)
        >>> plan.dense().round(decimals=3).tolist()
        [[0.5, 0.0], [0.0, 0.5]]
    """
    _check(cost, epsilon, max_iterations, potential)
    n_rows, n_columns = cost.shape
    sample = cost[:1]
    if out is None or out.numel() < n_rows * n_columns or out.dtype != sample.dtype or out.device != sample.device:
        out = sample.new_empty(cost.shape)
    kernel = out.flatten()[: n_rows * n_columns].view(cost.shape)
    g = _column_transform(cost) if potential is None else potential.to(sample).clone()
    f = _stabilise(cost, g, epsilon, kernel)
    if not math.isfinite(float(f.sum())):
        msg = "the cost has NaN or infinite entries"
        raise ValueError(msg)
    if potential is None:
        # The first update starts from u = 1 on the plain kernel exp(−M / ε); any common factor cancels.
        v = 1 / n_columns / (kernel.T @ torch.exp((f.min() - f) / epsilon)).clamp_(min=_TINY)
    else:
        v = torch.ones_like(g)
    for iteration in range(1, max_iterations + 1):
        u, column_sums = _update_rows(kernel, v)
        error = float((v * column_sums - 1 / n_columns).abs().sum())
        if error <= tolerance or iteration == max_iterations:
            break
        v = 1 / n_columns / column_sums.clamp_(min=_TINY)
        if float(v.log().abs().max()) > _ABSORB:
            g += epsilon * v.log()
            f = _stabilise(cost, g, epsilon, kernel)
            v = torch.ones_like(v)
    return TransportPlan(cost, kernel, u, v, g + epsilon * v.log(), iteration, error)


def _check(cost: Tensor | FusedCost, epsilon: float, max_iterations: int, potential: Tensor | None) -> None:
    if len(cost.shape) != 2 or 0 in cost.shape:  # noqa: PLR2004 - a matrix has two dimensions
        msg = f"the cost must be a non-empty matrix, not of shape {tuple(cost.shape)}"
        raise ValueError(msg)
    if not (epsilon > 0 and math.isfinite(epsilon)):
        msg = f"epsilon must be positive and finite, not {epsilon}"
        raise ValueError(msg)
    if max_iterations < 1:
        msg = f"max_iterations must be at least 1, not {max_iterations}"
        raise ValueError(msg)
    if potential is not None and potential.shape != cost.shape[1:]:
        msg = f"the potential has shape {tuple(potential.shape)}, the cost has {cost.shape[1]} columns"
        raise ValueError(msg)


def _column_transform(cost: Tensor | FusedCost) -> Tensor:
    """Potential (P,) of the columns, g = min_i (M_ij − min_k M_ik)."""
    transforms = []
    for rows in row_blocks(cost.shape):
        block = cost[rows]
        transforms.append((block - block.amin(1, keepdim=True)).amin(0))
    return torch.stack(transforms).amin(0)


def _stabilise(cost: Tensor | FusedCost, g: Tensor, epsilon: float, kernel: Tensor) -> Tensor:
    """Write exp((f + g − M) / ε) into ``kernel`` and return f = min_j (M_ij − g_j), (N,)."""
    exponents = cost.exponents(g, epsilon) if isinstance(cost, FusedCost) else lambda rows: (g - cost[rows]) / epsilon
    f = kernel.new_empty(kernel.shape[0])
    for rows in row_blocks(kernel.shape):
        block = exponents(rows)
        highest = block.amax(1, keepdim=True)
        f[rows] = highest[:, 0].mul(-epsilon)
        F.threshold(block.sub_(highest), _NEGLIGIBLE, -math.inf, inplace=True)
        torch.exp(block, out=kernel[rows])
    return f


def _update_rows(kernel: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """New row scaling u = (1/N) / Kv, and Kᵀu, in one pass over the kernel."""
    n_rows = kernel.shape[0]
    u = kernel.new_empty(n_rows)
    column_sums = torch.zeros_like(v)
    for rows in row_blocks(kernel.shape):
        block = kernel[rows]
        torch.reciprocal((block @ v).clamp_(min=_TINY).mul_(n_rows), out=u[rows])
        column_sums.addmv_(block.T, u[rows])
    return u, column_sums
