"""Solvers of entropic transport that :mod:`benchmarks.transport` compares with ours.

Each is called with a problem, ε and the most iterations, forms the cost in the way that it takes, and returns a
function that gives the sums of the plan's rows and columns. POT is a dependency of the project. OTT-JAX and geomloss,
with KeOps, are used if they can be imported.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

# POT would otherwise import JAX and time its own solvers beside JAX's threads.
os.environ["POT_BACKEND_DISABLE_JAX"] = "1"

import ot
import torch
from torch import Tensor

from .steps import Problem

Sums = tuple[Tensor, Tensor]
# Rows of a plan to compute at once from its potentials.
_ROWS = 1024
# Iterations between two tests of a stop rule.
_TESTED_EVERY = 5


@dataclass(frozen=True)
class Given:
    """A problem for other solvers.

    Attributes:
        problem: Features, prototypes and coordinates.
        alpha: Weight of the spatial cost.
        tolerance: Marginal error at which those of ``STOPPING`` stop.
    """

    problem: Problem
    alpha: float
    tolerance: float = 0.0

    @property
    def weights(self) -> tuple[Tensor, Tensor]:
        """Uniform marginals, (N,) and (P,)."""
        sides = self.problem.features, self.problem.prototypes
        rows, columns = (each.new_full((len(each),), 1 / len(each)) for each in sides)
        return rows, columns

    def cost(self) -> Tensor:
        """M, (N, P), float32."""
        return self.problem.matrix(self.alpha)

    def points(self) -> tuple[Tensor, Tensor]:
        """Points (N, D) and (P, D) whose squared distances are M."""
        return self.problem.points(self.alpha)


Peer = Callable[[Given, float, int], Callable[[], Sums]]


def _of_plan(plan: Tensor) -> Callable[[], Sums]:
    return lambda: (plan.sum(1), plan.sum(0))


def _of_logs(given: Given, epsilon: float, rows: Tensor, columns: Tensor) -> Callable[[], Sums]:
    """Sums of the plan exp(rows + columns − M / ε)."""

    def sums() -> Sums:
        parts = [
            (logs[:, None] + columns - costs / epsilon).exp()
            for costs, logs in zip(given.cost().split(_ROWS), rows.split(_ROWS), strict=True)
        ]
        return torch.cat([part.sum(1) for part in parts]), torch.stack([part.sum(0) for part in parts]).sum(0)

    return sums


def _bregman(method: str) -> Peer:
    def run(given: Given, epsilon: float, iterations: int) -> Callable[[], Sums]:
        options = {"numItermax": iterations, "stopThr": 0, "warn": False}
        return _of_plan(ot.bregman.sinkhorn(*given.weights, given.cost(), epsilon, method=method, **options))

    return run


def _solve(given: Given, epsilon: float, iterations: int) -> Callable[[], Sums]:
    result = ot.solve(given.cost(), *given.weights, epsilon, max_iter=iterations, tol=0, grad="detach")
    return _of_plan(result.plan)


def _lazy(given: Given, epsilon: float, iterations: int) -> Callable[[], Sums]:
    options = {"max_iter": iterations, "tol": 0, "lazy": True, "grad": "detach"}
    result = ot.solve_sample(*given.points(), *given.weights, reg=epsilon, **options)
    return _of_logs(given, epsilon, *result.potentials)


def _screened(given: Given, epsilon: float, iterations: int) -> Callable[[], Sums]:
    cost = given.cost()
    budgets = {"ns_budget": len(cost) // 2, "nt_budget": cost.shape[1] // 2}
    return _of_plan(ot.bregman.screenkhorn(*given.weights, cost, epsilon, maxiter=iterations, **budgets))


def _ott(*, in_logs: bool, acceleration: str | None = None) -> Peer:
    @cache
    def compiled(iterations: int, tolerance: float) -> Callable[[object, float], Any]:
        import jax  # noqa: PLC0415 - optional
        from ott.geometry.epsilon_scheduler import Epsilon  # noqa: PLC0415 - optional
        from ott.geometry.geometry import Geometry  # noqa: PLC0415 - optional
        from ott.problems.linear.linear_problem import LinearProblem  # noqa: PLC0415 - optional
        from ott.solvers.linear.acceleration import AndersonAcceleration, Momentum  # noqa: PLC0415 - optional
        from ott.solvers.linear.sinkhorn import Sinkhorn  # noqa: PLC0415 - optional

        options: dict[str, Any] = {"momentum": Momentum(value=1.5)} if acceleration == "momentum" else {}
        if acceleration == "Anderson":
            options["anderson"] = AndersonAcceleration(memory=5)
        if acceleration:
            options |= {"threshold": tolerance, "inner_iterations": min(iterations, _TESTED_EVERY)}
        else:
            options |= {"threshold": 0.0, "inner_iterations": iterations, "min_iterations": iterations}
        solver = Sinkhorn(lse_mode=in_logs, max_iterations=iterations, **options)
        scaling = {"init": 10.0, "decay": 0.7} if acceleration == "epsilon" else {}

        def potentials(cost: object, epsilon: float) -> object:
            found = solver(LinearProblem(Geometry(cost_matrix=cost, epsilon=Epsilon(epsilon, **scaling))))
            return found.f / epsilon, found.g / epsilon

        jitted = jax.jit(potentials)
        return lambda cost, epsilon: jax.block_until_ready(jitted(jax.numpy.asarray(cost), epsilon))

    def run(given: Given, epsilon: float, iterations: int) -> Callable[[], Sums]:
        rows, columns = compiled(iterations, given.tolerance)(given.cost().numpy(), epsilon)
        return _of_logs(given, epsilon, *(torch.tensor(each.tolist()) for each in (rows, columns)))

    return run


def _geomloss(backend: str) -> Peer:
    def run(given: Given, epsilon: float, _iterations: int) -> Callable[[], Sums]:
        from geomloss import SamplesLoss  # noqa: PLC0415 - optional

        # Its cost is half the squared distance. It lowers ε to its value, by its own schedule of few iterations.
        options = {"p": 2, "blur": math.sqrt(epsilon / 2), "debias": False, "potentials": True}
        (a, b), (x, y) = given.weights, given.points()
        f, g = SamplesLoss("sinkhorn", backend=backend, **options)(a, x, b, y)
        logs = (2 * each.flatten() / epsilon + weights.log() for each, weights in ((f, a), (g, b)))
        return _of_logs(given, epsilon, *logs)

    return run


_ACCELERATED = {f"OTT, {each}": _ott(in_logs=True, acceleration=each) for each in ("momentum", "Anderson", "epsilon")}
# Solvers whose updates are not those of Sinkhorn, and which stop by a rule of their own.
STOPPING = {*_ACCELERATED, "geomloss, dense", "geomloss, KeOps"}
PEERS: dict[str, Peer] = {
    "POT sinkhorn": _bregman("sinkhorn"),
    "POT sinkhorn_log": _bregman("sinkhorn_log"),
    "POT sinkhorn_stabilized": _bregman("sinkhorn_stabilized"),
    "POT solve": _solve,
    "POT solve_sample, lazy": _lazy,
    "POT screenkhorn, half": _screened,
}
if find_spec("ott"):
    PEERS |= {"OTT, logs": _ott(in_logs=True), "OTT, kernel": _ott(in_logs=False), **_ACCELERATED}
if find_spec("geomloss"):
    PEERS["geomloss, dense"] = _geomloss("tensorized")
    if find_spec("pykeops"):
        PEERS["geomloss, KeOps"] = _geomloss("online")
