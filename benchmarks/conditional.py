"""Conditional transport of the paper compared with ours: time and memory per query, and image AUROC.

Run as ``python -m benchmarks.conditional``. The literal form builds the tensor of all squared differences, fits the
navigator to each query for 100 steps at a learning rate of 1e-4, and uses all features. The factored form gives the
same scores (the tests compare gradients), so its AUROC stands for that of the literal form.
"""

import resource
from typing import Any

import torch
from anomalib.metrics import AUROC
from jsonargparse import auto_cli
from torch import Tensor

from anomalib_ot.features.given import on_features
from anomalib_ot.transport import Navigator

from .few_images import ONLINE, Features, TestImages, draw_images, fitted_model, foct_plan
from .stream import timed

_PAPER = {"navigator_start": "random", "support_steps": 0, "query_steps": 100, "learning_rate": 1e-4}
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "online": ONLINE,
    "paper, factored": {**_PAPER, "fit_features": 0, "tolerance": 0.0, "detail_weight": 0.0},
}


class LiteralNavigator(Navigator):
    """The navigator as two linear layers on all squared differences."""

    def forward(self, memory: Tensor, query: Tensor) -> Tensor:
        """d_φ of all pairs, (M, N)."""
        squares = (query[..., :, None, :] - memory[..., None, :, :]) ** 2
        return (squares @ self.weight.mT + self.bias).relu() @ self.out


def main(shots: int = 1, seed: int = 0, literal_queries: int = 2, threads: int = 2) -> None:
    """Print a table.

    Args:
        shots: Number of support images.
        seed: Seed of the draw.
        literal_queries: Number of queries to time the literal form on.
        threads: Number of threads for torch.
    """
    torch.set_num_threads(threads)
    plan = foct_plan(SETTINGS, shots, [seed])
    jobs = plan.jobs()
    data = draw_images(plan, jobs[0].key)
    test = TestImages(data, Features(plan), every=1)
    seconds: dict[str, float] = {}
    for job in jobs:
        network = fitted_model(job, data)
        scorer = on_features(network, plan.image_size)
        auroc, seconds[job.key.model] = timed(scorer, test)
        print(row(job.key.model, seconds[job.key.model], auroc), flush=True)
    # The last network is the paper's.
    for navigator in (network.navigator, network.support_navigator):
        navigator.__class__ = LiteralNavigator
    _, seconds["paper, literal"] = timed(scorer, test, range(literal_queries))
    print(row("paper, literal", seconds["paper, literal"], None))
    print(", ".join(f"{seconds['paper, literal'] / seconds[name]:.0f} x faster: {name}" for name in SETTINGS))


def row(name: str, seconds: float, auroc: float | None) -> str:
    """A line of the table, with the peak memory of the process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    shown = "" if auroc is None else f"image {AUROC.__name__} {auroc:.1f}, "
    return f"{name:16} {shown}{seconds:.3f} s per query without the backbone, peak {peak:.2f} GiB"


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
