"""Effect of streams with many anomalous parts on Foct's online memory, on more images than a test can use.

Run as ``python -m benchmarks.poisoned``. Each stream is drawn from the test images of an embedded category with many
test images. All test images are then scored with the memory after the stream: before its last query, when the memory is
full, and after it, when the memory has been compressed.
"""

from itertools import product
from tempfile import mkdtemp
from typing import get_args

import torch
from jsonargparse import auto_cli

from anomalib_ot.features.given import on_features
from anomalib_ot.models.foct import FoctSettings

from .few_images import FOCT_SIZE, ONLINE, Features, TestImages, draw_images, fitted_model, foct_plan
from .stream import Order, detection, draw
from .versions import versions


def main(
    queries: int = 40,
    shares: tuple[float, ...] = (0.1, 0.5, 0.9),
    shots: int = 4,
    supports: int = 4,
    images: int = 100,
    image_size: tuple[int, int] = FOCT_SIZE,
    rotations: int = 1,
    online_rate: float = FoctSettings.online_rate,
    threads: int = 2,
) -> None:
    """Print the change of image AUROC for each support set and stream.

    Args:
        queries: Length of a stream.
        shares: Shares of the queries that are anomalous.
        shots: Number of support images.
        supports: Number of support sets.
        images: Test images of each kind: normal, logical and structural.
        image_size: Height and width that the images are resized to.
        rotations: Views of a support image. No part of this category is rotated, and more views take most of the time.
        online_rate: An image teaches if its p-value among the left-out views is above this rate.
        threads: Number of threads for torch.
    """
    torch.set_num_threads(threads)
    packages = versions("anomalib-ot", "anomalib", "torch")
    print(f"{packages}, {queries} queries, {3 * images} test images, {image_size}, online_rate {online_rate}")
    settings = {**ONLINE, "rotations": rotations, "online_rate": online_rate}
    plan = foct_plan({"Foct": settings}, shots, range(supports), image_size, root=mkdtemp(), n_test=images)
    jobs = plan.jobs()
    test = TestImages(draw_images(plan, jobs[0].key), Features(plan), every=1)
    print("| support | anomalous | order | before | when full | at the end |\n| --- | --- | --- | --- | --- | --- |")
    lowest = 0.0
    for job in jobs:
        seed = job.key.seed
        network = fitted_model(job, draw_images(plan, job.key))
        scorer = on_features(network, image_size)
        with network.frozen():
            before, scores = detection(scorer, test)
        for share, order in product(shares, get_args(Order)):
            network.reset()
            *most, last = draw(test.labels, scores, queries, share, order, seed)
            changes = []
            for part in (most, [last]):
                for index in part:
                    scorer(test.features[index])
                with network.frozen():
                    changes.append(detection(scorer, test)[0] - before)
            lowest = min(lowest, *changes)
            print(
                f"| {seed} | {share:.0%} | {order} | {before:.1f} | {changes[0]:+.1f} | {changes[1]:+.1f} |", flush=True
            )
    print(f"Largest loss by a stream: {-lowest:.1f} points of image AUROC")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
