"""Entropic optimal transport (Cuturi, 2013), stabilised and screened as in Schmitzer (2019, arXiv 1610.06519)."""

import math
import warnings
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ._arguments import (
    default_tolerance,
    marginal,
    require_finite_potential,
    require_floats,
    require_limits,
    require_same_mass,
    require_without_gradients,
    start,
)
from ._exponents import Exponents
from ._iterations import ALLOWANCE, iterate
from ._kernels import DenseKernel, Kernel, make_kernel
from ._processes import Processes
from ._workspace import Workspace
from .costs import Cost, DenseCost, spread_of

Method = Literal["stabilized", "reference"]

# Share of a marginal that a sparse kernel may omit if the tolerance is 0.
_LEFT_OUT = 1e-4
# Spread of M / ε up to which the iterations start on the plain kernel exp(−M / ε): all its entries matter.
_PLAIN = 12.0


class NotConvergedWarning(UserWarning):
    """The iterations ended before the marginal error reached the tolerance."""


@dataclass(frozen=True)
class TransportPlan:
    """An entropic transport plan T = diag(u) K diag(v), stored as its factors.

    It is valid until its workspace is used again. If several processes solve the problem, each has its own rows. All of
    them must call the methods that return a result for the columns or for the whole plan.

    Attributes:
        kernel: K (N, P) = exp((f + g − M) / ε).
        row_potential: f, (N,).
        column_potential: g, (P,).
        row_scaling: u, (N,).
        column_scaling: v, (P,).
        row_weights: a, (N,), the marginal of the rows.
        column_weights: b, (P,), the marginal of the columns.
        column_sums: v Kᵀu, (P,), of the plan over all processes.
        epsilon: Regularisation ε.
        iterations: Number of Sinkhorn iterations.
        marginal_error: L1 distance between the column sums of the plan and b; the rows have none.
        processes: Processes that hold further rows.
    """

    kernel: Kernel
    row_potential: Tensor
    column_potential: Tensor
    row_scaling: Tensor
    column_scaling: Tensor
    row_weights: Tensor
    column_weights: Tensor
    column_sums: Tensor
    epsilon: float
    iterations: int
    marginal_error: float
    processes: Processes

    @property
    def potential(self) -> Tensor:
        """Dual potential g + ε log v of the columns (P,), the warm start of a similar problem."""
        return self.column_potential + self.epsilon * self.column_scaling.log()

    def dense(self) -> Tensor:
        """The plan T as one matrix (N, P), whose entries sum to one."""
        return torch.cat(
            [block * self.column_scaling * self.row_scaling[rows, None] for rows, block in self.kernel.blocks()]
        )

    def barycentres(self, points: Tensor) -> Tensor:
        """Barycentric projection diag(1 / b) Tᵀ points: the mean of the points sent to each column (PRADOT, eq. 5).

        Args:
            points: (N, D).

        Returns:
            (P, D), in the precision of the plan.

        Raises:
            TypeError: If the points are not a tensor.
            ValueError: If the number of points and of rows differ.
        """
        require_floats(points=points)
        if points.ndim != 2 or len(points) != len(self.row_scaling):  # noqa: PLR2004 - a matrix has two dimensions
            msg = f"points must be of shape ({len(self.row_scaling)}, D), not {tuple(points.shape)}"
            raise ValueError(msg)
        points = points.to(self.row_scaling.dtype)
        total = self.processes.sum(self.kernel.project(self.row_scaling, points))
        return total.mul_((self.column_scaling / self.column_weights)[:, None])

    def transport_cost(self) -> float:
        """⟨T, M⟩, without the entropy, from M = f + g − ε log K, with an error of about ε times the rounding error."""
        rows = float(self.row_weights.double() @ self.row_potential.double())
        columns = float(self.column_sums.double() @ self.column_potential.double())
        entropy = self.kernel.entropy(self.row_scaling, self.column_scaling)
        return columns + self.processes.total(rows - self.epsilon * entropy, self.row_weights.device)


def sinkhorn(
    cost: Tensor | Cost,
    epsilon: float = 0.01,
    max_iterations: int = 1000,
    tolerance: float | None = None,
    potential: Tensor | None = None,
    *,
    row_weights: Tensor | None = None,
    column_weights: Tensor | None = None,
    anderson: int = 0,
    workspace: Workspace | None = None,
    processes: Processes | None = None,
    warn: bool = True,
    method: Method = "stabilized",
) -> TransportPlan:
    """Solve min_T ⟨T, M⟩ − ε H(T) over plans with given marginals (PRADOT, eq. 4).

    Alternates v = b / Kᵀu and u = a / Kv, in this order, on the kernel K = exp((f + g − M) / ε). Without a warm start,
    g starts at the result of the first update, from u = 1 on the plain kernel exp(−M / ε); where M varies by a few ε
    only, v starts there and g at zero. f is the c-transform of g, so that the largest entry of each row of K is one. g
    absorbs v when v grows large, so that a small ε does not overflow. The cost is computed a block of rows at a time.
    :func:`make_kernel` chooses the cheapest storage for the kernel.

    Args:
        cost: M, (N, P), finite. It is not changed. Half precision is solved in single precision.
        epsilon: Regularisation ε > 0, in the unit of the cost. The relative error of the plan's entries is about
            ``max |M| / ε`` times the rounding error of that precision.
        max_iterations: Upper bound on the iterations, at least 1.
        tolerance: Stop when the L1 error of the column marginals is at most this; 0 runs all iterations. None is Σb
            times 10⁻⁹ in double precision, as ``stopThr`` of POT, and times 10⁻⁵ in single precision, but at least
            twice the difference of Σa and Σb, which rounded weights may have.
        potential: Start from this dual potential (P,) of the columns of an earlier, similar problem, finite.
        row_weights: a, (N,), positive; uniform with sum one by default.
        column_weights: b, (P,), positive, with the same sum as a; uniform by default.
        anderson: Number of past steps that accelerate the iterations after the tenth by Anderson's method; 0 for
            Sinkhorn's iterations. 5 needs fewer iterations for a small ε and the same plan. ``reference`` does not
            accelerate.
        workspace: Memory for the solver, 2 GiB by default.
        processes: Processes that hold further rows of the same problem and also call this function; some may have no
            rows.
        warn: Whether to warn if a positive tolerance was not reached.
        method: ``stabilized`` is this solver. ``reference`` is ``ot.bregman.sinkhorn_log`` of POT, which does the same
            updates in the log domain, on the dense matrix in double precision. It is slow and needs about 24 bytes per
            entry of M; use it to check a plan against independent code. It tests the tolerance in every tenth
            iteration, does not use ``workspace``, and solves in one process.

    Returns:
        The plan. Its row marginals are exact, and its column marginals have an error of ``marginal_error``.

    Raises:
        TypeError: If an argument must be a tensor and is not.
        ValueError: If an argument is out of its range, is on another device than the cost or requires gradients, or if
            the cost has NaN or infinite entries.

    Warns:
        NotConvergedWarning: If a positive tolerance was not reached, unless ``warn`` is off.

    Example:
        >>> plan = sinkhorn(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), epsilon=0.1)
        >>> plan.dense().round(decimals=3).tolist()
        [[0.5, 0.0], [0.0, 0.5]]

        Compare a plan with that of POT:

        >>> cost = torch.rand(40, 20, generator=torch.Generator().manual_seed(0))
        >>> ours, reference = sinkhorn(cost, 0.05), sinkhorn(cost, 0.05, method="reference")
        >>> torch.allclose(ours.dense().double(), reference.dense(), atol=1e-6)
        True
    """
    if method not in get_args(Method):
        msg = f"method must be one of {', '.join(get_args(Method))}, not {method!r}"
        raise ValueError(msg)
    if not hasattr(cost, "exponents"):
        require_floats(cost=cost)
    given = {"potential": potential, "row_weights": row_weights, "column_weights": column_weights}
    require_without_gradients(cost=cost, **given)
    if isinstance(cost, Tensor):
        cost = DenseCost(cost)
    processes = processes or Processes()
    if method == "reference" and processes.group is not None:
        msg = "method 'reference' solves in one process; gather all rows in it"
        raise ValueError(msg)
    require_limits(epsilon, max_iterations, tolerance, anderson)
    if method == "reference" and anderson:
        msg = f"method 'reference' does not accelerate its iterations; leave anderson at 0, not {anderson}"
        raise ValueError(msg)
    sample = cost[:1]
    if potential is not None:
        potential = start(potential, cost.shape[1:], sample)
    rows = processes.total(cost.shape[0], sample.device)
    a = marginal("row_weights", row_weights, cost.shape[:1], 1 / rows, sample)
    b = marginal("column_weights", column_weights, cost.shape[1:], 1 / cost.shape[1], sample)
    masses = require_same_mass(a, b, processes)
    tolerance = float(default_tolerance(sample.dtype, masses)) if tolerance is None else tolerance
    if method == "reference":
        plan = _solve_by_pot(cost, a, b, epsilon, max_iterations, tolerance, potential)
    else:
        # The sum of uniform weights is one but for rounding.
        share = tolerance if column_weights is None else tolerance / float(masses[1])
        workspace = workspace or Workspace()
        plan = _solve(cost, a, b, epsilon, max_iterations, tolerance, share, potential, anderson, workspace, processes)
    if warn:
        warn_if_not_converged(plan.iterations, plan.marginal_error, tolerance)
    return plan


def warn_if_not_converged(iterations: int, error: float, tolerance: float) -> None:
    """Warn the caller's caller if a solver has not reached a positive tolerance.

    Warns:
        NotConvergedWarning: If the marginal error is above the tolerance.
    """
    if error > tolerance > 0:
        warnings.warn(
            f"transport stopped after {iterations} iterations with a marginal error of {error:.2g}, above the "
            f"tolerance of {tolerance:g}; allow more iterations, or a larger epsilon or tolerance",
            NotConvergedWarning,
            stacklevel=3,
        )


@torch.no_grad()
def _solve(
    cost: Cost,
    a: Tensor,
    b: Tensor,
    epsilon: float,
    max_iterations: int,
    tolerance: float,
    share: float,
    potential: Tensor | None,
    anderson: int,
    workspace: Workspace,
    processes: Processes,
) -> TransportPlan:
    """The plan by the stabilised iterations; see :func:`sinkhorn`. The share of Σb is that of the tolerance."""
    # A sparse kernel may omit a hundredth of a large tolerance, and as much as a tolerance below _LEFT_OUT. It omits
    # less, because this bound takes all entries for omitted and for as large as the threshold.
    left_out = min(max(_LEFT_OUT, share / 100), share or _LEFT_OUT)

    def make(g: Tensor, allowance: float) -> tuple[Kernel, Tensor]:
        kernel, f = make_kernel(cost, g, epsilon, workspace, left_out, allowance)
        require_finite_potential(f, epsilon)
        return kernel, f

    first = None
    if potential is not None:
        g, v = potential, torch.ones_like(b)
    elif -processes.least(-spread_of(cost), b.device) <= _PLAIN * epsilon:
        g = torch.zeros_like(b)
        first = kernel, f = make(g, ALLOWANCE)
        u = _plain_scaling(f, epsilon, processes)
        v = b / processes.sum(kernel.project(u, f.new_ones(len(f), 1)))[:, 0]
        v /= v.mean()
    else:
        g, v = _column_potential(cost, epsilon, processes), b / b.mean()
    found = iterate(
        make,
        g,
        v,
        a,
        b,
        epsilon=epsilon,
        max_iterations=max_iterations,
        tolerance=tolerance,
        anderson=anderson,
        processes=processes,
        first=first,
    )
    return TransportPlan(
        found.kernel,
        found.row_potential,
        found.column_potential,
        found.row_scaling,
        found.column_scaling,
        a,
        b,
        found.column_sums,
        epsilon,
        found.iterations,
        found.marginal_error,
        processes,
    )


@torch.no_grad()
def _solve_by_pot(
    cost: Cost,
    a: Tensor,
    b: Tensor,
    epsilon: float,
    max_iterations: int,
    tolerance: float,
    potential: Tensor | None,
) -> TransportPlan:
    """The plan by POT's solver in the log domain; see :func:`sinkhorn`."""
    from ot.bregman import sinkhorn_log  # noqa: PLC0415 - takes seconds, and only checks use it

    matrix, a, b = cost[:].double(), a.double(), b.double()
    start = None
    if potential is not None:
        # POT needs the scaling of the rows too, which follows from that of the columns.
        scaling = potential.double() / epsilon
        start = (a.log() - (scaling - matrix / epsilon).logsumexp(1), scaling)
    # POT uses the L2 error; the L1 error is at most √P times as large.
    threshold = tolerance / math.sqrt(len(b))
    matrix, log = sinkhorn_log(a, b, matrix, epsilon, max_iterations, threshold, log=True, warn=False, warmstart=start)
    f, g = epsilon * log["log_u"], epsilon * log["log_v"]
    require_finite_potential(f, epsilon)
    kernel = DenseKernel(matrix, [slice(0, len(matrix))])
    sums = matrix.sum(0)
    error = float((sums - b).abs().sum())
    ones = torch.ones_like(a), torch.ones_like(b)
    return TransportPlan(kernel, f, g, *ones, a, b, sums, epsilon, log["niter"] + 1, error, Processes())


def _column_potential(cost: Cost, epsilon: float, processes: Processes) -> Tensor:
    """Potential (P,) of the columns after the first update, g_j = −ε log Σ_i exp(−M_ij / ε) plus a constant."""
    # Subtracting a cost c, as in exp((c − M) / ε), keeps the digits that a term common to all costs would take.
    some = cost[:1]
    common = _least(some.flatten(), processes)
    exponents = cost.exponents(common.expand(cost.shape[1]), epsilon)
    largest, sums = _sum_exponentials(exponents, cost, some)
    top = -processes.min(-largest)
    logs = processes.sum(sums * (largest - top).exp()).log() + top
    return epsilon * (logs.min() - logs)


def _plain_scaling(f: Tensor, epsilon: float, processes: Processes) -> Tensor:
    """Scaling u (N,) that makes diag(u) K a multiple of the plain kernel for g = 0, with the largest u = 1."""
    return ((_least(f, processes) - f) / epsilon).exp()


def _least(entries: Tensor, processes: Processes) -> Tensor:
    """Smallest of the entries (n,) of all processes, some of which may have none."""
    return processes.min(torch.cat([entries, entries.new_tensor([math.inf])]).min())


def _sum_exponentials(exponents: Exponents, cost: Cost, like: Tensor) -> tuple[Tensor, Tensor]:
    """Largest exponent of each column (P,), and the sum of exp(exponent − largest)."""
    if like.numel() and like.device.type == "cpu" and like.dtype == torch.float32 and exponents.are_finite:
        from ._exponentials import sum_exponentials  # noqa: PLC0415 - imports Numba, which scoring does not need

        return sum_exponentials(exponents, list(cost.blocks()), cost.shape[1])
    largest, sums = like.new_full(cost.shape[1:], -math.inf), like.new_zeros(cost.shape[1])
    for rows in cost.blocks():
        block = exponents(rows)
        before, largest = largest, torch.maximum(largest, block.amax(0))
        sums = sums * (before - largest).exp() + block.sub_(largest).exp_().sum(0)
    return largest, sums
