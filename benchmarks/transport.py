"""Entropic transport at the sizes of Pradot's training compared with other solvers.

Run as ``python -m benchmarks.transport``. The default size is that of the paper: batches of 64, 16 prototypes per cell,
ε = 0.01. The features come from images of the embedded category (EfficientNet-Lite0, whitened as in training) and are
rotated into the requested number of channels, which changes no cosine. As the worst case, they are random, and no
kernel entry can be omitted.

All solvers take the same cost matrix. Times include forming it. Ours stop at the tolerance. The updates of the other
solvers are those of Sinkhorn, so each is given exactly the iterations that our plain iterations need for the same
marginal error, without tests of a stop rule, and 100 iterations. A time above the limit is extrapolated from a few
iterations, in which it is linear. Each number of iterations runs once before it is timed, because OTT-JAX compiles it.
Solvers run alternately in one process, and the fastest of the repeats counts.
"""

import math
import resource
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from jsonargparse import auto_cli
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from anomalib_ot import Assembly
from anomalib_ot.transport import FusedCost, TransportPlan, Workspace, grid_coordinates, sinkhorn

from .features import layer_features, whitening_of
from .peers import PEERS, Given, Peer
from .rows import appended

T = TypeVar("T")
Source = Literal["pictures", "random"]
EPSILON = 0.01
ITERATIONS = 100
LAYERS = {8: "blocks.2", 16: "blocks.4"}
COLUMNS = (
    "rows",
    "columns",
    "channels",
    "source",
    "alpha",
    "epsilon",
    "solver",
    "to_tolerance_s",
    "iterations",
    "error",
    "hundred_s",
    "note",
)
# Upper bound of the iterations to the tolerance.
_MOST = 5000
# Iterations to extrapolate from.
_FEW = 4


@dataclass
class Problem:
    """Features (B·N, C) of a batch, prototypes (P, C), and the coordinates of both, (N, 2) and (P, 2)."""

    features: Tensor
    prototypes: Tensor
    grid: Tensor
    coordinates: Tensor

    def to(self, device: str) -> "Problem":
        """The problem on a device, with a copy of the prototypes, which move."""
        features, prototypes, grid, coordinates = (
            part.to(device) for part in (self.features, self.prototypes, self.grid, self.coordinates)
        )
        return Problem(features, prototypes.clone(), grid, coordinates)

    def cost(self, alpha: float, workspace: Workspace | None = None) -> FusedCost:
        """The cost matrix."""
        return FusedCost(self.features, self.prototypes, self.grid, self.coordinates, alpha, workspace=workspace)

    def points(self, alpha: float) -> tuple[Tensor, Tensor]:
        """Points (B·N, C + 2) and (P, C + 2) whose squared distances are the cost."""
        cells = self.grid.repeat(len(self.features) // len(self.grid), 1)
        farthest = 1 - min(
            float((F.normalize(rows) @ F.normalize(self.prototypes).T).min()) for rows in self.features.split(1024)
        )
        scales = math.sqrt((1 - alpha) / (2 * farthest)), math.sqrt(alpha / 2)
        pairs = (self.features, cells), (self.prototypes, self.coordinates)
        return tuple(torch.cat([F.normalize(left) * scales[0], right * scales[1]], 1) for left, right in pairs)


def main(
    sizes: list[tuple[int, int]] | None = None,
    epsilons: list[float] | None = None,
    channels: list[int] | None = None,
    alphas: list[float] | None = None,
    sources: list[Source] | None = None,
    solvers: list[str] | None = None,
    stride: int = 16,
    tolerance: float = 1e-3,
    seconds: float = 5.0,
    repeats: int = 2,
    memory: float = 2.0,
    threads: int = 2,
    seed: int = 0,
    device: str = "cpu",
    precision: Literal["highest", "high", "medium"] = "highest",
    output: Path = Path("results/transport.csv"),
) -> None:
    """Print and save the time of each solver in each case.

    Args:
        sizes: Pairs of the number of images and of prototypes per cell; [64, 16] by default.
        epsilons: Regularisations; 0.01 by default.
        channels: Numbers of channels; 128 by default.
        alphas: Weights of the spatial cost; 0.3 by default.
        sources: Features of images (``pictures``, the default) or random features.
        solvers: Names of the other solvers; all that can be imported by default.
        stride: Stride of the feature maps of images of 224 px.
        tolerance: Marginal error to reach.
        seconds: Largest time to measure; above it, times are extrapolated.
        repeats: Number of measurements of each solver.
        memory: Memory for the solver in GiB.
        threads: Number of threads for torch.
        seed: Random seed.
        device: Device for all solvers: ``cpu`` or ``cuda``.
        precision: Argument of ``torch.set_float32_matmul_precision``: ``medium`` computes products in bfloat16 if the
            processor supports it. Models are trained in full precision regardless of this setting.
        output: CSV file to append to.
    """
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)
    peers = {name: peer for name, peer in PEERS.items() if solvers is None or name in solvers}
    with appended(output, COLUMNS) as add:
        for source in sources or ["pictures"]:
            for width in channels or [128]:
                for images, per_cell in sizes or [(64, 16)]:
                    torch.manual_seed(seed)
                    problem = make_problem(source, 224 // stride, stride, width, images, per_cell).to(device)
                    for alpha in alphas or [0.3]:
                        for epsilon in epsilons or [EPSILON]:
                            case = {"rows": len(problem.features), "columns": len(problem.prototypes)}
                            case |= {"channels": width, "source": source, "alpha": alpha, "epsilon": epsilon}
                            compare = Comparison(problem, alpha, epsilon, tolerance, seconds, memory)
                            for row in compare.run(peers, repeats):
                                add(case | row)


class Comparison:
    """Times of all solvers on one problem.

    Args:
        problem: Features and prototypes.
        alpha: Weight of the spatial cost.
        epsilon: Regularisation.
        tolerance: Marginal error to reach.
        seconds: Largest time to measure.
        memory: Memory of our solver in GiB.
    """

    def __init__(
        self, problem: Problem, alpha: float, epsilon: float, tolerance: float, seconds: float, memory: float
    ) -> None:
        self._problem = problem
        self._alpha = alpha
        self._epsilon = epsilon
        self._tolerance = tolerance
        self._seconds = seconds
        self._workspace = Workspace(memory * 2**30)

    def run(self, peers: dict[str, Peer], repeats: int) -> list[dict[str, Any]]:
        """A row for each solver."""
        # The first use compiles the loops and maps memory.
        needed = self._ours(anderson=0)["iterations"]
        ours = {
            "ours, cold": self._ours,
            "ours, cold, plain": lambda: self._ours(anderson=0),
            "ours, warm": self._warm,
        }
        given = Given(self._problem.cost(self._alpha)[:], self._problem.points(self._alpha)) if peers else None
        measures = ours | {name: lambda peer=peer: self._theirs(peer, given, needed) for name, peer in peers.items()}
        rows: dict[str, dict[str, Any]] = {}
        for _ in range(repeats):
            for name, measure in measures.items():
                if rows.get(name, {}).get("note"):
                    continue  # it is extrapolated or failed
                row = measure()
                before = rows.get(name, row)
                fastest = {key: min(row[key], before[key]) for key in ("to_tolerance_s", "hundred_s") if key in row}
                rows[name] = {"solver": name} | row | fastest
        return [
            {key: f"{value:.3g}" if isinstance(value, float) else value for key, value in row.items()}
            for row in rows.values()
        ]

    def _ours(self, anderson: int = 5) -> dict[str, Any]:
        """Our solver from a cold start."""
        steps = self._steps(anderson)
        plan, cold = timed(lambda: steps.solve(self._tolerance, _MOST))
        row = {"to_tolerance_s": cold, "iterations": plan.iterations, "error": plan.marginal_error}
        if not anderson:
            row["hundred_s"] = timed(lambda: steps.solve(0.0))[1]
        return row

    def _warm(self) -> dict[str, Any]:
        """Our solver after a step of training."""
        steps = self._steps(5)
        steps.take(self._tolerance, _MOST)
        plan, warm = timed(lambda: steps.solve(self._tolerance, _MOST))
        return {"to_tolerance_s": warm, "iterations": plan.iterations, "error": plan.marginal_error}

    def _steps(self, anderson: int) -> "Steps":
        return Steps(
            replace(self._problem, prototypes=self._problem.prototypes.clone()),
            self._alpha,
            self._workspace,
            self._epsilon,
            anderson,
        )

    def _theirs(self, peer: Peer, given: Given, needed: int) -> dict[str, Any]:
        """Another solver, with the time of forming the cost matrix."""
        forming = timed(lambda: self._problem.cost(self._alpha)[:])[1]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return self._time(peer, given, needed, forming)
        except Exception as failure:  # noqa: BLE001 - a peer may raise anything
            return {"note": f"{type(failure).__name__}: {str(failure)[:60]}"}

    def _time(self, peer: Peer, given: Given, needed: int, forming: float) -> dict[str, Any]:
        def run(count: int) -> tuple[float, float | None]:
            # The first run of each count compiles where a peer does.
            peer(given, self._epsilon, count)
            sums, seconds = timed(lambda: peer(given, self._epsilon, count))
            differences = [
                (each - weights).abs().sum() for each, weights in zip(sums or (), given.weights, strict=False)
            ]
            return seconds, float(sum(differences)) if differences else None

        first, error = run(1)
        slope = max(0.0, run(1 + _FEW)[0] - first) / _FEW
        row: dict[str, Any] = {"iterations": needed}
        for name, count in (("to_tolerance_s", needed), ("hundred_s", ITERATIONS)):
            expected = first + (count - 1) * slope
            if expected > self._seconds:
                row |= {name: expected + forming, "note": "extrapolated"}
                continue
            seconds, error = run(count)
            row[name] = seconds + forming
            if count == needed:
                row["error"] = error
        if error is not None and not math.isfinite(error):
            row["note"] = "not finite"
        return row


class Steps:
    """Successive training steps on one batch.

    Args:
        problem: Features and prototypes; the prototypes move.
        alpha: Weight of the spatial cost.
        workspace: Memory of the solver.
        epsilon: Regularisation.
        anderson: Number of past steps that accelerate the iterations.
    """

    def __init__(
        self, problem: Problem, alpha: float, workspace: Workspace, epsilon: float = EPSILON, anderson: int = 0
    ) -> None:
        self.problem = problem
        self.alpha = alpha
        self.workspace = workspace
        self._options = {"epsilon": epsilon, "anderson": anderson}
        self._potential: Tensor | None = None

    def solve(self, tolerance: float, iterations: int = ITERATIONS) -> TransportPlan:
        """Form the cost and solve to a marginal error."""
        return sinkhorn(
            self.problem.cost(self.alpha, self.workspace),
            max_iterations=iterations,
            tolerance=tolerance,
            potential=self._potential,
            workspace=self.workspace,
            warn=False,
            **self._options,
        )

    def take(self, tolerance: float, iterations: int = ITERATIONS) -> TransportPlan:
        """Solve, and move the prototypes by a twentieth as in the paper."""
        plan = self.solve(tolerance, iterations)
        self.problem.prototypes.lerp_(plan.barycentres(self.problem.features), 0.05)
        self._potential = plan.potential
        return plan


def make_problem(source: Source, side: int, stride: int, channels: int, batch: int, per_cell: int) -> Problem:
    """Features of a batch, and prototypes that start at features of other images.

    Args:
        source: Source of the features.
        side: Height and width of the feature map.
        stride: Pixels per cell, 8 or 16.
        channels: Channels of the features.
        batch: Number of images in the batch.
        per_cell: Prototypes per cell.

    Returns:
        The problem.
    """
    grid = grid_coordinates(side, side)
    if source == "random":
        # A common feature at each cell plus noise, nonnegative as after a ReLU.
        common = torch.rand(1, side * side, channels)
        maps = (common + 0.5 * torch.randn(batch + per_cell, side * side, channels)).relu_()
    else:
        maps = picture_features(batch + per_cell, side * stride, LAYERS[stride]).flatten(2).mT
        # Multiplying by columns of an orthogonal matrix preserves lengths and angles.
        maps = maps @ torch.linalg.qr(torch.randn(max(channels, maps.shape[2]), maps.shape[2])).Q.T
    return Problem(maps[:batch].flatten(0, 1), maps[batch:].flatten(0, 1).clone(), grid, grid.repeat(per_cell, 1))


def picture_features(count: int, size: int, layer: str) -> Tensor:
    """Whitened features (count, D, H, W) of normal images of the embedded category at a size in pixels."""
    data = Assembly(Path("results/benchmark") / str(count), n_train=count)
    data.prepare_data()
    data.setup()
    maps = layer_features(data.train_data, layer, (size, size))
    return whitening_of(maps)(maps)


def peak_memory(device: str = "cpu") -> float:
    """Peak resident memory of this process, or its peak memory on a GPU, in GB."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def timed(function: Callable[[], T]) -> tuple[T, float]:
    """Result of a function and its wall time in seconds, including pending work of the GPU."""
    start = time.perf_counter()
    result = function()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
