"""One training step of Pradot's transport against two solvers of POT, in one run.

Run as ``python -m benchmarks.transport``. The paper's sizes: batch 64, 16 prototypes a cell, ε = 0.01, at most 100
iterations. The features are those of the embedded category's pictures (EfficientNet-Lite0, whitened as in training),
rotated into as many channels as asked for, which changes no cosine; or, as the worst case, random ones, of which no
kernel entry can be left out. The references solve the same cost matrix, as float32 tensors of torch: ``sinkhorn_log``,
the solver of the paper's code, in the log domain; and the plain ``sinkhorn``, the fastest alternative, which needs an
exp(−M / ε) that does not underflow. The plain one is timed whole, with and without forming the matrix. The other is
timed over a few iterations and its time for 100 is extrapolated, as it is linear in them; forming the matrix is in our
time, not in its.
"""

import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar

import ot
import torch
from jsonargparse import auto_cli
from torch import Tensor

from anomalib_ot import Assembly
from anomalib_ot.transport import FusedCost, TransportPlan, Workspace, grid_coordinates, sinkhorn

from .features import layer_features, whitening_of

T = TypeVar("T")
Source = Literal["pictures", "random"]
EPSILON = 0.01
ITERATIONS = 100
LAYERS = {8: "blocks.2", 16: "blocks.4"}


@dataclass
class Problem:
    """Features (B·N, C) of a batch, prototypes (P, C), and the coordinates of both, (N, 2) and (P, 2)."""

    features: Tensor
    prototypes: Tensor
    grid: Tensor
    coordinates: Tensor

    def to(self, device: str) -> "Problem":
        """The problem on a device; a copy of what moves."""
        features, prototypes, grid, coordinates = (
            part.to(device) for part in (self.features, self.prototypes, self.grid, self.coordinates)
        )
        return Problem(features, prototypes.clone(), grid, coordinates)

    def cost(self, alpha: float, workspace: Workspace | None = None) -> FusedCost:
        """The cost matrix."""
        return FusedCost(
            self.features, self.prototypes, self.grid, self.coordinates, alpha, "euclidean", workspace=workspace
        )


def main(
    stride: int = 16,
    channels: int = 1024,
    batch: int = 64,
    per_cell: int = 16,
    alpha: float = 0.3,
    source: Source = "pictures",
    reference_iterations: int = 3,
    memory: float = 2.0,
    threads: int = 2,
    seed: int = 0,
    device: str = "cpu",
    precision: Literal["highest", "high", "medium"] = "highest",
) -> None:
    """Print the time of a step, its ratio to those of the references, and the peak of memory.

    Args:
        stride: Stride of the feature maps of pictures of 224 px.
        channels: Channels of the features.
        batch: Pictures in a step.
        per_cell: Prototypes in a cell.
        alpha: Weight of the spatial cost.
        source: Features of pictures, or random ones.
        reference_iterations: Iterations of ``sinkhorn_log`` to time; 0 leaves out both references, where their matrix
            does not fit.
        memory: GiB that the solver may use.
        threads: Threads of torch.
        seed: Seed of all that is random.
        device: Where to solve, both ours and the references: ``cpu`` or ``cuda``.
        precision: What ``torch.set_float32_matmul_precision`` allows: ``medium`` forms products in bfloat16 where the
            processor has it. Models are trained in full precision all the same.
    """
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)
    torch.manual_seed(seed)
    problem = make_problem(source, 224 // stride, stride, channels, batch, per_cell).to(device)
    rows, columns = len(problem.features), len(problem.prototypes)
    where = f"{threads} threads" if device == "cpu" else torch.cuda.get_device_name()
    print(f"cost matrix {rows} x {columns}, {channels} channels of {source}, {where}, seed {seed}")
    # The loops are compiled on first use, and kept on disk; a few pictures do. A device prepares for each size anew.
    part = replace(problem, features=problem.features[: 4 * rows // batch]) if device == "cpu" else problem
    _, compiled = timed(lambda: Steps(part.to(device), alpha, Workspace(memory * 2**30)).take(0.0))
    print(f"first use: {compiled:.1f} s")
    before = peak_memory(device)
    steps = Steps(problem, alpha, Workspace(memory * 2**30))
    plan, cold = timed(lambda: steps.take(0.0))
    form = type(plan.kernel).__name__
    print(f"ours, {plan.iterations} iterations: {cold:.3g} s, marginal error {plan.marginal_error:.1e}, {form}")
    plan, warm = timed(lambda: steps.take(1e-3))
    print(f"ours, warm: {plan.iterations} iterations, {warm:.3g} s, marginal error {plan.marginal_error:.1e}")
    print(f"peak memory: {peak_memory(device):.2f} GB, before the first step {before:.2f} GB")
    if not reference_iterations:
        return
    time_references(problem, alpha, cold, warm, reference_iterations)


def time_references(problem: Problem, alpha: float, cold: float, warm: float, log_iterations: int) -> None:
    """Print the times of POT's two solvers on the same matrix, and their ratios to ours.

    Args:
        problem: Features and prototypes.
        alpha: Weight of the spatial cost.
        cold: Seconds of our step from nothing.
        warm: Seconds of our warm step.
        log_iterations: Iterations of ``sinkhorn_log`` to time.
    """
    dense, forming = timed(lambda: problem.cost(alpha)[:])
    uniform = [torch.full((size,), 1 / size, device=dense.device) for size in dense.shape]

    def reference(method: str, iterations: int) -> Tensor:
        return ot.bregman.sinkhorn(
            *uniform, dense, EPSILON, method=method, numItermax=iterations, stopThr=0.0, warn=False
        )

    reference("sinkhorn", 1)
    plan, plain = timed(lambda: reference("sinkhorn", ITERATIONS))
    error = float((plan.sum(0) - uniform[1]).abs().sum())
    print(
        f"POT sinkhorn, {str(dense.dtype).removeprefix('torch.')} tensors: {plain:.3g} s for {ITERATIONS}, "
        f"{plain + forming:.3g} s with the cost, marginal error {error:.1e}"
    )
    print(
        f"ratio, the cost in both: {(plain + forming) / cold:.1f}; warm start and early stop: "
        f"{(plain + forming) / warm:.1f}"
    )
    del plan
    reference("sinkhorn_log", 1)
    _, first = timed(lambda: reference("sinkhorn_log", 1))
    _, more = timed(lambda: reference("sinkhorn_log", 1 + log_iterations))
    an_iteration = (more - first) / log_iterations
    whole = first + (ITERATIONS - 1) * an_iteration
    print(f"POT sinkhorn_log: {an_iteration:.2g} s an iteration, {whole:.3g} s for {ITERATIONS}")
    print(f"ratio, same iterations: {whole / cold:.0f}; warm start and early stop: {whole / warm:.0f}")


class Steps:
    """Successive training steps on one batch.

    Args:
        problem: Features and prototypes; the prototypes move.
        alpha: Weight of the spatial cost.
        workspace: Memory of the solver.
    """

    def __init__(self, problem: Problem, alpha: float, workspace: Workspace) -> None:
        self.problem = problem
        self.alpha = alpha
        self.workspace = workspace
        self._potential: Tensor | None = None

    def take(self, tolerance: float) -> TransportPlan:
        """Solve down to a marginal error and move the prototypes by a twentieth, as the paper does."""
        cost = self.problem.cost(self.alpha, self.workspace)
        plan = sinkhorn(cost, EPSILON, ITERATIONS, tolerance, self._potential, workspace=self.workspace, warn=False)
        self.problem.prototypes.lerp_(plan.barycentres(self.problem.features), 0.05)
        self._potential = plan.potential
        return plan


def make_problem(source: Source, side: int, stride: int, channels: int, batch: int, per_cell: int) -> Problem:
    """Features of a batch and prototypes that start at features of other pictures.

    Args:
        source: Where the features come from.
        side: Height and width of the feature map.
        stride: Pixels for a cell, 8 or 16.
        channels: Channels of the features.
        batch: Pictures in the batch.
        per_cell: Prototypes in a cell.

    Returns:
        The problem.
    """
    grid = grid_coordinates(side, side)
    if source == "random":
        # A common feature at each cell and some noise, not negative, as after a ReLU.
        common = torch.rand(1, side * side, channels)
        maps = (common + 0.5 * torch.randn(batch + per_cell, side * side, channels)).relu_()
    else:
        maps = picture_features(batch + per_cell, side * stride, LAYERS[stride]).flatten(2).mT
        # Columns of an orthogonal matrix: lengths and angles stay.
        maps = maps @ torch.linalg.qr(torch.randn(max(channels, maps.shape[2]), maps.shape[2])).Q.T
    return Problem(maps[:batch].flatten(0, 1), maps[batch:].flatten(0, 1).clone(), grid, grid.repeat(per_cell, 1))


def picture_features(count: int, size: int, layer: str) -> Tensor:
    """Whitened features (count, D, H, W) of normal pictures of the embedded category at a size in pixels."""
    data = Assembly(Path("results/benchmark") / str(count), n_train=count)
    data.prepare_data()
    data.setup()
    maps = layer_features(data.train_data, layer, (size, size))
    return whitening_of(maps)(maps)


def peak_memory(device: str = "cpu") -> float:
    """Largest resident memory of this process so far, or what it took of a device at most, in GB."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def timed(function: Callable[[], T]) -> tuple[T, float]:
    """Result of a function and its wall time in seconds, until the device is done."""
    start = time.perf_counter()
    result = function()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
