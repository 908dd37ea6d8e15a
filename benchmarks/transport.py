"""One training step of Pradot's transport against POT's log-domain solver, in one run.

Run as ``python -m benchmarks.transport``. Random features of the paper's sizes: batch 64, 16 prototypes a cell,
ε = 0.01, at most 100 iterations. The reference solves the same cost matrix. It is timed over a few iterations and its
time for 100 is extrapolated, as it is linear in them; forming the matrix is in our time, not in the reference's.
"""

import resource
import sys
import time
from collections.abc import Callable
from typing import TypeVar

import ot
import torch
from jsonargparse import auto_cli
from torch import Tensor

from anomalib_ot.transport import FusedCost, TransportPlan, Workspace, grid_coordinates, sinkhorn

T = TypeVar("T")
EPSILON = 0.01
ITERATIONS = 100


def main(
    stride: int = 16,
    channels: int = 1024,
    batch: int = 64,
    per_cell: int = 16,
    alpha: float = 0.3,
    reference_iterations: int = 3,
    memory: float = 2.0,
    threads: int = 2,
    seed: int = 0,
) -> None:
    """Print the time of a step, its ratio to the reference's, and the peak of memory.

    Args:
        stride: Stride of the feature maps of pictures of 224 px.
        channels: Channels of the features.
        batch: Pictures in a step.
        per_cell: Prototypes in a cell.
        alpha: Weight of the spatial cost.
        reference_iterations: Iterations of the reference to time; 0 leaves it out, where its matrix does not fit.
        memory: GiB that the solver may use.
        threads: Threads of torch.
        seed: Seed of the features.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    side = 224 // stride
    grid = grid_coordinates(side, side)
    # Normal pictures of one product: a common feature at each cell and some noise, not negative, as after a ReLU.
    common = torch.rand(side * side, channels)
    features = (common + 0.5 * torch.randn(batch, side * side, channels)).relu_().flatten(0, 1)
    prototypes = (common + 0.5 * torch.randn(per_cell, side * side, channels)).relu_().flatten(0, 1)
    coordinates = grid.repeat(per_cell, 1)

    workspace = Workspace(memory * 2**30)

    def step(tolerance: float, potential: Tensor | None = None) -> tuple[TransportPlan, Tensor]:
        cost = FusedCost(features, prototypes, grid, coordinates, alpha, "euclidean", workspace=workspace)
        plan = sinkhorn(cost, EPSILON, ITERATIONS, tolerance, potential, workspace=workspace)
        return plan, plan.barycentres(features)

    print(f"cost matrix {len(features)} x {len(prototypes)}, {channels} channels, {threads} threads, seed {seed}")
    (plan, barycentres), cold = timed(lambda: step(0.0))
    print(f"ours, {plan.iterations} iterations: {cold:.2f} s, marginal error {plan.marginal_error:.1e}")
    # The next step of a training: prototypes moved by a twentieth towards their barycentres.
    prototypes.lerp_(barycentres, 0.05)
    (warm_plan, _), warm = timed(lambda: step(1e-3, plan.potential))
    print(f"ours, warm: {warm_plan.iterations} iterations, {warm:.2f} s, marginal error {warm_plan.marginal_error:.1e}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(f"peak memory of the process: {peak / 1e9:.1f} GB")

    if not reference_iterations:
        return
    dense = FusedCost(features, prototypes, grid, coordinates, alpha, "euclidean")[:]
    uniform = [torch.full((size,), 1 / size) for size in dense.shape]

    def reference(iterations: int) -> Tensor:
        return ot.bregman.sinkhorn(
            *uniform, dense, EPSILON, method="sinkhorn_log", numItermax=iterations, stopThr=0.0, warn=False
        )

    _, first = timed(lambda: reference(1))
    _, more = timed(lambda: reference(1 + reference_iterations))
    an_iteration = (more - first) / reference_iterations
    whole = first + (ITERATIONS - 1) * an_iteration
    print(f"POT sinkhorn_log: {an_iteration:.2f} s an iteration, {whole:.0f} s for {ITERATIONS}")
    print(f"ratio, same iterations: {whole / cold:.0f}; warm start and early stop: {whole / warm:.0f}")


def timed(function: Callable[[], T]) -> tuple[T, float]:
    """Result of a function and its wall time in seconds."""
    start = time.perf_counter()
    result = function()
    return result, time.perf_counter() - start


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
