"""Choice of a model without labels: synthetic against real image AUROC of each candidate.

Run as ``python -m benchmarks.selection --root DATA``; :func:`~benchmarks.categories.categories_in` describes DATA. Each
candidate of ``anomalib_ot.selection`` is tried as :func:`~anomalib_ot.selection.choose` tries it. The same fit, on at
most 60 good images, then scores the real test images, every n-th one so that there are at most 150.

A run takes about 4 minutes a category on one core, and the table is of all runs in the output. Options select a part.
"""

import json
import math
import warnings
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
from anomalib.data import AnomalibDataModule
from jsonargparse import auto_cli

from anomalib_ot.files import write_text
from anomalib_ot.host.class_paths import create
from anomalib_ot.offline import offline_backbone
from anomalib_ot.selection import CANDIDATES
from anomalib_ot.selection.choosing import layers_at
from anomalib_ot.selection.trial import image_auroc, run_trial, scores_of
from anomalib_ot.selection.trial_features import TrialFeatures, divide
from anomalib_ot.synthetic.images import read_reduced

from .categories import categories_in
from .versions import versions

_MOST_TESTED = 150
_SEED = 0


def main(
    root: Path | None = None,
    output: Path = Path("results/selection"),
    categories: list[str] | None = None,
    sides: list[int] = [224, 336],  # noqa: B006 - jsonargparse shows the default, and nothing changes it
) -> None:
    """Measure what is missing in the output, and print the tables.

    Args:
        root: Folder of the categories.
        output: Folder with a JSON file for each run, continued if it exists.
        categories: Categories to run; all by default, none for the tables alone.
        sides: Image sizes to run, in pixels.
    """
    print(f"{versions('anomalib-ot', 'anomalib', 'torch', 'timm')}, seed {_SEED}", flush=True)
    warnings.simplefilter("ignore")
    found = categories_in(root)
    for category in found if categories is None else categories:
        for side in sides:
            measure(category, create(AnomalibDataModule, found[category]), (side, side), output)
    print_tables(pd.DataFrame(rows(output)))


def measure(category: str, data: AnomalibDataModule, image_size: tuple[int, int], output: Path) -> None:
    """Measure the candidates of an image size that the output lacks on a category."""
    files = {each: output / f"{category} {each.name}.json".replace("/", "-") for each in CANDIDATES}
    missing = [each for each in CANDIDATES if each.image_size == image_size and not files[each].exists()]
    if not missing:
        return
    data.prepare_data()
    data.setup()
    backbone = offline_backbone()
    division = divide([Path(path) for path in data.train_data.samples.image_path], _SEED)
    features = TrialFeatures(division, backbone, image_size, layers_at(image_size, CANDIDATES, backbone), _SEED)
    samples = data.test_data.samples
    tested = samples.iloc[:: math.ceil(len(samples) / _MOST_TESTED)]
    test = features.of((read_reduced(Path(path)) for path in tested.image_path), len(tested))
    is_anomalous = tested.label_index.to_numpy() == 1
    output.mkdir(parents=True, exist_ok=True)
    for candidate in missing:
        outcome = run_trial(candidate, features, _SEED)
        scores = scores_of(outcome.score, test)
        run = {
            "category": category,
            "trial": outcome.trial(features).to_dict(),
            "real": image_auroc(scores[~is_anomalous], scores[is_anomalous]),
            "tested": len(tested),
            "good": outcome.good.tolist(),
            "synthetic": outcome.synthetic.tolist(),
            "labels": features.labels,
        }
        write_text(files[candidate], json.dumps(run))
        print(category, candidate.name, f"synthetic {run['trial']['mean']:.1f}, real {run['real']:.1f}", flush=True)


def rows(output: Path) -> Iterator[dict[str, object]]:
    """Category, candidate, real AUROC, and synthetic AUROC by kind, of each run."""
    for path in sorted(output.glob("*.json")):
        run = json.loads(path.read_text(encoding="utf-8"))
        trial = run["trial"]
        yield {
            "category": run["category"],
            "candidate": trial["candidate"]["name"],
            "real": run["real"],
            "mean": trial["mean"],
            **trial["auroc"],
        }


def print_tables(runs: pd.DataFrame) -> None:
    """Print the synthetic and the real AUROC, the rank correlation by kind, and the regret of each rule."""
    print(runs.round(1).to_string(index=False))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
