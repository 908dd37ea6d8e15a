"""A long stream of queries, some of them anomalous, through online Foct: AUROC, memory and time.

Run as ``python -m benchmarks.stream``. The queries are drawn with replacement from the test images of the embedded
category. At the end, the whole test set is scored with the memory after the stream and with the memory before it.
"""

import resource
import time
from collections.abc import Sequence
from typing import Literal

import torch
from jsonargparse import auto_cli
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc

from anomalib_ot.features.given import Scorer, on_features
from anomalib_ot.models.foct import FoctSettings

from .few_images import ONLINE, Features, TestImages, draw_images, fitted_model, foct_plan

Order = Literal["mixed", "repeated", "worst_first"]


def main(
    queries: int = 1000,
    share: float = 0.5,
    order: Order = "mixed",
    shots: int = 4,
    block: int = 200,
    online_rate: float = FoctSettings.online_rate,
    seed: int = 0,
    threads: int = 2,
) -> None:
    """Print a line for each block of queries, and one for the test set after the stream.

    Args:
        queries: Length of the stream.
        share: Share of the queries that are anomalous.
        order: ``mixed`` is a random order. ``repeated`` is mixed too, but all anomalous queries are the same image,
            that with the lowest score before the stream. ``worst_first`` has the anomalous queries before the others,
            by increasing score.
        shots: Number of support images.
        block: Number of queries per line.
        online_rate: An image teaches if its p-value among the left-out views is above this rate.
        seed: Seed of the draws.
        threads: Number of threads for torch.
    """
    torch.set_num_threads(threads)
    plan = foct_plan({"online": {**ONLINE, "online_rate": online_rate}, "offline": {}}, shots, [seed])
    jobs = {job.key.model: job for job in plan.jobs()}
    data = draw_images(plan, jobs["online"].key)
    test = TestImages(data, Features(plan), every=1)
    networks = {name: fitted_model(job, data) for name, job in jobs.items()}
    scorers = {name: on_features(network, plan.image_size) for name, network in networks.items()}
    before, scores = detection(scorers["offline"], test)
    stream = draw(test.labels, scores, queries, share, order, seed)
    for first in range(0, queries, block):
        part = stream[first : first + block]
        found = {name: timed(scorer, test, part) for name, scorer in scorers.items()}
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(
            f"queries {first} to {first + len(part)}: image AUROC {found['online'][0]:.1f} online, "
            f"{found['offline'][0]:.1f} offline; {1000 * found['online'][1]:.0f} ms per query online; "
            f"{len(networks['online'].episodic.features)} episodic features; peak {peak:.2f} GiB",
            flush=True,
        )
    with networks["online"].frozen():
        after, _ = detection(scorers["online"], test)
    print(
        f"{share:.0%} anomalous, {order}: image AUROC of the test set {after:.1f} after, {before:.1f} before the stream"
    )


def detection(scorer: Scorer, test: TestImages, indices: Sequence[int] | None = None) -> tuple[float, Tensor]:
    """Image AUROC in percent and scores (N,) of queries.

    Args:
        scorer: The model.
        test: The test images.
        indices: Indices of the images to query, in order; each test image once by default.

    Returns:
        The AUROC, NaN if all images are good or all are anomalous, and the scores.
    """
    chosen = range(len(test.features)) if indices is None else indices
    scores = torch.stack([scorer(test.features[index])[0] for index in chosen])
    labels = test.labels[[*chosen]]
    if labels.all() or not labels.any():
        return float("nan"), scores
    return 100 * float(binary_auroc(scores, labels.long())), scores


def timed(scorer: Scorer, test: TestImages, indices: Sequence[int] | None = None) -> tuple[float, float]:
    """Image AUROC of queries as in :func:`detection`, and the mean seconds per query."""
    start = time.perf_counter()
    auroc, scores = detection(scorer, test, indices)
    return auroc, (time.perf_counter() - start) / len(scores)


def draw(labels: Tensor, scores: Tensor, queries: int, share: float, order: Order, seed: int) -> list[int]:
    """Indices of the images to query, from the labels (N,) and scores (N,) of all images."""
    generator = torch.Generator().manual_seed(seed)
    count = round(share * queries)
    bad, good = (
        pictures[torch.randint(len(pictures), (size,), generator=generator)]
        for pictures, size in ((labels.nonzero()[:, 0], count), ((~labels).nonzero()[:, 0], queries - count))
    )
    if order == "worst_first":
        return torch.cat([bad[scores[bad].argsort()], good]).tolist()
    if order == "repeated" and count:
        bad = bad[scores[bad].argmin()].expand(count)
    return torch.cat([bad, good])[torch.randperm(queries, generator=generator)].tolist()


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
