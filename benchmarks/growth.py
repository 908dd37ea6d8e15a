"""Growth of time and memory of a training step with images, prototypes and resolution, as a plot.

Run as ``python -m benchmarks.growth``, on Linux. Beside ours is POT's ``sinkhorn``, which takes the same steps: it
starts from the scalings of the last one, and iterates as often as ours. Each point is measured in a separate process.
The memory is the peak of the first step minus the memory before it. The slope is that of a line through the points on
logarithmic axes, so that 1 means proportional growth.
"""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from math import log
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import matplotlib as mpl
import torch
from jsonargparse import auto_cli
from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator, StrMethodFormatter
from numpy import polyfit

from anomalib_ot.transport import Workspace

from .steps import EPSILON, Problem, Steps
from .transport import make_problem
from .watch import added_memory, timed

# Batch size, prototypes per cell and pixels; one of them varies at a time.
BASE = {"images in a batch": 32, "prototypes a cell": 8, "pixels a side": 224}
SERIES = {
    "images in a batch": (16, 32, 64, 128),
    "prototypes a cell": (4, 8, 16, 32),
    "pixels a side": (160, 224, 320, 448),
}
STRIDE = 16
CHANNELS = 112
ALPHA = 0.3
TOLERANCE = 0.1
WARM_STEPS = 5
SOLVERS = {"ours": "-o", "POT sinkhorn": "--s"}


def main(output: Path = Path("docs/growth.png"), threads: int = 2, seed: int = 0) -> None:
    """Measure, print and draw.

    Args:
        output: Figure to write.
        threads: Number of threads for torch.
        seed: Random seed.
    """
    mpl.use("Agg")
    figure, axes = plt.subplots(1, len(SERIES), figsize=(12, 4))
    for axis, (name, values) in zip(axes, SERIES.items(), strict=True):
        points = [measure({**BASE, name: value}, threads, seed) for value in values]
        for solver, style in SOLVERS.items():
            for label, index, unit, colour in (("time of a step", 0, "s", "C0"), ("memory", 1, "GB", "C1")):
                found = [point[solver][index] for point in points]
                slope = polyfit([log(value) for value in values], [log(value) for value in found], 1)[0]
                axis.loglog(values, found, style, color=colour, label=f"{solver}, {label} in {unit}, slope {slope:.1f}")
                numbers = [round(each, 3) for each in found]
                print(f"{name} {values}: {solver}, {label} {numbers} {unit}, slope {slope:.2f}", flush=True)
        axis.set(xlabel=name, xticks=values, xticklabels=values)
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.minorticks_off()
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(output, dpi=80)
    plt.close(figure)


def measure(sizes: dict[str, int], threads: int, seed: int) -> dict[str, tuple[float, float]]:
    """Mean seconds of a warm step, and memory in GB, of each solver in a new process without extracted features."""
    batch, per_cell, pixels = sizes.values()
    torch.manual_seed(seed)
    problem = make_problem("pictures", pixels // STRIDE, STRIDE, CHANNELS, batch, per_cell)
    found = {}
    with TemporaryDirectory() as folder:
        path = Path(folder) / "problem.pt"
        problem.save(path)
        iterations: list[int] = []
        for solver in SOLVERS:
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                *found[solver], iterations = pool.submit(_measure, solver, path, threads, iterations).result()
    return found


def _measure(solver: str, path: Path, threads: int, iterations: list[int]) -> tuple[float, float, list[int]]:
    """Seconds, memory, and our numbers of iterations, which the other solver is given."""
    torch.set_num_threads(threads)
    problem = Problem.load(path)
    taken: list[int] = []
    if solver == "ours":
        steps = Steps(problem, ALPHA, Workspace())

        def take() -> None:
            taken.append(steps.take(TOLERANCE).iterations)
    else:
        take = _steps_of_pot(problem, iterations)
    memory = added_memory(take) / 1e3
    seconds = [timed(take)[1] for _ in range(WARM_STEPS)]
    return sum(seconds) / len(seconds), memory, taken


def _steps_of_pot(problem: Problem, iterations: list[int]) -> Callable[[], None]:
    """Steps by POT's solver with these numbers of iterations."""
    from ot.bregman import sinkhorn  # noqa: PLC0415 - takes seconds, and our process does not need it

    sides = problem.features, problem.prototypes
    weights = [torch.full((len(each),), 1 / len(each)) for each in sides]
    remaining, start = iter(iterations), None

    def take() -> None:
        nonlocal start
        options = {"numItermax": next(remaining), "stopThr": 0, "warn": False, "warmstart": start, "log": True}
        plan, found = sinkhorn(*weights, problem.matrix(ALPHA), EPSILON, **options)
        start = found["u"].log(), found["v"].log()
        problem.prototypes.lerp_(plan.T @ problem.features * len(problem.prototypes), 0.05)

    return take


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
