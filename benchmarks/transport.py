"""One training step of Pradot's transport compared with two solvers of POT.

Run as ``python -m benchmarks.transport``. The sizes are those of the paper: batches of 64, 16 prototypes per cell,
ε = 0.01, at most 100 iterations. The features come from images of the embedded category (EfficientNet-Lite0, whitened
as in training) and are rotated into the requested number of channels, which changes no cosine. As the worst case, they
are random, and no kernel entry can be omitted.

The references solve the same cost matrix as float32 tensors of torch. ``sinkhorn_log``, the solver of the paper's code,
works in the log domain. The plain ``sinkhorn`` is the fastest alternative, but exp(−M / ε) must not underflow. All
iterations of the plain solver are timed, with and without forming the matrix. ``sinkhorn_log`` is timed over a few
iterations, and its time for 100 is extrapolated, because it is linear in the iterations. Our time includes forming the
matrix, that of ``sinkhorn_log`` does not.
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
        """The problem on a device, with a copy of the prototypes, which move."""
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
    """Print the time of a step, the ratios of the references to it, and the peak memory.

    Args:
        stride: Stride of the feature maps of images of 224 px.
        channels: Channels of the features.
        batch: Number of images in a step.
        per_cell: Prototypes per cell.
        alpha: Weight of the spatial cost.
        source: Features of images (``pictures``) or random features.
        reference_iterations: Iterations of ``sinkhorn_log`` to time; 0 skips both references, for example if their
            matrix does not fit.
        memory: Memory for the solver in GiB.
        threads: Number of threads for torch.
        seed: Random seed.
        device: Device for our solver and the references: ``cpu`` or ``cuda``.
        precision: Argument of ``torch.set_float32_matmul_precision``: ``medium`` computes products in bfloat16 if the
            processor supports it. Models are trained in full precision regardless of this setting.
    """
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)
    torch.manual_seed(seed)
    problem = make_problem(source, 224 // stride, stride, channels, batch, per_cell).to(device)
    rows, columns = len(problem.features), len(problem.prototypes)
    where = f"{threads} threads" if device == "cpu" else torch.cuda.get_device_name()
    print(f"cost matrix {rows} x {columns}, {channels} channels of {source}, {where}, seed {seed}")
    # The first use compiles the loops and caches them on disk, for which a few images are enough. A GPU prepares for
    # each size separately.
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
        cold: Seconds of our step from a cold start.
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
    print(f"POT sinkhorn_log: {an_iteration:.2g} s per iteration, {whole:.3g} s for {ITERATIONS}")
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
        """Solve to a marginal error, and move the prototypes by a twentieth as in the paper."""
        cost = self.problem.cost(self.alpha, self.workspace)
        plan = sinkhorn(cost, EPSILON, ITERATIONS, tolerance, self._potential, workspace=self.workspace, warn=False)
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
