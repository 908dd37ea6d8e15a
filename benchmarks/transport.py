"""Entropic transport at the sizes of Pradot's training compared with other solvers, on Linux.

Run as ``python -m benchmarks.transport``. The default size is that of the paper: batches of 64, 16 prototypes per cell,
ε = 0.01. The features come from images of the embedded category (EfficientNet-Lite0, whitened as in training) and are
rotated into the requested number of channels, which changes no cosine. As the worst case, they are random, and no
kernel entry can be omitted.

All solvers have the same cost matrix. Times include forming it. Ours stop at the tolerance. The updates of most other
solvers are those of Sinkhorn, so each of these is given exactly the iterations that our plain iterations need for the
same marginal error, without tests of a stop rule, and 100 iterations. A time above the limit is extrapolated from a few
iterations, in which it is linear. geomloss and the accelerated forms of OTT-JAX stop by their own rules; a note says if
they do not reach the tolerance, the error of both marginals together. Each number of iterations runs once before it is
timed, because OTT-JAX compiles it. The solvers of a library have a process of their own. They run alternately, and the
fastest of the repeats counts.

The memory is the peak that a solver adds to that of its features and prototypes, in a process of its own. Two rows are
limits: the product of features and prototypes, and one read of its result.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal
from unittest.mock import patch

import torch
from jsonargparse import auto_cli
from torch import Tensor

from anomalib_ot import Assembly
from anomalib_ot.transport import grid_coordinates

from .features import layer_features, whitening_of
from .peers import PEERS
from .rows import appended
from .solvers import COLD, OURS, PLAIN, PRODUCT, READ, Case, Precision, measure, prepare, weigh
from .steps import EPSILON, Problem

Source = Literal["pictures", "random"]
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
    "memory_mb",
    "note",
)
# Makes the C library return freed memory at once, so that all memory that a solver uses is counted.
RETURNED_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536"}


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
    precision: Precision = "highest",
    output: Path = Path("results/transport.csv"),
) -> None:
    """Print and save the time and the memory of each solver in each case.

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
        memory: Memory for our solver in GiB.
        threads: Number of threads for torch.
        seed: Random seed.
        device: Device for all solvers: ``cpu`` or ``cuda``.
        precision: Argument of ``torch.set_float32_matmul_precision``: ``medium`` computes products in bfloat16 if the
            processor supports it. Models are trained in full precision regardless of this setting.
        output: CSV file to append to.
    """
    names = [*OURS, *(name for name in PEERS if solvers is None or name in solvers)]
    with (
        appended(output, COLUMNS) as add,
        solving(names, threads, precision) as processes,
        TemporaryDirectory() as folder,
    ):
        for source in sources or ["pictures"]:
            for width in channels or [128]:
                for images, per_cell in sizes or [(64, 16)]:
                    torch.manual_seed(seed)
                    problem = make_problem(source, 224 // stride, stride, width, images, per_cell)
                    path = Path(folder) / f"{source}-{width}-{images}-{per_cell}.pt"
                    problem.save(path)
                    for alpha in alphas or [0.3]:
                        for epsilon in epsilons or [EPSILON]:
                            keys = {"rows": len(problem.features), "columns": len(problem.prototypes)}
                            keys |= {"channels": width, "source": source, "alpha": alpha, "epsilon": epsilon}
                            case = Case(path, alpha, epsilon, tolerance, seconds, memory, device)
                            for row in rows_of(case, names, processes, repeats):
                                add(keys | row)


@contextmanager
def solving(names: list[str], threads: int, precision: Precision) -> Iterator[dict[str, ProcessPoolExecutor]]:
    """A process for the solvers of each library, and one, named ``memory``, to measure their memory."""
    libraries = {library(name): {} for name in names} | {"memory": RETURNED_AT_ONCE}
    with ExitStack() as stack:
        processes = {}
        for each, variables in libraries.items():
            pool = ProcessPoolExecutor(1, get_context("spawn"), prepare, (threads, precision))
            processes[each] = stack.enter_context(pool)
            # The process starts with its first call.
            with patch.dict(os.environ, variables):
                pool.submit(torch.get_num_threads).result()
        yield processes


def library(name: str) -> str:
    """The first word of the name of a solver or a limit."""
    return "ours" if name in OURS else name.split(maxsplit=1)[0].rstrip(",")


def rows_of(
    case: Case, names: list[str], processes: dict[str, ProcessPoolExecutor], repeats: int
) -> list[dict[str, Any]]:
    """A row for each solver."""

    def measured(name: str, needed: int = 0) -> dict[str, Any]:
        return processes[library(name)].submit(measure, name, case, needed).result()

    # The first use compiles the loops and maps memory.
    measured(COLD)
    needed = measured(PLAIN)["iterations"]
    rows: dict[str, dict[str, Any]] = {}
    for _ in range(repeats):
        for name in names:
            if rows.get(name, {}).get("note"):
                continue  # it is extrapolated or failed
            row = measured(name, needed)
            before = rows.get(name, row)
            fastest = {key: min(row[key], before[key]) for key in ("to_tolerance_s", "hundred_s") if key in row}
            rows[name] = {"solver": name} | row | fastest
    for name, row in rows.items():
        if name not in (PRODUCT, READ) and "to_tolerance_s" in row:
            row["memory_mb"] = processes["memory"].submit(weigh, name, case).result()
    return [
        {key: f"{value:.3g}" if isinstance(value, float) else value for key, value in row.items()}
        for row in rows.values()
    ]


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


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
