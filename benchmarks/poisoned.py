"""Effect of streams with many anomalous parts on Foct's online memory, on more images than a test can use.

Run as ``python -m benchmarks.poisoned``. Each stream is drawn from the test images of an embedded category with many
test images. All test images are then scored with the memory after the stream: before its last query, when the memory is
full, and after it, when the memory has been compressed.
"""

from itertools import product
from pathlib import Path
from tempfile import mkdtemp
from typing import get_args

import torch
from jsonargparse import auto_cli
from lightning.pytorch import seed_everything
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc

from anomalib_ot import Assembly, Foct
from anomalib_ot.offline import offline_backbone

from .few_shot import IMAGE_SIZE, Scorer, foct, support_images, test_set
from .side_by_side import LAYERS
from .stream import Order, draw
from .versions import versions


def main(
    queries: int = 40,
    shares: tuple[float, ...] = (0.1, 0.5, 0.9),
    shots: int = 4,
    supports: int = 4,
    images: int = 100,
    image_size: tuple[int, int] = IMAGE_SIZE,
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
        threads: Number of threads for torch.
    """
    torch.set_num_threads(threads)
    packages = versions("anomalib-ot", "anomalib", "torch")
    print(f"{packages}, {queries} queries, {3 * images} test images, {image_size}")
    backbone = offline_backbone()
    data = Assembly(Path(mkdtemp()), n_test=images)
    data.prepare_data()
    data.setup()
    features, labels, _ = test_set(data, backbone, 1, image_size)
    print("| support | anomalous | order | before | when full | at the end |\n| --- | --- | --- | --- | --- | --- |")
    lowest = 0.0
    for seed in range(supports):
        seed_everything(seed, verbose=False)
        # No part of this category is rotated, and rotated views would take most of the time.
        model = Foct(backbone, LAYERS, online=True, query_steps=5, rotations=1)
        score = foct(model, support_images(data, shots, seed, backbone, image_size))
        before, scores = detection(model, score, features, labels)
        for share, order in product(shares, get_args(Order)):
            model.model.reset()
            *most, last = draw(labels, scores, queries, share, order, seed)
            changes = []
            for part in (most, [last]):
                for index in part:
                    score(features[index][None].float())
                changes.append(detection(model, score, features, labels)[0] - before)
            lowest = min(lowest, *changes)
            print(
                f"| {seed} | {share:.0%} | {order} | {before:.1f} | {changes[0]:+.1f} | {changes[1]:+.1f} |", flush=True
            )
    print(f"Largest loss by a stream: {-lowest:.1f} points of image AUROC")


def detection(model: Foct, score: Scorer, features: list[Tensor], labels: Tensor) -> tuple[float, Tensor]:
    """Image AUROC of test images in percent, with a frozen memory, and their scores (N,)."""
    with model.frozen():
        scores = torch.stack([score(each[None].float()).amax() for each in features])
    return 100 * float(binary_auroc(scores, labels.long())), scores


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
