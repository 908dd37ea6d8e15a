"""A long stream of queries, half of them anomalous, through Foct online: AUROC, memory and time as it goes on.

Run as ``python -m benchmarks.stream``. The queries are drawn with repetition from the embedded category's test images.
"""

import resource
import time

import torch
from jsonargparse import auto_cli
from lightning.pytorch import seed_everything

from anomalib_ot import Foct
from anomalib_ot.offline import offline_backbone

from .categories import EMBEDDED, open_category
from .few_shot import LAYERS, foct, metrics, support_images, test_set


def main(queries: int = 1000, shots: int = 4, block: int = 200, seed: int = 0, threads: int = 2) -> None:
    """Print a line for each block of queries.

    Args:
        queries: Length of the stream.
        shots: Number of support images.
        block: Queries in a line.
        seed: Seed of the draws.
        threads: Threads of torch.
    """
    torch.set_num_threads(threads)
    backbone = offline_backbone()
    data = open_category(EMBEDDED)
    features, labels, masks = test_set(data, backbone, 1)
    images = support_images(data, shots, seed, backbone)
    generator = torch.Generator().manual_seed(seed)
    groups = [(labels == label).nonzero()[:, 0] for label in (False, True)]
    sides = torch.randint(2, (queries,), generator=generator).tolist()
    stream = [int(groups[side][torch.randint(len(groups[side]), (1,), generator=generator)]) for side in sides]
    scorers = {}
    for online in (True, False):
        seed_everything(seed, verbose=False)
        model = Foct(backbone, LAYERS, online=online, query_steps=5 if online else 0)
        scorers[online] = (model, foct(model, images))
    for first in range(0, queries, block):
        part = stream[first : first + block]
        found = {}
        for online, (_, score) in scorers.items():
            start = time.perf_counter()
            maps = torch.stack([score(features[i][None].float()) for i in part])
            auroc = metrics(maps, labels[part], masks[part])["image_AUROC"]
            found[online] = (auroc, 1000 * (time.perf_counter() - start) / len(part))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(
            f"queries {first} to {first + len(part)}: image AUROC {found[True][0]:.1f} online, {found[False][0]:.1f} "
            f"not; {found[True][1]:.0f} ms a query online; {len(scorers[True][0].model.episodic.features)} features "
            f"remembered; peak {peak:.2f} GiB",
            flush=True,
        )


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
