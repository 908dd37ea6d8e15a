"""One training step of Pradot's transport against two of POT's solvers, in one run.

Run as ``python -m benchmarks.transport``. The paper's sizes: batch 64, 16 prototypes a cell, ε = 0.01, at most 100
iterations. The features are those of the embedded category's pictures (EfficientNet-Lite0, whitened as in training),
rotated into as many channels as asked for, which changes no cosine; or, as the worst case, random ones, of which no
kernel entry can be left out. The references solve the same cost matrix: ``sinkhorn_log``, which the authors' code uses
and which is finite for every ε, and ``sinkhorn``, the fastest alternative where it is finite. Each is timed over a few
iterations and its time for 100 is extrapolated, as it is linear in them. Our time includes
forming the matrix, theirs does not, and it is printed beside.
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
REFERENCES = ("sinkhorn_log", "sinkhorn")
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
    """Print the time of a step, its ratio to the reference's, and the peak of memory.

    Args:
        stride: Stride of the feature maps of pictures of 224 px.
        channels: Channels of the features.
        batch: Pictures in a step.
        per_cell: Prototypes in a cell.
        alpha: Weight of the spatial cost.
        source: Features of pictures, or random ones.
        reference_iterations: Iterations of the references to time; 0 leaves them out, where the matrix does not fit.
        memory: GiB that the solver may use.
        threads: Threads of torch.
        seed: Seed of all that is random.
        device: Where to solve, both ours and the reference: ``cpu`` or ``cuda``.
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
    dense, forming = timed(lambda: problem.cost(alpha)[:])
    print(f"POT's cost matrix: {forming:.3g} s, which its times leave out")
    for method in REFERENCES:
        an_iteration, whole, is_finite = time_reference(method, dense, reference_iterations)
        failed = "" if is_finite else ", whose plan is not finite"
        print(f"POT {method}: {an_iteration:.2g} s an iteration, {whole:.3g} s for {ITERATIONS}{failed}")
        print(f"ratio, same iterations: {whole / cold:.3g}; warm start and early stop: {whole / warm:.3g}")


def time_reference(method: str, dense: Tensor, iterations: int) -> tuple[float, float, bool]:
    """Time one of POT's solvers.

    Args:
        method: Its name in ``ot.bregman.sinkhorn``.
        dense: Cost matrix (N, P).
        iterations: Iterations to time, beyond the first.

    Returns:
        Seconds of an iteration and of as many as ours have, and whether the plan is finite.
    """
    uniform = [torch.full((size,), 1 / size, device=dense.device) for size in dense.shape]

    def solve(count: int) -> Tensor:
        return ot.bregman.sinkhorn(*uniform, dense, EPSILON, method=method, numItermax=count, stopThr=0.0, warn=False)

    solve(1)
    _, first = timed(lambda: solve(1))
    plan, more = timed(lambda: solve(1 + iterations))
    an_iteration = (more - first) / iterations
    return an_iteration, first + (ITERATIONS - 1) * an_iteration, bool(plan.isfinite().all())


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
