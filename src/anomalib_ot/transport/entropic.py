"""Entropic optimal transport (Cuturi, 2013), stabilised and screened as in Schmitzer (2019, arXiv 1610.06519)."""

import math
import warnings
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ._arguments import require_floats, require_tensors
from ._kernels import DenseKernel, Kernel, make_kernel
from ._precision import TINY
from ._processes import Processes
from ._workspace import Workspace
from .costs import Cost, DenseCost

Method = Literal["stabilized", "reference"]

# Scalings beyond exp(±_ABSORB) are absorbed into the potentials.
_ABSORB = 40.0
# Largest relative difference of the sums of both marginals.
_SAME_MASS = 1e-4
# Share of a marginal that a sparse kernel may omit if the tolerance is 0.
_LEFT_OUT = 1e-4
# Logs of column scalings seldom differ by more. If they do, a sparse kernel is built again for twice as much.
_ALLOWANCE = 2.0


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


@torch.no_grad()
def sinkhorn(
    cost: Tensor | Cost,
    epsilon: float = 0.01,
    max_iterations: int = 100,
    tolerance: float = 0.0,
    potential: Tensor | None = None,
    *,
    row_weights: Tensor | None = None,
    column_weights: Tensor | None = None,
    workspace: Workspace | None = None,
    processes: Processes | None = None,
    warn: bool = True,
    method: Method = "stabilized",
) -> TransportPlan:
    """Solve min_T ⟨T, M⟩ − ε H(T) over plans with given marginals (PRADOT, eq. 4).

    Alternates v = b / Kᵀu and u = a / Kv, in this order, on the kernel K = exp((f + g − M) / ε). Without a warm start,
    g starts at the result of the first update, from u = 1 on the plain kernel exp(−M / ε). f is the c-transform of g,
    so that the largest entry of each row of K is one. g absorbs v when v grows large, so that a small ε does not
    overflow. The cost is computed a block of rows at a time. :func:`make_kernel` chooses the cheapest storage for the
    kernel.

    Args:
        cost: M, (N, P), finite, in single or double precision. It is not changed.
        epsilon: Regularisation ε > 0, in the unit of the cost. The relative error of the plan's entries is about
            ``max |M| / ε`` times the rounding error of that precision.
        max_iterations: Upper bound on the iterations, at least 1.
        tolerance: Stop when the L1 error of the column marginals is at most this; 0 runs all iterations.
        potential: Start from this dual potential (P,) of the columns of an earlier, similar problem, finite.
        row_weights: a, (N,), positive; uniform with sum one by default.
        column_weights: b, (P,), positive, with the same sum as a; uniform by default.
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
        ValueError: If an argument is out of its range or the cost has NaN or infinite entries.

    Warns:
        NotConvergedWarning: If a positive tolerance was not reached, unless ``warn`` is off.

    Example:
        >>> plan = sinkhorn(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), epsilon=0.1)
        >>> plan.dense().round(decimals=3).tolist()
        [[0.5, 0.0], [0.0, 0.5]]

        Compare a plan with that of POT:

        >>> cost = torch.rand(40, 20)
        >>> ours, reference = sinkhorn(cost, 0.05), sinkhorn(cost, 0.05, method="reference")
        >>> torch.allclose(ours.dense().double(), reference.dense(), atol=1e-6)
        True
    """
    if method not in get_args(Method):
        msg = f"method must be one of {', '.join(get_args(Method))}, not {method!r}"
        raise ValueError(msg)
    if not hasattr(cost, "exponents"):
        require_floats(cost=cost)
    if isinstance(cost, Tensor):
        cost = DenseCost(cost)
    given = {"potential": potential, "row_weights": row_weights, "column_weights": column_weights}
    require_tensors(**{name: value for name, value in given.items() if value is not None})
    processes = processes or Processes()
    if method == "reference" and processes.group is not None:
        msg = "method 'reference' solves in one process; gather all rows in it"
        raise ValueError(msg)
    sample = cost[:1]
    _check(sample, epsilon, max_iterations, tolerance, potential)
    a, b = _marginals(row_weights, column_weights, cost.shape, sample, processes)
    if method == "reference":
        plan = _solve_by_pot(cost, a, b, epsilon, max_iterations, tolerance, potential)
    else:
        workspace = workspace or Workspace()
        plan = _solve(cost, a, b, epsilon, max_iterations, tolerance, potential, workspace, processes)
    if warn and plan.marginal_error > tolerance > 0:
        warnings.warn(
            f"transport stopped after {plan.iterations} iterations with a marginal error of {plan.marginal_error:.2g}, "
            f"above the tolerance of {tolerance:g}; allow more iterations, or a larger epsilon or tolerance",
            NotConvergedWarning,
            stacklevel=2,
        )
    return plan


def _solve(
    cost: Cost,
    a: Tensor,
    b: Tensor,
    epsilon: float,
    max_iterations: int,
    tolerance: float,
    potential: Tensor | None,
    workspace: Workspace,
    processes: Processes,
) -> TransportPlan:
    """The plan by the stabilised iterations; see :func:`sinkhorn`."""
    if potential is None:
        g, v = _column_potential(cost, epsilon, processes), b / b.mean()
    else:
        g, v = potential.to(b), torch.ones_like(b)
    # The entries that a sparse kernel omits must be negligible compared with the tolerance.
    left_out = max(_LEFT_OUT, tolerance / 100)
    allowance = _ALLOWANCE
    kernel, f = make_kernel(cost, g, epsilon, workspace, left_out, allowance)
    _check_finite(f, epsilon)
    widest, missing = _limits(kernel, processes, g.device)
    smallest, largest = torch.stack(v.log().aminmax()).tolist()
    for iteration in range(1, max_iterations + 1):
        is_narrow = largest - smallest > widest
        if is_narrow or max(largest, -smallest) > _ABSORB:
            allowance *= 2 if is_narrow else 1
            g = g + epsilon * v.log()
            kernel, f = make_kernel(cost, g, epsilon, workspace, left_out, allowance)
            widest, missing = _limits(kernel, processes, g.device)
            v = torch.ones_like(v)
        u, sums = kernel.scale_rows(v, a)
        sums = processes.sum(sums)
        # The sum of an empty column is replaced by the bound of the omitted entries, which limits its scaling.
        most = (missing * processes.sum(u.sum())).clamp(min=TINY)
        following = b / torch.where(sums > TINY, sums, most)
        # All values that decisions depend on are read at once, because each read waits for the device.
        errors = (v * sums - b).abs().sum()
        error, smallest, largest = torch.stack([errors, *following.log().aminmax()]).tolist()
        if error <= tolerance or iteration == max_iterations:
            break
        v = following
    return TransportPlan(kernel, f, g, u, v, a, b, v * sums, epsilon, iteration, error, processes)


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
        scaling = potential.to(b) / epsilon
        start = (a.log() - (scaling - matrix / epsilon).logsumexp(1), scaling)
    # POT uses the L2 error; the L1 error is at most √P times as large.
    threshold = tolerance / math.sqrt(len(b))
    matrix, log = sinkhorn_log(a, b, matrix, epsilon, max_iterations, threshold, log=True, warn=False, warmstart=start)
    f, g = epsilon * log["log_u"], epsilon * log["log_v"]
    _check_finite(f, epsilon)
    kernel = DenseKernel(matrix, [slice(0, len(matrix))])
    sums = matrix.sum(0)
    error = float((sums - b).abs().sum())
    ones = torch.ones_like(a), torch.ones_like(b)
    return TransportPlan(kernel, f, g, *ones, a, b, sums, epsilon, log["niter"] + 1, error, Processes())


def _limits(kernel: Kernel, processes: Processes, device: torch.device) -> tuple[float, float]:
    """``widest`` and ``left_out`` that hold for the kernels of all processes.

    Their storage may differ, for example if a process has no rows, but all must be built again at the same time.
    """
    return processes.least(kernel.widest, device), -processes.least(-kernel.left_out, device)


def _check_finite(row_potential: Tensor, epsilon: float) -> None:
    if not row_potential.isfinite().all():
        msg = f"the cost divided by epsilon {epsilon} has NaN or infinite entries"
        raise ValueError(msg)


def _check(sample: Tensor, epsilon: float, max_iterations: int, tolerance: float, potential: Tensor | None) -> None:
    if sample.dtype not in (torch.float32, torch.float64):
        msg = f"the cost must be a tensor of float32 or float64, not of {sample.dtype}; call .float() on it"
        raise ValueError(msg)
    if not (epsilon > 0 and math.isfinite(epsilon)):
        msg = f"epsilon must be positive and finite, not {epsilon}"
        raise ValueError(msg)
    if max_iterations < 1:
        msg = f"max_iterations must be at least 1, not {max_iterations}"
        raise ValueError(msg)
    if not tolerance >= 0:
        msg = f"tolerance must be at least 0, not {tolerance}"
        raise ValueError(msg)
    if potential is not None and potential.shape != sample.shape[1:]:
        msg = f"the potential has shape {tuple(potential.shape)}, the cost has {sample.shape[1]} columns"
        raise ValueError(msg)
    if potential is not None and not potential.isfinite().all():
        msg = "the potential has NaN or infinite entries"
        raise ValueError(msg)


def _marginals(
    row_weights: Tensor | None, column_weights: Tensor | None, shape: torch.Size, like: Tensor, processes: Processes
) -> tuple[Tensor, Tensor]:
    """The marginals a (N,) and b (P,), uniform by default."""
    rows = processes.total(shape[0], like.device)
    a = like.new_full((shape[0],), 1 / rows) if row_weights is None else row_weights.to(like)
    b = like.new_full((shape[1],), 1 / shape[1]) if column_weights is None else column_weights.to(like)
    for name, weights, size in (("row_weights", a, shape[0]), ("column_weights", b, shape[1])):
        if weights.shape != (size,):
            msg = f"{name} must be of shape ({size},), not {tuple(weights.shape)}"
            raise ValueError(msg)
        if not (weights.isfinite() & (weights > 0)).all():
            msg = f"{name} must be positive and finite"
            raise ValueError(msg)
    from_rows, to_columns = processes.total(float(a.double().sum()), like.device), float(b.double().sum())
    if abs(from_rows - to_columns) > _SAME_MASS * max(from_rows, to_columns):
        msg = f"row_weights sum to {from_rows:g} but column_weights to {to_columns:g}; scale them to the same sum"
        raise ValueError(msg)
    return a, b


def _column_potential(cost: Cost, epsilon: float, processes: Processes) -> Tensor:
    """Potential (P,) of the columns after the first update, g_j = −ε log Σ_i exp(−M_ij / ε) plus a constant."""
    # Subtracting a cost c, as in exp((c − M) / ε), keeps the digits that a term common to all costs would take. A
    # process may have no rows.
    some = cost[:1]
    common = processes.min(torch.cat([some.flatten(), some.new_tensor([math.inf])]).min())
    exponents = cost.exponents(common.expand(cost.shape[1]), epsilon)
    # Largest exponent of each column so far, and the sum of exp(exponent − largest).
    largest, sums = some.new_full(cost.shape[1:], -math.inf), some.new_zeros(cost.shape[1])
    for rows in cost.blocks():
        block = exponents(rows)
        before, largest = largest, torch.maximum(largest, block.amax(0))
        sums = sums * (before - largest).exp() + block.sub_(largest).exp_().sum(0)
    top = -processes.min(-largest)
    logs = processes.sum(sums * (largest - top).exp()).log() + top
    return epsilon * (logs.min() - logs)
