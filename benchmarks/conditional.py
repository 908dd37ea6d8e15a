"""Conditional transport of the paper compared with ours: time and memory per query, and image AUROC.

Run as ``python -m benchmarks.conditional``. The literal form builds the tensor of all squared differences, fits the
navigator to each query for 100 steps at a learning rate of 1e-4, and uses all features. The factored form gives the
same scores (the tests compare gradients), so its AUROC stands for that of the literal form.
"""

import resource
import time
from collections.abc import Callable
from typing import Any

import torch
from anomalib.metrics import AUROC
from jsonargparse import auto_cli
from lightning.pytorch import seed_everything
from torch import Tensor

from anomalib_ot import Foct
from anomalib_ot.offline import offline_backbone
from anomalib_ot.transport import Navigator

from .categories import EMBEDDED, open_category
from .few_shot import IMAGE_SIZE, foct, metrics, support_images, test_set
from .side_by_side import LAYERS

_PAPER = {"navigator_start": "random", "support_steps": 0, "query_steps": 100, "learning_rate": 1e-4}
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "online": {"online": True, "query_steps": 5},
    "paper, factored": {**_PAPER, "fit_features": 0, "tolerance": 0.0},
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
    backbone = offline_backbone()
    data = open_category(EMBEDDED)
    features, labels, masks = test_set(data, backbone, 1, IMAGE_SIZE)
    images = support_images(data, shots, seed, backbone, IMAGE_SIZE)
    seconds: dict[str, float] = {}
    for name, settings in SETTINGS.items():
        seed_everything(seed, verbose=False)
        score = foct(Foct(backbone, LAYERS, **settings), images)
        maps, seconds[name] = timed(score, [each[None].float() for each in features])
        print(row(name, seconds[name], metrics(maps, labels, masks)["image_AUROC"]), flush=True)
    model = Foct(backbone, LAYERS, **SETTINGS["paper, factored"])
    for navigator in (model.model.navigator, model.model.support_navigator):
        navigator.__class__ = LiteralNavigator
    score = foct(model, images)
    _, seconds["paper, literal"] = timed(score, [each[None].float() for each in features[:literal_queries]])
    print(row("paper, literal", seconds["paper, literal"], None))
    print(", ".join(f"{seconds['paper, literal'] / seconds[name]:.0f} x faster: {name}" for name in SETTINGS))


def timed(score: Callable[[Tensor], Tensor], features: list[Tensor]) -> tuple[Tensor, float]:
    """Maps of all features, and the mean seconds per map."""
    start = time.perf_counter()
    maps = torch.stack([score(each) for each in features])
    return maps, (time.perf_counter() - start) / len(features)


def row(name: str, seconds: float, auroc: float | None) -> str:
    """A line of the table, with the peak memory of the process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    shown = "" if auroc is None else f"image {AUROC.__name__} {auroc:.1f}, "
    return f"{name:16} {shown}{seconds:.3f} s per query without the backbone, peak {peak:.2f} GiB"


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
