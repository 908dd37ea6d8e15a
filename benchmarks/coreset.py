"""Time of anomalib's PatchCore with a coreset that is too large to select here, extrapolated from a part.

Run as ``python -m benchmarks.coreset --root DATA``, on an otherwise idle machine. Each selection is one pass over all
features and takes the same time, so the time of all selections follows from that of some. The time of scoring does not
depend on which features are in the memory bank, so it is measured with random features of the training set.
"""

from pathlib import Path
from typing import cast

import torch
from anomalib.models import Patchcore
from anomalib.models.components.sampling import KCenterGreedy
from jsonargparse import auto_cli
from torch.utils.data import DataLoader

from anomalib_ot.comparison.measurement import seconds_per_image
from anomalib_ot.offline import offline_backbone

from .categories import open_category
from .side_by_side import models
from .versions import versions
from .watch import peak_memory, timed


def main(
    root: Path | None = None, category: str = "screw", selections: int = 100, threads: int = 2, seed: int = 0
) -> None:
    """Print the times of extraction, selection and scoring.

    Args:
        root: Folder of the real categories.
        category: Category of the training images.
        selections: Number of selections to time.
        threads: Number of threads for torch.
        seed: Random seed.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    print(f"{versions('anomalib', 'torch')}, {threads} threads, seed {seed}")
    model = cast("Patchcore", models(offline_backbone())["PatchCore"]())
    data = open_category(category, root)
    _, extraction = timed(lambda: extract(model, data.train_dataloader()))
    sampler = KCenterGreedy(torch.vstack(model.model.embedding_store), model.coreset_sampling_ratio)
    model.model.embedding_store.clear()
    count = sampler.n_observations
    print(f"{category}: {len(data.train_data)} images, {count} features, extracted in {extraction:.0f} s")
    size = sampler.coreset_size
    _, first = timed(lambda: select(sampler, 1))
    _, more = timed(lambda: select(sampler, 1 + selections))
    each = (more - first) / selections
    whole = first + (size - 1) * each
    print(f"a selection takes {1000 * each:.0f} ms, {size} of them {whole / 60:.0f} min; peak {peak_memory():.1f} GB")
    model.model.memory_bank = sampler.embedding[torch.randperm(count)[:size]]
    print(f"scoring an image takes {1000 * seconds_per_image(model, torch.device('cpu')):.0f} ms")


@torch.no_grad()
def extract(model: Patchcore, batches: DataLoader) -> None:
    """Let the model collect the features of the training images."""
    model.train()
    for batch in batches:
        model.model(model.pre_processor.transform(batch.image))


def select(sampler: KCenterGreedy, count: int) -> None:
    """Select ``count`` features from an empty coreset, including the projection of all features."""
    sampler.coreset_size = count
    sampler.select_coreset_idxs()


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
