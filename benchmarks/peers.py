"""Solvers of entropic transport that :mod:`benchmarks.transport` compares with ours.

Each is called with a problem, ε and a number of iterations, and returns the sums of the plan's rows and columns,
except the lazy solver. POT is a dependency of the project. OTT-JAX is used if it can be imported.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import ot
import torch
from torch import Tensor

Sums = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Given:
    """A problem in the forms that solvers take.

    Attributes:
        cost: M, (N, P), float32.
        points: Points (N, D) and (P, D) whose squared distances are M, up to a constant.
    """

    cost: Tensor
    points: tuple[Tensor, Tensor]

    @property
    def weights(self) -> tuple[Tensor, Tensor]:
        """Uniform marginals, (N,) and (P,)."""
        rows, columns = self.cost.shape
        return self.cost.new_full((rows,), 1 / rows), self.cost.new_full((columns,), 1 / columns)


Peer = Callable[[Given, float, int], Sums | None]


def _bregman(method: str) -> Peer:
    def run(given: Given, epsilon: float, iterations: int) -> Sums:
        plan = ot.bregman.sinkhorn(
            *given.weights, given.cost, epsilon, method=method, numItermax=iterations, stopThr=0, warn=False
        )
        return plan.sum(1), plan.sum(0)

    return run


def _solve(given: Given, epsilon: float, iterations: int) -> Sums:
    plan = ot.solve(given.cost, *given.weights, epsilon, max_iter=iterations, tol=0, grad="detach").plan
    return plan.sum(1), plan.sum(0)


def _lazy(given: Given, epsilon: float, iterations: int) -> None:
    ot.solve_sample(*given.points, *given.weights, reg=epsilon, max_iter=iterations, tol=0, lazy=True, grad="detach")


def _screened(given: Given, epsilon: float, iterations: int) -> Sums:
    budgets = {"ns_budget": len(given.cost) // 2, "nt_budget": given.cost.shape[1] // 2}
    plan = ot.bregman.screenkhorn(*given.weights, given.cost, epsilon, maxiter=iterations, **budgets)
    return plan.sum(1), plan.sum(0)


def _ott(*, in_logs: bool) -> Peer:
    def run(given: Given, epsilon: float, iterations: int) -> Sums:
        import jax  # noqa: PLC0415 - optional
        from ott.geometry.geometry import Geometry  # noqa: PLC0415 - optional
        from ott.problems.linear.linear_problem import LinearProblem  # noqa: PLC0415 - optional
        from ott.solvers.linear.sinkhorn import Sinkhorn  # noqa: PLC0415 - optional

        key = in_logs, iterations
        if key not in _COMPILED:
            limits = {"min_iterations": iterations, "max_iterations": iterations}
            solver = Sinkhorn(lse_mode=in_logs, threshold=0.0, inner_iterations=iterations, **limits)

            def sums(cost: object, epsilon: float) -> object:
                found = solver(LinearProblem(Geometry(cost_matrix=cost, epsilon=epsilon)))
                return found.marginal(1), found.marginal(0)

            _COMPILED[key] = jax.jit(sums)
        rows, columns = _COMPILED[key](jax.numpy.asarray(given.cost.numpy()), epsilon)
        return tuple(torch.tensor(each.tolist()) for each in (rows, columns))

    return run


_COMPILED: dict[tuple[bool, int], Callable] = {}
PEERS: dict[str, Peer] = {
    "POT sinkhorn": _bregman("sinkhorn"),
    "POT sinkhorn_log": _bregman("sinkhorn_log"),
    "POT sinkhorn_stabilized": _bregman("sinkhorn_stabilized"),
    "POT solve": _solve,
    "POT solve_sample, lazy": _lazy,
    "POT screenkhorn, half": _screened,
}
if find_spec("ott"):
    PEERS |= {"OTT, logs": _ott(in_logs=True), "OTT, kernel": _ott(in_logs=False)}
