"""Time and memory of one solver on one problem; :mod:`benchmarks.transport` calls this in other processes."""

import math
import warnings
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import torch

from anomalib_ot.transport import TransportPlan, Workspace

from .peers import PEERS, STOPPING, Given, Peer
from .steps import ITERATIONS, Problem, Steps
from .watch import added_memory, timed

Precision = Literal["highest", "high", "medium"]
# Names of our solver, and of times that no solver that stores similarities can undercut.
COLD, PLAIN, WARM = "ours, cold", "ours, cold, plain", "ours, warm"
PRODUCT, READ = "limit: product", "limit: one read"
OURS = COLD, PLAIN, WARM, PRODUCT, READ
# Upper bound of the iterations to the tolerance.
_MOST = 5000
# Iterations to extrapolate from.
_FEW = 4
# Solvers that stop by a rule of their own may take this many times our plain iterations.
_PATIENCE = 10


@dataclass(frozen=True)
class Case:
    """What is solved, and how.

    Attributes:
        problem: File of a :class:`Problem`.
        alpha: Weight of the spatial cost.
        epsilon: Regularisation.
        tolerance: Marginal error to reach.
        seconds: Largest time to measure; above it, times are extrapolated.
        memory: Memory for our solver in GiB.
        device: Device for all solvers.
    """

    problem: Path
    alpha: float
    epsilon: float
    tolerance: float
    seconds: float
    memory: float
    device: str


def prepare(threads: int, precision: Precision) -> None:
    """Set up torch in a new process."""
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)


def measure(name: str, case: Case, needed: int) -> dict[str, Any]:
    """Times of a solver, its iterations and its marginal error.

    Args:
        name: Name of the solver.
        case: What is solved.
        needed: Iterations that our plain iterations need.
    """
    problem = _loaded(case.problem, case.device)
    if name in (PRODUCT, READ):
        return {"to_tolerance_s": _limit(name, problem)}
    if name in PEERS:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                time = time_stopping_peer if name in STOPPING else time_peer
                return time(PEERS[name], Given(problem, case.alpha, case.tolerance), case, needed)
        except Exception as failure:  # noqa: BLE001 - a peer may raise anything
            return {"note": f"{type(failure).__name__}: {str(failure)[:60]}"}
    steps = _steps(name, case, _kept(case.memory))
    plan, seconds = timed(lambda: steps.solve(case.tolerance, _MOST))
    row = {"to_tolerance_s": seconds, "iterations": plan.iterations, "error": plan.marginal_error}
    if name == PLAIN:
        row["hundred_s"] = timed(lambda: steps.solve(0.0))[1]
    return row


def weigh(name: str, case: Case) -> float:
    """Memory in MB that a solver adds to that of the features and prototypes, in its second call."""
    problem = _loaded(case.problem, case.device)
    # The memory does not depend on the number of iterations.
    call = (
        partial(PEERS[name], Given(problem, case.alpha), case.epsilon, 1)
        if name in PEERS
        else partial(_solve, name, case)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        call()
        return added_memory(call, case.device)


def time_peer(peer: Peer, given: Given, case: Case, needed: int) -> dict[str, Any]:
    """Times of another solver for the iterations that our plain ones need and for a hundred, and its marginal error."""
    first, error = _run(peer, given, case.epsilon, 1)
    slope = max(0.0, _run(peer, given, case.epsilon, 1 + _FEW)[0] - first) / _FEW
    row: dict[str, Any] = {"iterations": needed}
    for name, count in (("to_tolerance_s", needed), ("hundred_s", ITERATIONS)):
        expected = first + (count - 1) * slope
        if expected > case.seconds:
            row |= {name: expected, "note": "extrapolated"}
            continue
        row[name], error = _run(peer, given, case.epsilon, count)
        if count == needed:
            row["error"] = error
    if not math.isfinite(error):
        row["note"] = "not finite"
    return row


def time_stopping_peer(peer: Peer, given: Given, case: Case, needed: int) -> dict[str, Any]:
    """Time of a solver until it stops, at the latest after some times our plain iterations, and its marginal error."""
    seconds, error = _run(peer, given, case.epsilon, _PATIENCE * needed)
    row: dict[str, Any] = {"to_tolerance_s": seconds, "error": error}
    return row if error <= case.tolerance else row | {"note": "not reached"}


def _run(peer: Peer, given: Given, epsilon: float, count: int) -> tuple[float, float]:
    """Seconds of a solver with a number of iterations, and its marginal error."""
    # The first run of each count compiles where a peer does.
    peer(given, epsilon, count)
    sums, seconds = timed(lambda: peer(given, epsilon, count))
    return seconds, sum(
        float((each - weights).abs().sum()) for each, weights in zip(sums(), given.weights, strict=True)
    )


@lru_cache(1)
def _loaded(path: Path, device: str) -> Problem:
    return Problem.load(path, device)


@cache
def _kept(memory: float) -> Workspace:
    """Memory of our solver, which it keeps from one solve to the next."""
    return Workspace(memory * 2**30)


def _steps(name: str, case: Case, workspace: Workspace) -> Steps:
    """Our solver, before a solve from a cold start or after a step of training."""
    problem = _loaded(case.problem, case.device)
    steps = Steps(problem, case.alpha, workspace, case.epsilon, 0 if name == PLAIN else 5)
    if name == WARM:
        steps.take(case.tolerance, _MOST)
    return steps


def _solve(name: str, case: Case) -> TransportPlan:
    """Solve from nothing, with memory of its own."""
    return _steps(name, case, Workspace(case.memory * 2**30)).solve(case.tolerance, _MOST)


def _limit(name: str, problem: Problem) -> float:
    """Seconds for the product of features and prototypes in memory that is mapped, or for one read of the result."""
    similarities = problem.similarities()
    if name == READ:
        return timed(similarities.amax)[1]
    columns = problem.prototypes.T
    return timed(lambda: torch.mm(problem.features, columns, out=similarities))[1]
