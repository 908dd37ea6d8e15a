"""Bad parts among good training images: how many are named, and what they and their removal do to a model.

Run as ``python -m benchmarks.contamination --root DATA``; :func:`~benchmarks.categories.categories_in` describes DATA.
The embedded category needs no DATA. A folder is a draw of a category's good training images, of which a share is
replaced by anomalous test images. The features are those of WtFlow in ``configs/compare/real.yaml``, extracted once a
category. :func:`~anomalib_ot.inspection.contamination.find_suspects` then names images of the folder.

For the first draws, WtFlow is fitted with few steps to the good images of the folder alone (``clean``), to all of its
images (``mixed``) and to those that are not named (``cleaned``). Its image AUROC is that on the good test images and on
the anomalous ones that are in no folder.

The last lines tell whether all categories are one group, and how many pairs of categories are two.
"""

import logging
import shlex
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations, count
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jsonargparse import auto_cli
from lightning.pytorch import seed_everything
from numpy.typing import NDArray
from rich.progress import track
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.utils.data import Subset

from anomalib_ot.comparison import Key, Plan, read_plan
from anomalib_ot.features.store import FeatureDataset
from anomalib_ot.host.cross_fit import FoldFeatures
from anomalib_ot.inspection.contamination import find_groups, find_suspects
from anomalib_ot.models.wt_flow.training import fit_flow
from anomalib_ot.offline import offline_backbone

from .categories import EMBEDDED, categories_in
from .few_images import Features, draw_images
from .rows import appended, finished
from .versions import versions

KEY = ("category", "seed", "share")
_AUROCS = ("clean", "mixed", "cleaned")
FIELDS = (*KEY, "good", "bad", "named_good", "named_bad", *_AUROCS)
# Of the anomalous images, these are in folders, and the others in the test.
_IN_FOLDERS = 2
_BATCH = 16


def main(
    root: Path | None = None,
    output: Path = Path("results/contamination.csv"),
    categories: list[str] | None = None,
    shares: list[float] = [0.0, 0.02, 0.05, 0.1],  # noqa: B006 - jsonargparse shows the default, and nothing changes it
    seeds: int = 2,
    images: int = 100,
    tested: int = 60,
    fits: int = 1,
    steps: int = 20,
) -> None:
    """Measure all folders that are not in the output yet, and print the tables.

    Args:
        root: Folder of the categories.
        output: CSV file of the folders, continued if it exists.
        categories: Categories to run; all by default.
        shares: Shares of the anomalous images in a folder.
        seeds: Number of draws.
        images: Largest number of images in a folder.
        tested: Largest number of good and of anomalous test images, evenly spread.
        fits: Number of draws for which WtFlow is fitted.
        steps: Training steps of WtFlow.
    """
    command = shlex.join(["python", "-m", "benchmarks.contamination", *sys.argv[1:]])
    print(f"{command}\n{versions('anomalib-ot', 'anomalib', 'torch', 'timm')}, seeds 0 to {seeds - 1}", flush=True)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    found = categories_in(root)
    plan = read_plan("real", ["WtFlow"], [EMBEDDED], backbone=offline_backbone())
    plan = replace(plan, data={name: found[name] for name in categories or found})
    done = finished(output, KEY)
    known = {}
    with appended(output, FIELDS) as add:
        for category in plan.data:
            known[category] = Folders(plan, category, images, tested)
            for seed in range(seeds):
                wanted = [share for share in shares if (category, str(seed), str(share)) not in done]
                for share in wanted:
                    add(row_of(known[category], seed, share, steps if seed < fits else 0))
    print(table(pd.read_csv(output)))
    print(groups({name: each.maps[: each.good] for name, each in known.items()}))


class Folders:
    """Folders of a category, with the features of its images.

    Args:
        plan: The plan.
        category: Name of the category in it.
        images: Largest number of images in a folder.
        tested: Largest number of good and of anomalous test images.

    Attributes:
        maps: Feature maps (N, D, H, W) of the good training images, the anomalous images of folders, the good test
            images and the anomalous test images.
        good: Number of good training images.
    """

    def __init__(self, plan: Plan, category: str, images: int, tested: int) -> None:
        self.category, self.images, self.size = category, images, plan.image_size
        (job,) = (each for each in plan.jobs() if each.key.category == category and each.key.seed == 0)
        self.model: Any = job.create_model()
        (self.layer,) = job.model["init_args"]["layers"]
        data = draw_images(plan, Key(category, "", None, 0))
        labels = data.test_data.samples.label_index.to_numpy()
        good, anomalous = np.flatnonzero(labels == 0).tolist(), np.flatnonzero(labels == 1).tolist()
        parts = [
            (data.train_data, _spread(range(len(data.train_data)), 3 * images // 2)),
            (data.test_data, _spread(anomalous[::_IN_FOLDERS], images // 2)),
            (data.test_data, _spread(good, tested)),
            (data.test_data, _spread(anomalous[1::_IN_FOLDERS], tested)),
        ]
        features = Features(plan, [self.layer])
        items = [(dataset, index) for dataset, indices in parts for index in indices]
        self.maps = torch.cat(
            [features.of(dataset[index].image)[self.layer] for dataset, index in track(items, category)]
        )
        self.good, *rest = (len(indices) for _, indices in parts)
        self._ends = np.cumsum([self.good, *rest])

    def folder(self, seed: int, share: float) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Indices of the images of a folder, and which of them are anomalous."""
        random = np.random.default_rng(seed)
        good = random.permutation(self.good)[: self.images]
        anomalous = random.permutation(np.arange(self.good, self._ends[1]))[: round(share * len(good))]
        chosen = np.concatenate([good[len(anomalous) :], anomalous])
        return chosen, chosen >= self.good

    def auroc(self, training: Sequence[int], steps: int) -> float:
        """Image AUROC in percent of WtFlow, fitted to the maps of these indices."""
        seed_everything(0, workers=True, verbose=False)
        network = self.model.model.eval()
        features = FoldFeatures(
            Subset(FeatureDataset({self.layer: self.maps}), list(training)), _BATCH, torch.device("cpu")
        )
        fresh = type(network)(network.settings, network.feature_extractor).eval()
        fresh.fit_normalization(features.in_order())
        batches = (batch for number in count() for batch in features.epoch(number))
        fit_flow(fresh, batches, self.model.coupling, steps, self.model.hparams["learning_rate"])
        test = self.maps[self._ends[1] :]
        with torch.no_grad():
            scores = torch.cat([fresh.score({self.layer: part}, self.size).pred_score for part in test.split(_BATCH)])
        return 100 * float(roc_auc_score(np.arange(len(test)) >= self._ends[2] - self._ends[1], scores.numpy()))


def row_of(folders: Folders, seed: int, share: float, steps: int) -> dict[str, str]:
    """The row of a folder; with steps, WtFlow is fitted to it."""
    chosen, is_bad = folders.folder(seed, share)
    paths = [Path(str(index)) for index in chosen]
    named = np.isin(chosen, [int(each.path.name) for each in find_suspects(paths, folders.maps[chosen])])
    counts = {"good": ~is_bad, "bad": is_bad, "named_good": named & ~is_bad, "named_bad": named & is_bad}
    row = dict(zip(KEY, (folders.category, str(seed), str(share)), strict=True))
    row |= {name: str(int(each.sum())) for name, each in counts.items()}
    if steps:
        sets = (~is_bad, np.ones_like(is_bad), ~named)
        row |= {
            name: f"{folders.auroc(chosen[each].tolist(), steps):.2f}" for name, each in zip(_AUROCS, sets, strict=True)
        }
    return row


def table(runs: pd.DataFrame) -> str:
    """Named images and AUROC by category and share, and over all categories."""
    whole = runs.assign(category="all")
    lines = []
    for (category, share), own in pd.concat([runs, whole]).groupby(["category", "share"], sort=False):
        sums = own[["good", "bad", "named_good", "named_bad"]].sum()
        line = {
            "category": category,
            "bad %": 100 * share,
            "named": f"{sums.named_bad} of {sums.bad}",
            "good named %": 100 * sums.named_good / sums.good,
        }
        lines.append(line | own[[*_AUROCS]].mean().to_dict())
    return pd.DataFrame(lines).to_string(index=False, float_format="{:.1f}".format, na_rep="")


def groups(maps: dict[str, Tensor]) -> str:
    """Which categories are not one group, and which pairs of them are not two that divide the images correctly."""
    several = [name for name, own in maps.items() if len(find_groups(_names(own, name), own)) > 1]
    wrong = [
        f"{first} + {second}"
        for first, second in combinations(maps, 2)
        if not _divides([_names(maps[each], each) for each in (first, second)], [maps[first], maps[second]])
    ]
    return (
        f"Not one group: {', '.join(several) or 'none'} of {len(maps)}\n"
        f"Not two groups: {', '.join(wrong) or 'none'} of {len(maps) * (len(maps) - 1) // 2} pairs"
    )


def _divides(names: list[list[Path]], maps: list[Tensor]) -> bool:
    found = find_groups([*names[0], *names[1]], torch.cat(maps))
    return sorted(found) == sorted(names)


def _names(maps: Tensor, category: str) -> list[Path]:
    return [Path(category, f"{index:04}") for index in range(len(maps))]


def _spread(indices: Sequence[int], most: int) -> list[int]:
    """At most so many of the indices, evenly spread."""
    places = np.linspace(0, len(indices) - 1, min(most, len(indices))).round().astype(int)
    return [indices[place] for place in places]


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
