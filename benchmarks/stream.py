"""A long stream of queries, some of them anomalous, through online Foct: AUROC, memory and time.

Run as ``python -m benchmarks.stream``. The queries are drawn with replacement from the test images of the embedded
category. At the end, the whole test set is scored with the memory after the stream and with the memory before it.
"""

import resource
import time
from typing import Literal

import torch
from jsonargparse import auto_cli
from lightning.pytorch import seed_everything
from torch import Tensor

from anomalib_ot import Foct
from anomalib_ot.offline import offline_backbone

from .categories import EMBEDDED, open_category
from .few_shot import IMAGE_SIZE, Scorer, foct, metrics, support_images, test_set
from .side_by_side import LAYERS

Order = Literal["mixed", "repeated", "worst_first"]


def main(
    queries: int = 1000,
    share: float = 0.5,
    order: Order = "mixed",
    shots: int = 4,
    block: int = 200,
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
        seed: Seed of the draws.
        threads: Number of threads for torch.
    """
    torch.set_num_threads(threads)
    backbone = offline_backbone()
    data = open_category(EMBEDDED)
    features, labels, masks = test_set(data, backbone, 1, IMAGE_SIZE)
    images = support_images(data, shots, seed, backbone, IMAGE_SIZE)
    scorers: dict[bool, tuple[Foct, Scorer]] = {}
    for online in (True, False):
        seed_everything(seed, verbose=False)
        model = Foct(backbone, LAYERS, online=online, query_steps=5 if online else 0)
        scorers[online] = (model, foct(model, images))
    before = torch.stack([scorers[False][1](each[None].float()) for each in features])
    stream = draw(labels, before.flatten(1).amax(1), queries, share, order, seed)
    for first in range(0, queries, block):
        part = stream[first : first + block]
        print(
            f"queries {first} to {first + len(part)}: {block_line(part, scorers, features, labels, masks)}", flush=True
        )
    online, score = scorers[True]
    with online.frozen():
        after = torch.stack([score(each[None].float()) for each in features])
    ours, frozen = (metrics(maps, labels, masks)["image_AUROC"] for maps in (after, before))
    print(
        f"{share:.0%} anomalous, {order}: image AUROC of the test set {ours:.1f} after, {frozen:.1f} before the stream"
    )


def block_line(
    part: list[int], scorers: dict[bool, tuple[Foct, Scorer]], features: list[Tensor], labels: Tensor, masks: Tensor
) -> str:
    """Image AUROC, time and memory of a block of queries, given by the indices of their images."""
    found = {}
    for online, (_, score) in scorers.items():
        start = time.perf_counter()
        maps = torch.stack([score(features[index][None].float()) for index in part])
        # Without both labels in a block, there is no AUROC.
        auroc = metrics(maps, labels[part], masks[part]).get("image_AUROC", float("nan"))
        found[online] = (auroc, 1000 * (time.perf_counter() - start) / len(part))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return (
        f"image AUROC {found[True][0]:.1f} online, {found[False][0]:.1f} offline; {found[True][1]:.0f} ms per query "
        f"online; {len(scorers[True][0].model.episodic.features)} episodic features; peak {peak:.2f} GiB"
    )


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
