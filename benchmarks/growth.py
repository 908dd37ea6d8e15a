"""Growth of time and memory of a training step with images, prototypes and resolution, as a plot.

Run as ``python -m benchmarks.growth``, on Linux. Each point is measured in a separate process. The memory is the peak
minus the memory before the first step. The slope is that of a line through the points on logarithmic axes, so that 1
means proportional growth.
"""

from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from math import log
from multiprocessing import get_context
from pathlib import Path
from resource import getpagesize
from tempfile import TemporaryDirectory

import matplotlib as mpl
import torch
from jsonargparse import auto_cli
from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator, StrMethodFormatter
from numpy import polyfit

from anomalib_ot.transport import Workspace

from .transport import Problem, Steps, make_problem, timed
from .watch import watched

# Batch size, prototypes per cell and pixels; one of them varies at a time.
BASE = {"images in a batch": 32, "prototypes a cell": 8, "pixels a side": 224}
SERIES = {
    "images in a batch": (16, 32, 64, 128),
    "prototypes a cell": (4, 8, 16, 32),
    "pixels a side": (160, 224, 320, 448),
}
STRIDE = 16
CHANNELS = 112
WARM_STEPS = 5


def main(output: Path = Path("docs/growth.png"), threads: int = 2, seed: int = 0) -> None:
    """Measure, print and draw.

    Args:
        output: Figure to write.
        threads: Number of threads for torch.
        seed: Random seed.
    """
    mpl.use("Agg")
    figure, axes = plt.subplots(1, len(SERIES), figsize=(12, 3.6))
    for axis, (name, values) in zip(axes, SERIES.items(), strict=True):
        points = [measure({**BASE, name: value}, threads, seed) for value in values]
        for label, index, unit in (("time of a step", 0, "s"), ("memory", 1, "GB")):
            ours = [point[index] for point in points]
            slope = polyfit([log(value) for value in values], [log(value) for value in ours], 1)[0]
            axis.loglog(values, ours, marker="o", label=f"{label} in {unit}, slope {slope:.1f}")
            print(f"{name} {values}: {label} {[round(each, 3) for each in ours]} {unit}, slope {slope:.2f}", flush=True)
        axis.set(xlabel=name, xticks=values, xticklabels=values)
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.minorticks_off()
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(output, dpi=80)
    plt.close(figure)


def measure(sizes: dict[str, int], threads: int, seed: int) -> tuple[float, float]:
    """Mean seconds of a warm step, and memory in GB, in a new process that has not extracted features."""
    batch, per_cell, pixels = sizes.values()
    torch.manual_seed(seed)
    problem = make_problem("pictures", pixels // STRIDE, STRIDE, CHANNELS, batch, per_cell)
    with TemporaryDirectory() as folder, ProcessPoolExecutor(1, get_context("spawn")) as pool:
        path = Path(folder) / "problem.pt"
        torch.save(asdict(problem), path)
        return pool.submit(_measure, path, threads).result()


def _measure(path: Path, threads: int) -> tuple[float, float]:
    torch.set_num_threads(threads)
    steps = Steps(Problem(**torch.load(path)), 0.3, Workspace())
    with watched(resident, 0.002) as readings:
        steps.take(0.1)
        seconds = [timed(lambda: steps.take(0.1))[1] for _ in range(WARM_STEPS)]
    return sum(seconds) / len(seconds), max(readings) - readings[0]


def resident() -> float:
    """Resident memory of this process, in GB; Linux only."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * getpagesize() / 1e9


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
