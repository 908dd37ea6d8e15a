"""Entropic transport with the names and results of ``ot.solve``: batches, and gradients of the value."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._arguments import (
    at_least_single,
    default_tolerance,
    marginal,
    require_finite_potential,
    require_floats,
    require_limits,
    require_same_mass,
    start,
)
from ._iterations import Iterates, iterate
from ._kernels import BatchKernel, make_batch
from ._processes import Processes
from ._workspace import Workspace
from .costs import Cost
from .entropic import sinkhorn, warn_if_not_converged

# Largest single matrix that is solved as a batch, in a few products of torch.
_SMALL = 2**18
# Dimensions of a matrix and of a batch of matrices.
_DIMENSIONS = (2, 3)


@dataclass(frozen=True)
class TransportResult:
    """Result of :func:`solve`. The shapes of a batch have its size B in front.

    Attributes:
        value: ⟨T, M⟩ + ε KL(T ‖ a bᵀ), with gradients with respect to M, a and b.
        value_linear: ⟨T, M⟩, without gradients.
        potentials: f (N,) and g (P,) in the unit of the cost, with T = exp((f + g − M) / ε); without gradients.
        iterations: Number of iterations.
        marginal_error: L1 distance between the column sums of the plan and b; the largest of a batch. The row sums are
            exact.
    """

    value: Tensor
    value_linear: Tensor
    potentials: tuple[Tensor, Tensor]
    iterations: int
    marginal_error: float
    make_plan: Callable[[], Tensor]

    @cached_property
    def plan(self) -> Tensor:
        """T, (N, P), without gradients. It is computed on first use, which must be before a workspace is used again."""
        return self.make_plan()


def solve(
    M: Tensor | Cost,  # noqa: N803 - the name in ot.solve
    a: Tensor | None = None,
    b: Tensor | None = None,
    reg: float = 0.01,
    *,
    max_iter: int = 1000,
    tol: float | None = None,
    potentials_init: tuple[Tensor, Tensor] | None = None,
    anderson: int = 5,
    workspace: Workspace | None = None,
    warn: bool = True,
) -> TransportResult:
    """Solve min_T ⟨T, M⟩ + ε KL(T ‖ a bᵀ) over plans with marginals a and b, for one cost matrix or a batch.

    The minimum is that of :func:`sinkhorn`, which adds −ε H(T) instead: for given marginals they differ by a constant.
    The iterations are accelerated. The gradients of the value are those of the converged problem (envelope theorem):
    T for M, and the dual potentials of this problem, less their means, for a and b. They do not depend on the
    iterations, and their error is about that of the marginals.

    Args:
        M: Cost matrix (N, P), or batch (B, N, P) of cost matrices that are solved together until all of them converge.
            Finite. Half precision is solved in single precision. A :class:`Cost` has no gradients.
        a: Marginal of the rows, (N,) or (B, N), positive; uniform with sum one by default.
        b: Marginal of the columns, (P,) or (B, P), positive, with the same sum as a; uniform by default.
        reg: Regularisation ε > 0, in the unit of the cost.
        max_iter: Upper bound on the iterations, at least 1.
        tol: Stop when the L1 error of the column marginals is at most this. None is relative to the sum of b of each
            problem; see :func:`sinkhorn`.
        potentials_init: Potentials of an earlier, similar problem to start from. Only those of the columns are used.
        anderson: Number of past steps that accelerate the iterations after the tenth; 0 for Sinkhorn's iterations.
        workspace: Memory for the solver of a large single matrix, 2 GiB by default. A batch, or a matrix of at most
            2¹⁸ entries, is solved with dense kernels, which with intermediate results take twice its memory.
        warn: Whether to warn if the tolerance was not reached.

    Returns:
        Values, potentials and the plan.

    Raises:
        TypeError: If an argument must be a tensor and is not.
        ValueError: If an argument is out of its range or on another device than the cost, or if the cost is empty or
            has NaN or infinite entries.

    Warns:
        NotConvergedWarning: If a positive tolerance was not reached, unless ``warn`` is off.

    Example:
        >>> cost = torch.tensor([[0.0, 1.0], [1.0, 0.2]], requires_grad=True)
        >>> result = solve(cost, reg=0.1)
        >>> result.plan.round(decimals=3).tolist()
        [[0.5, 0.0], [0.0, 0.5]]
        >>> result.value.backward()
        >>> torch.allclose(cost.grad, result.plan)
        True
        >>> solve(torch.rand(8, 30, 20), reg=0.1).value.shape
        torch.Size([8])
    """
    if not hasattr(M, "exponents"):
        require_floats(M=M)
    costs = at_least_single(M) if isinstance(M, Tensor) else M
    if len(costs.shape) not in _DIMENSIONS or not costs.shape.numel():
        msg = f"M must be a matrix (N, P) or a batch (B, N, P) and not be empty, not of shape {tuple(costs.shape)}"
        raise ValueError(msg)
    require_limits(reg, max_iter, tol, anderson, ("reg", "max_iter", "tol"))
    rows, columns, like = costs.shape[:-1], costs.shape[:-2] + costs.shape[-1:], costs[:1]
    a = marginal("a", a, rows, 1 / rows[-1], like, "M")
    b = marginal("b", b, columns, 1 / columns[-1], like, "M")
    masses = require_same_mass(a.detach(), b.detach(), Processes(), ("a", "b"))
    tolerance = default_tolerance(like.dtype, masses) if tol is None else tol
    names = "potentials_init[1]", "M"
    potential = None if potentials_init is None else start(potentials_init[1], columns, like, names)
    options: dict[str, Any] = {"epsilon": reg, "max_iterations": max_iter, "anderson": anderson}
    marginals = a.detach(), b.detach()
    if isinstance(costs, Tensor) and (costs.ndim > 2 or costs.numel() <= _SMALL):  # noqa: PLR2004 - a matrix has two
        found = _solve_batch(costs.detach(), *marginals, potential, tolerance=tolerance, **options)
    else:
        found = _solve_one(costs, *marginals, potential, workspace, tolerance=float(tolerance), **options)
    if warn:
        errors = (found.column_sums - marginals[1]).abs().sum(-1).double().reshape(-1)
        limits = torch.zeros_like(errors) + tolerance
        worst = (errors - limits).argmax()
        warn_if_not_converged(found.iterations, float(errors[worst]), float(limits[worst]))
    f, g = found.potentials
    value = _Value.apply(costs if isinstance(costs, Tensor) else None, a, b, f, g, found.column_sums, reg)
    return TransportResult(
        value, found.value_linear, found.potentials, found.iterations, found.marginal_error, found.make_plan
    )


class _Found(NamedTuple):
    """What both ways to solve return; see :class:`TransportResult`."""

    potentials: tuple[Tensor, Tensor]
    column_sums: Tensor
    value_linear: Tensor
    iterations: int
    marginal_error: float
    make_plan: Callable[[], Tensor]


@torch.no_grad()
def _solve_one(
    cost: Tensor | Cost, a: Tensor, b: Tensor, potential: Tensor | None, workspace: Workspace | None, **options: Any
) -> _Found:
    """Solve a problem with :func:`sinkhorn`."""
    cost = cost.detach() if isinstance(cost, Tensor) else cost
    plan = sinkhorn(
        cost, potential=potential, row_weights=a, column_weights=b, workspace=workspace, warn=False, **options
    )
    potentials = plan.row_potential + plan.epsilon * plan.row_scaling.log(), plan.potential
    linear = a.new_tensor(plan.transport_cost())
    return _Found(potentials, plan.column_sums, linear, plan.iterations, plan.marginal_error, plan.dense)


@torch.no_grad()
def _solve_batch(costs: Tensor, a: Tensor, b: Tensor, potential: Tensor | None, **options: Any) -> _Found:
    """Solve one problem or several of one size with dense kernels in one matrix product each."""
    shape, epsilon = costs.shape, options["epsilon"]
    costs, a, b = costs.reshape(-1, *shape[-2:]), a.reshape(-1, shape[-2]), b.reshape(-1, shape[-1])
    if not costs.isfinite().all():
        msg = "M has NaN or infinite entries"
        raise ValueError(msg)
    if potential is None:
        logs = (costs / -epsilon).logsumexp(1)
        g, v = epsilon * (logs.amin(1, keepdim=True) - logs), b / b.mean(1, keepdim=True)
    else:
        g, v = potential.reshape(b.shape), torch.ones_like(b)

    def make(g: Tensor, _allowance: float) -> tuple[BatchKernel, Tensor]:
        kernel, f = make_batch(costs, g, epsilon)
        require_finite_potential(f, epsilon)
        return kernel, f

    found: Iterates[BatchKernel] = iterate(make, g, v, a, b, **options)
    u, v = found.row_scaling, found.column_scaling
    kernel = found.kernel.matrix
    linear = (u * ((kernel * costs) @ v[..., None])[..., 0]).sum(1)
    potentials = found.row_potential + epsilon * u.log(), found.column_potential + epsilon * v.log()
    return _Found(
        (potentials[0].view(shape[:-1]), potentials[1].view(shape[:-2] + shape[-1:])),
        found.column_sums.view(shape[:-2] + shape[-1:]),
        linear.view(shape[:-2]),
        found.iterations,
        found.marginal_error,
        lambda: (kernel * u[:, :, None]).mul_(v[:, None, :]).view(shape),
    )


class _Value(torch.autograd.Function):
    """The value of a solved problem, with the gradients of the envelope theorem."""

    @staticmethod
    def forward(
        ctx: Any,
        costs: Tensor | None,
        a: Tensor,
        b: Tensor,
        f: Tensor,
        g: Tensor,
        column_sums: Tensor,
        epsilon: float,
    ) -> Tensor:
        """⟨T, M⟩ + ε KL(T ‖ a bᵀ) = ⟨T 1, f − ε log a⟩ + ⟨Tᵀ 1, g − ε log b⟩."""
        ctx.epsilon = epsilon
        ctx.save_for_backward(costs, f, g, a, b)
        of_rows, of_columns = ((each - epsilon * weights.log()).double() for each, weights in ((f, a), (g, b)))
        return ((a * of_rows).sum(-1) + (column_sums * of_columns).sum(-1)).to(f)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """The plan for M, and the dual potentials less their means for a and b."""
        costs, f, g, a, b = ctx.saved_tensors
        for_costs = None
        if ctx.needs_input_grad[0]:
            plan = ((f[..., :, None] + g[..., None, :] - costs) / ctx.epsilon).exp_()
            for_costs = plan.mul_(gradient[..., None, None])
        duals = [each - ctx.epsilon * weights.log() for each, weights in ((f, a), (g, b))]
        for_weights = [gradient[..., None] * (dual - dual.mean(-1, keepdim=True)) for dual in duals]
        return for_costs, *for_weights, None, None, None, None
