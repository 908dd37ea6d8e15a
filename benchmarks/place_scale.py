"""Whether a scale for each place of the anomaly map detects more at the same promised rate of false alarms.

Run as ``python -m benchmarks.place_scale --root DATA``; :func:`~benchmarks.categories.categories_in` describes DATA.
The embedded category needs no DATA. Good images may score higher at some places, such as edges, than at others. One
threshold for the whole map then misses defects at calm places. Instead, the map can be shifted and divided by the
centre and the spread of the maps of left-out training images at each place, before its maximum decides.

Duo is fitted to part of the good images of a category, as in :mod:`benchmarks.false_alarms`. The other good images and
the anomalous ones are halved. The variant with the highest detection rate on the first half, over all categories and
rates, is compared with the plain map on the second half.
"""

import logging
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from anomalib.models.components import GaussianBlur2d
from jsonargparse import auto_cli
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from anomalib_ot.comparison import Plan, read_plan
from anomalib_ot.models.duo.torch_model import PartScores
from anomalib_ot.offline import offline_backbone

from .calibrated import batches_of, fitted_with_folds, part_maps
from .categories import EMBEDDED, categories_in
from .false_alarms import GoodAndBad, Split, conformal
from .rows import appended, finished
from .versions import versions

RATES = (0.05, 0.1, 0.2)
KEY = ("category", "seed")
FIELDS = (*KEY, "model", "variant", "half", "rate", "false_alarms", "good", "detected", "anomalous")
PLAIN = "plain"
# Pixels along a side of a place.
_PLACE = 4
# Of the Gaussian that smooths the spread, in places.
_SMOOTHING = 2.0
_NORMAL = 1.4826

Variant = Callable[[Tensor], tuple[Tensor | float, Tensor | float]]


def _scaled(*, centred: bool, floor: float) -> Variant:
    """Centre and spread (1, 1, h, w) of left-out maps (n, 1, h, w); the spread is raised by a share of its mean."""

    def scale(maps: Tensor) -> tuple[Tensor | float, Tensor]:
        centre = maps.quantile(0.5, 0, keepdim=True)
        spread = _NORMAL * (maps - centre).abs().quantile(0.5, 0, keepdim=True)
        spread = GaussianBlur2d(_SMOOTHING)(spread)
        return centre if centred else 0.0, spread + floor * spread.mean()

    return scale


VARIANTS: dict[str, Variant] = {PLAIN: lambda _: (0.0, 1.0)} | {
    f"{'centre and ' if centred else ''}spread, floor {floor:g}": _scaled(centred=centred, floor=floor)
    for centred in (False, True)
    for floor in (0.3, 1.0, 3.0)
}


def main(
    root: Path | None = None,
    output: Path = Path("results/place_scale.csv"),
    categories: list[str] | None = None,
    seeds: int = 2,
) -> None:
    """Measure all variants on the same splits, and print the tables.

    Args:
        root: Folder of the categories.
        output: CSV file of the rows, continued if it exists.
        categories: Categories to run; all by default.
        seeds: Number of splits.
    """
    command = shlex.join(["python", "-m", "benchmarks.place_scale", *sys.argv[1:]])
    print(f"{command}\n{versions('anomalib-ot', 'anomalib', 'torch', 'timm')}, seeds 0 to {seeds - 1}", flush=True)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    found = categories_in(root)
    plan = read_plan("real", ["Duo"], [EMBEDDED], backbone=offline_backbone())
    plan = replace(plan, data={name: found[name] for name in categories or found})
    done = finished(output, KEY)
    with appended(output, FIELDS) as add:
        for category in plan.data:
            images = GoodAndBad(plan, category)
            for seed in range(seeds):
                if (category, str(seed)) not in done:
                    (split,) = images.splits(seed, [None])
                    for row in [*rows_of(plan, images, split)]:
                        add({name: str(row[name]) for name in FIELDS})
    print(table(pd.read_csv(output)))


def rows_of(plan: Plan, images: GoodAndBad, split: Split) -> Iterator[dict[str, object]]:
    """False alarms and detected images of each model, variant, half and rate on a split."""
    (job,) = (job for job in plan.jobs() if job.key.category == images.category and job.key.seed == 0)
    features = images.features_of(split.training)
    network, scored = fitted_with_folds(job, features, split.seed, lambda fitted: fitted.part_scores)
    network.weigh(scored, plan.image_size)

    def places(batches: list[PartScores]) -> dict[str, Tensor]:
        """Highest score (N, 1, h, w) of each place, of each model."""
        maps = [
            {"Duo": network.combine(each, plan.image_size).anomaly_map} | part_maps(network, each, plan.image_size)
            for each in batches
        ]
        return {name: torch.cat([F.max_pool2d(each[name], _PLACE) for each in maps]) for name in maps[0]}

    @torch.no_grad()
    def scored_places(indices: list[int]) -> dict[str, Tensor]:
        return places([network.part_scores(batch) for batch in batches_of(images.features_of(indices))])

    left_out, good, bad = places(scored), scored_places(split.tested), scored_places(split.anomalous)
    for name, maps in left_out.items():
        for variant, scale in VARIANTS.items():
            centre, spread = scale(maps)
            calibration, kept, found = (
                ((each - centre) / spread).flatten(1).amax(1).double().numpy() for each in (maps, good[name], bad[name])
            )
            for rate in RATES:
                limit, _ = conformal(calibration, rate)
                for half in (0, 1):
                    yield {
                        "category": images.category,
                        "seed": split.seed,
                        "model": name,
                        "variant": variant,
                        "half": half,
                        "rate": rate,
                        "false_alarms": int((kept[half::2] > limit).sum()),
                        "good": len(kept[half::2]),
                        "detected": int((found[half::2] > limit).sum()),
                        "anomalous": len(found[half::2]),
                    }


def table(rows: pd.DataFrame) -> str:
    """Detection on the first half by variant, and the best of them against the plain map on the second half."""
    shares = rows.assign(detected=100 * rows.detected / rows.anomalous, alarms=100 * rows.false_alarms / rows.good)
    first = shares[shares.half == 0].pivot_table(["detected", "alarms"], "variant", "model", sort=False)
    texts = [f"First half, mean over categories, splits and rates\n{first.to_string(float_format='{:.1f}'.format)}"]
    for model in shares.model.unique():
        best = first["detected"][model].drop(PLAIN).idxmax()
        own = shares[(shares.half == 1) & (shares.model == model) & shares.variant.isin([PLAIN, best])]
        second = own.pivot_table(["detected", "alarms"], ["category", "rate"], "variant", sort=False)
        texts.append(f"Second half, {model}\n{second.to_string(float_format='{:.1f}'.format)}")
    return "\n\n".join(texts)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
