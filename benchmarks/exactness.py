"""Effect of the solver's approximations on transport cost and image AUROC, compared with a dense solver.

Run as ``python -m benchmarks.exactness --root DATA``, with DATA as for ``configs/compare/real.yaml``. Prototypes of one
layer and one α are trained on the same batches with two schedules: that of the paper (random start, η = 0.95) and the
default (start at features, lower η in the first steps). Each schedule is run with

- POT's log-domain solver on the dense cost matrix in float64, with 100 iterations from a cold start;
- our solver with 100 iterations per step, from the potentials of the previous step;
- our solver, stopping at the default marginal error.

The sizes are small enough for the reference: one prototype per cell and batches of 16.
"""

import time
from collections.abc import Callable
from itertools import product
from math import ceil
from pathlib import Path
from statistics import fmean

import torch
from anomalib.data import AnomalibDataModule
from jsonargparse import auto_cli
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc

from anomalib_ot.models.pradot import PradotSettings
from anomalib_ot.models.pradot.prototypes import Prototypes
from anomalib_ot.transport import FusedCost, grid_coordinates, sinkhorn

from .categories import open_category
from .features import layer_features, whitening_of
from .side_by_side import IMAGE_SIZE

LAYER = "blocks.4"
PER_CELL = 1
BATCH = 16
ITERATIONS = 100
Step = Callable[[Prototypes, Tensor], float]


def main(
    root: Path,
    categories: tuple[str, ...] = ("tray", "magnetic_tile"),
    images: int = 200,
    epochs: int = 10,
    alpha: float = 0.3,
    threads: int = 2,
    seed: int = 0,
) -> None:
    """Print transport costs and image AUROC.

    Args:
        root: Folder of the categories.
        categories: Categories to run.
        images: Maximum number of training images.
        epochs: Passes over the training images. After ten, the start contributes less than 2 % at η = 0.95.
        alpha: Weight of the spatial cost.
        threads: Number of threads for torch.
        seed: Random seed.
    """
    torch.set_num_threads(threads)
    schedules = {"paper": {"initialisation": "normal", "ema_warm_up": False}, "default": {}}
    solvers = {
        "dense": (dense_step, {}),
        "engine, 100 iterations": (engine_step, {"sinkhorn_tolerance": 0.0}),
        "engine, default stop": (engine_step, {}),
    }
    for category in categories:
        train, test, labels = features_of(open_category(category, root), images)
        print(f"{category}: {len(train)} training images, {epochs} epochs, seed {seed}")
        for (schedule, start), (solver, (step, stop)) in product(schedules.items(), solvers.items()):
            torch.manual_seed(seed)
            prototypes = Prototypes(PER_CELL, alpha, PradotSettings(**start, **stop))
            began = time.perf_counter()
            costs = fit(prototypes, train, step, epochs, seed)
            seconds = time.perf_counter() - began
            final = fmean(costs[-ceil(len(train) / BATCH) :])
            with torch.no_grad():
                scores = prototypes(test).flatten(1).amax(1)
            auroc = 100 * float(binary_auroc(scores, labels))
            print(f"  {schedule:8}{solver:24}cost {final:.5f}, image AUROC {auroc:.1f}, {seconds:.0f} s")
            # Transport cost after 1, 2, 4, … steps.
            curve = ", ".join(f"{2**k}: {costs[2**k - 1]:.4f}" for k in range(len(costs).bit_length()))
            print(f"{'':34}{curve}", flush=True)


def features_of(data: AnomalibDataModule, images: int) -> tuple[Tensor, Tensor, Tensor]:
    """Whitened features of training and test images, and the labels of the test images."""
    normal = [data.train_data[index] for index in range(min(images, len(data.train_data)))]
    tested = list(data.test_data)
    train, test = (layer_features(items, LAYER, IMAGE_SIZE) for items in (normal, tested))
    whitening = whitening_of(train)
    return whitening(train), whitening(test), torch.tensor([int(item.gt_label) for item in tested])


def fit(prototypes: Prototypes, train: Tensor, step: Step, epochs: int, seed: int) -> list[float]:
    """Transport cost of each step; the batches depend only on the seed."""
    generator = torch.Generator().manual_seed(seed)
    prototypes.initialise(train[:BATCH])
    batches = (part for _ in range(epochs) for part in torch.randperm(len(train), generator=generator).split(BATCH))
    return [step(prototypes, train[part]) for part in batches]


def engine_step(prototypes: Prototypes, features: Tensor) -> float:
    """A step of training."""
    return prototypes.update(features).transport_cost()


@torch.no_grad()
def dense_step(prototypes: Prototypes, features: Tensor) -> float:
    """A step of the paper with POT's solver, on the dense cost matrix."""
    grid = grid_coordinates(*features.shape[-2:])
    embeddings = features.permute(0, 2, 3, 1).flatten(0, 2)
    settings = prototypes.settings
    cost = FusedCost(embeddings, prototypes.features, grid, prototypes.coordinates, prototypes.alpha, settings.spatial)
    plan = sinkhorn(cost, settings.epsilon, ITERATIONS, 0, method="reference")
    prototypes.move(plan.barycentres(embeddings).float())
    return plan.transport_cost()


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
