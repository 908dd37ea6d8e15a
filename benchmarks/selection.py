"""Choice of a model without labels: synthetic against real image AUROC of each candidate.

Run as ``python -m benchmarks.selection --root DATA``; :func:`~benchmarks.categories.categories_in` describes DATA. Each
candidate of ``anomalib_ot.selection`` is tried as :func:`~anomalib_ot.selection.choose` tries it. The same fit, on at
most 60 good images, then scores the real test images, every n-th one so that there are at most 100.

The five candidates at 224 px take about 7 minutes a category on one core. The table is of all runs in the output.
Options select a part.
"""

import json
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from anomalib.data import AnomalibDataModule
from jsonargparse import auto_cli
from numpy.typing import NDArray

from anomalib_ot.features.store import FeatureDataset
from anomalib_ot.files import write_text
from anomalib_ot.host.class_paths import create
from anomalib_ot.offline import offline_backbone
from anomalib_ot.selection import CANDIDATES, Candidate, on_backbones
from anomalib_ot.selection.choosing import files_for
from anomalib_ot.selection.trial import image_auroc, run_trial, scores_of
from anomalib_ot.selection.trial_features import TrialFeatures, trial_set
from anomalib_ot.synthetic import KINDS

from .categories import categories_in
from .versions import versions

_MOST_TESTED = 100
_SEED = 0
_MARGINS = (0.0, 0.5, 1.0, 2.0, 3.0, 5.0, 100.0)
# Of the nine categories; the others choose the margin.
_HELD_OUT = 4


def main(
    root: Path | None = None,
    output: Path = Path("results/selection"),
    categories: list[str] | None = None,
    candidates: list[str] | None = None,
) -> None:
    """Measure what is missing in the output, and print the tables.

    Args:
        root: Folder of the categories.
        output: Folder with a JSON file for each run, continued if it exists.
        categories: Categories to run; all by default, none for the tables alone.
        candidates: Names of the candidates to run; all by default.
    """
    print(f"{versions('anomalib-ot', 'anomalib', 'torch', 'timm')}, seed {_SEED}", flush=True)
    warnings.simplefilter("ignore")
    found = categories_in(root)
    chosen = [each for each in all_candidates() if candidates is None or each.name in candidates]
    sizes = dict.fromkeys(each.image_size for each in chosen)
    for size, category in product(sizes, found if categories is None else categories):
        same = [each for each in chosen if each.image_size == size]
        files = {output / f"{category} {each.name}.json".replace("/", "-"): each for each in same}
        if missing := {path: each for path, each in files.items() if not path.exists()}:
            measure(category, create(AnomalibDataModule, found[category]), missing, output)
    print_tables(pd.DataFrame(rows(output)))


def all_candidates() -> list[Candidate]:
    """The candidates on the offline backbone."""
    return on_backbones(CANDIDATES, [offline_backbone()])


def measure(category: str, data: AnomalibDataModule, missing: dict[Path, Candidate], output: Path) -> None:
    """Measure candidates of the same image size on a category, and write their files to a folder."""
    output.mkdir(parents=True, exist_ok=True)
    image_size = next(iter(missing.values())).image_size
    with kept_features(category, data, image_size, output) as (features, test, is_anomalous):
        for path, candidate in missing.items():
            outcome = run_trial(candidate, features, _SEED)
            scores = scores_of(outcome.score, test)
            run = {
                "category": category,
                "trial": outcome.trial(features).to_dict(),
                "real": image_auroc(scores[~is_anomalous], scores[is_anomalous]),
                "tested": len(test),
                "good": outcome.good.tolist(),
                "synthetic": outcome.synthetic.tolist(),
                "labels": features.labels,
            }
            write_text(path, json.dumps(run))
            print(category, candidate.name, f"synthetic {run['trial']['mean']:.1f}, real {run['real']:.1f}", flush=True)


@contextmanager
def kept_features(
    category: str, data: AnomalibDataModule, image_size: tuple[int, int], output: Path
) -> Iterator[tuple[TrialFeatures, FeatureDataset, NDArray[np.bool_]]]:
    """Features of the trials and of the test images, and which of these are anomalous.

    They are kept beside the runs until the runs that need them are finished, for those that are interrupted.
    """
    kept = output / f"features-{category.replace('/', '-')}-{image_size[0]}.pt"
    if not kept.exists():
        data.prepare_data()
        data.setup()
        files = files_for([each for each in all_candidates() if each.image_size == image_size])
        images = trial_set([Path(path) for path in data.train_data.samples.image_path], _SEED)
        samples = data.test_data.samples
        tested = samples.iloc[:: math.ceil(len(samples) / _MOST_TESTED)]
        test = files.of([*map(Path, tested.image_path)])
        features = TrialFeatures.extracted(images, files)
        torch.save((features, test, tested.label_index.to_numpy() == 1), kept.with_suffix(".part"))
        kept.with_suffix(".part").replace(kept)
    yield torch.load(kept, weights_only=False)
    kept.unlink()


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
    """Print the AUROC of each run, the rank correlation by kind, and the regret of each rule, in points.

    The regret is the real AUROC of the best candidate minus that of the chosen one.
    """
    real, synthetic = (runs.pivot_table(value, "category", "candidate", sort=False) for value in ("real", "mean"))
    for title, table in (("Real AUROC", real), ("Mean synthetic AUROC", synthetic)):
        print(f"\n{title}\n{table.round(1).to_string()}")
    print(
        f"\nRank correlation of synthetic and real AUROC over the candidates\n{correlations(runs).round(2).to_string()}"
    )
    regrets = real.rsub(real.max(axis=1), axis=0)
    print(f"\nRegret\n{pd.DataFrame([*rule_rows(regrets, synthetic)]).round(2).to_string(index=False)}")
    # Too few categories cannot choose a margin for others.
    for default in real if len(real) > _HELD_OUT else ():
        print(
            f"margin from the other categories, default {default}: {held_out_regret(regrets, synthetic, default):.2f}"
        )


def correlations(runs: pd.DataFrame) -> pd.DataFrame:
    """Spearman's correlation by category (rows) and kind of defect (columns), with its mean."""
    kinds = [*KINDS, "mean"]
    table = runs.groupby("category", sort=False)[[*kinds, "real"]].apply(
        lambda own: own[kinds].corrwith(own["real"], method="spearman")
    )
    return pd.concat([table, table.mean().to_frame("mean of categories").T])


def rule_rows(regrets: pd.DataFrame, synthetic: pd.DataFrame) -> Iterator[dict[str, object]]:
    """Mean and largest regret over the categories of each rule."""
    rules = {f"always {name}": regrets[name] for name in regrets} | {"a random candidate": regrets.mean(axis=1)}
    for default, margin in product(regrets, _MARGINS):
        rules[f"{default}, or what exceeds it by {margin:g}"] = chosen_regrets(regrets, synthetic, default, margin)
    for rule, values in rules.items():
        yield {"rule": rule, "mean": values.mean(), "largest": values.max()}


def chosen_regrets(regrets: pd.DataFrame, synthetic: pd.DataFrame, default: str, margin: float) -> pd.Series:
    """Regret by category of the best synthetic AUROC if it exceeds that of the default by more than a margin."""
    best = synthetic.idxmax(axis=1)
    chosen = best.where(synthetic.max(axis=1) > synthetic[default] + margin, default)
    return pd.Series({category: regrets.loc[category, name] for category, name in chosen.items()})


def held_out_regret(regrets: pd.DataFrame, synthetic: pd.DataFrame, default: str) -> float:
    """Mean regret on four categories of the margin with the lowest regret on the others, over all divisions."""
    by_margin = pd.DataFrame({each: chosen_regrets(regrets, synthetic, default, each) for each in _MARGINS})
    found = []
    for held_out in combinations(by_margin.index, _HELD_OUT):
        margin = by_margin.drop(index=[*held_out]).mean().idxmin()
        found.append(by_margin.loc[[*held_out], margin].mean())
    return sum(found) / len(found)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
