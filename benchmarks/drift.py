"""Delay until the drift monitor raises an alarm, and its false alarms on streams of good images.

Run as ``python -m benchmarks.drift --root DATA``; :func:`~benchmarks.categories.categories_in` describes DATA. The
embedded category needs no DATA. Part of the good images trains the model, and the others are scored as they are and
after each change. Streams draw these scores with replacement: good images, followed by changed ones.

Each row is a model, a source of its calibration scores and a change:

``held out``
    Calibration scores that are drawn like the good images of the stream, for which the promise is exact.
``folds``
    Scores of the training images that each fold left out. Only higher scores are watched.
``stream``
    No calibration: the images of the stream are compared with one another.

The model ``appearance`` is none: it stands for the brightness and the sharpness of the images, which ``anomalib-ot
monitor`` watches too, each with a quarter of the rate.

With the change ``none``, all images are good. With ``n % anomalous``, a share of all images is anomalous.
"""

import logging
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from jsonargparse import auto_cli
from torch import Tensor
from torch.nn.functional import pad
from torchvision.transforms.v2 import functional as transforms

from anomalib_ot.comparison import Plan, read_plan
from anomalib_ot.comparison.report.tables import Cell, Table
from anomalib_ot.decide import DriftMonitor
from anomalib_ot.monitor.appearance import appearance_of
from anomalib_ot.monitor.course import SCORE
from anomalib_ot.monitor.watching import PARTS
from anomalib_ot.offline import offline_backbone

from .calibrated import Numbers
from .categories import EMBEDDED, categories_in
from .false_alarms import GoodAndBad, Split, fitted
from .rows import appended, finished
from .versions import versions

APPEARANCE = "appearance"
FIELDS = ("category", "model", "calibration", "change", "streams", "alarms", "early", "delay")
SHARES = (0.01, 0.02, 0.05, 0.1)
# Images before a change, and at most after it.
_BEFORE = 500
_AFTER = 1000
_CALIBRATION = 100
# Scores that streams with anomalous images are drawn from, repeated to the share.
_POOL = 10_000


def brighter(image: Tensor, share: float) -> Tensor:
    """An image (3, h, w) in [0, 1] with more light, or less for a negative share."""
    return (image * (1 + share)).clamp(0, 1)


def shifted(image: Tensor, pixels: int) -> Tensor:
    """An image (3, h, w) moved to the right; its left column fills the gap."""
    return pad(image[None], (pixels, 0, 0, 0), mode="replicate")[0, :, :, : image.shape[-1]]


def blurred(image: Tensor, deviation: float) -> Tensor:
    """An image (3, h, w) out of focus: a Gaussian of this standard deviation in pixels."""
    return transforms.gaussian_blur(image, 4 * round(deviation) + 1, deviation)


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    **{f"brightness {share:+.0%}": partial(brighter, share=share) for share in (0.05, -0.05, 0.1, -0.1, 0.2, -0.2)},
    "blur 1 px": partial(blurred, deviation=1.0),
    "shift 2 px": partial(shifted, pixels=2),
    "shift 8 px": partial(shifted, pixels=8),
}


def main(
    root: Path | None = None,
    output: Path = Path("results/drift.csv"),
    categories: list[str] | None = None,
    model: str = "WtFlow",
    streams: int = 50,
    length: int = 10_000,
    rate: float = 0.01,
    seed: int = 0,
) -> None:
    """Measure alarms and delays, and print the table.

    Args:
        root: Folder of the categories.
        output: CSV file of the rows, continued if it exists.
        categories: Categories to run; all by default.
        model: Model of ``configs/compare/real.yaml`` that calibrates on folds: Pradot, WtFlow or Duo. Or
            ``appearance``.
        streams: Number of streams per row.
        length: Images of a stream of good images.
        rate: Promised probability of a false alarm over a stream.
        seed: Seed of the split.
    """
    command = shlex.join(["python", "-m", "benchmarks.drift", *sys.argv[1:]])
    print(f"{command}\n{versions('anomalib-ot', 'anomalib', 'torch', 'timm')}", flush=True)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    found = categories_in(root)
    is_model = model != APPEARANCE
    plan = read_plan("real", [model if is_model else "WtFlow"], [EMBEDDED], backbone=offline_backbone())
    plan = replace(plan, data={name: found[name] for name in categories or found})
    done = finished(output, FIELDS[:2])
    names = [model] if is_model else [name for name in PARTS if name != SCORE]
    with appended(output, FIELDS) as add:
        for category in plan.data:
            if all((category, name) in done for name in names):
                continue
            images = GoodAndBad(plan, category)
            (split,) = images.splits(seed, [None])
            measured = _scores(plan, images, split, seed, model) if is_model else _appearances(images, split)
            # All rows of a category come first, so that an interrupted one does not count as finished.
            for row in [
                {"model": name, **row}
                for name, values in measured.items()
                for row in rows_of(values, streams, length, rate if is_model else PARTS[name] * rate)
            ]:
                add({"category": category, **row})
    rows = pd.read_csv(output)
    print(rows.to_string(index=False, na_rep=""), *tables(rows), sep="\n\n")


@dataclass(frozen=True)
class Measured:
    """A number of each good, each changed and each anomalous image.

    Args:
        good: Of good images.
        changed: Of good images after each change.
        anomalous: Of anomalous images.
        folds: Of the training images, by the folds that left them out; None if the number needs no training.
    """

    good: Numbers
    changed: dict[str, Numbers]
    anomalous: Numbers
    folds: Numbers | None = None


def _scores(plan: Plan, images: GoodAndBad, split: Split, seed: int, model: str) -> dict[str, Measured]:
    """Scores by a model that is fitted to the training images."""
    fit = fitted(plan, images, split.training, seed, model)
    tested = images.samples_of(split.tested)
    changed = {name: fit.scores_of(images.features(tested, change))[model] for name, change in CHANGES.items()}
    good, anomalous = (fit.scores_of(images.features_of(each))[model] for each in (split.tested, split.anomalous))
    return {model: Measured(good, changed, anomalous, fit.calibration[model])}


def _appearances(images: GoodAndBad, split: Split) -> dict[str, Measured]:
    """Brightness and sharpness."""

    def measured(indices: Sequence[int], change: Callable[[Tensor], Tensor] | None = None) -> pd.DataFrame:
        return pd.DataFrame([appearance_of(image) for image in images.images(images.samples_of(indices), change)])

    good, anomalous = measured(split.tested), measured(split.anomalous)
    changed = {name: measured(split.tested, change) for name, change in CHANGES.items()}
    return {
        name: Measured(
            good[name].to_numpy(),
            {key: own[name].to_numpy() for key, own in changed.items()},
            anomalous[name].to_numpy(),
        )
        for name in good
    }


def rows_of(measured: Measured, streams: int, length: int, rate: float) -> Iterator[dict[str, str]]:
    """The rows of a model, or of another number of the images."""
    good = measured.good
    known: dict[str, Callable[[np.random.Generator], Numbers | None]] = {
        "held out": lambda random: random.choice(good, _CALIBRATION),
        "stream" if measured.folds is None else "folds": lambda _: measured.folds,
    }
    for source, calibration in known.items():
        alarms = partial(_alarms, calibration, good, streams=streams, rate=rate, watch_lower=source != "folds")
        yield {"calibration": source, "change": "none", **alarms(good, before=length, after=0)}
        for share in SHARES:
            parts = (np.resize(good, round((1 - share) * _POOL)), np.resize(measured.anomalous, round(share * _POOL)))
            mixed = np.concatenate(parts)
            yield {"calibration": source, "change": f"{share:.0%} anomalous", **alarms(mixed, before=0, after=length)}
        for name, values in measured.changed.items():
            yield {"calibration": source, "change": name, **alarms(values, before=_BEFORE, after=_AFTER)}


def _alarms(
    calibration: Callable[[np.random.Generator], Numbers | None],
    good: Numbers,
    after_change: Numbers,
    *,
    streams: int,
    rate: float,
    watch_lower: bool,
    before: int,
    after: int,
) -> dict[str, str]:
    """Streams with an alarm, those with one before the change, and the median number of changed images until it."""
    found: list[int] = []
    for seed in range(streams):
        random = np.random.default_rng(seed)
        monitor = DriftMonitor(calibration(random), rate, seed, watch_lower=watch_lower)
        stream = np.concatenate([random.choice(good, before), random.choice(after_change, after)])
        first = next((index for index, score in enumerate(stream) if monitor.update(float(score)).is_alarm), None)
        found += [] if first is None else [first + 1]
    late = [index - before for index in found if index > before]
    return {
        "streams": str(streams),
        "alarms": str(len(found)),
        "early": str(len(found) - len(late)),
        "delay": f"{np.median(late):g}" if late else "",
    }


def tables(rows: pd.DataFrame) -> tuple[str, str]:
    """The tables of the guide in Markdown: delays after each change, and streams with an alarm without a change.

    An alarm before the change does not count as one of it.
    """
    is_change = rows.change.isin([*CHANGES])
    delays = [_delay(row.delay, row.alarms - row.early, row.streams) for row in rows[is_change].itertuples()]
    alarms = [f"{row.alarms} of {row.streams}" for row in rows[~is_change].itertuples()]
    shown = ((rows[is_change], delays, "change"), (rows[~is_change], alarms, "images"))
    delayed, false = (_table(own.assign(cell=cells), header) for own, cells, header in shown)
    return delayed, false


def _delay(delay: float, alarms: int, streams: int) -> str:
    """The delay, which is NaN without an alarm after the change, and the streams with one unless all have one."""
    known = [] if np.isnan(delay) else [f"{delay:g}"]
    return " ".join([*known, *[f"({alarms} of {streams})"] * (alarms < streams)])


def _table(rows: pd.DataFrame, header: str) -> str:
    """The cells in Markdown: a row for each change, and a column for each model, category and calibration."""
    named = rows.assign(column=rows.model + ", " + rows.category + ", " + rows.calibration)
    columns = [*named.column.unique()]
    table = Table("", [header, *columns])
    for change, own in named.groupby("change", sort=False):
        cells = dict(zip(own.column, own.cell, strict=True))
        table.rows.append([Cell(str(change)), *(Cell(cells.get(column, "")) for column in columns)])
    return table.markdown()


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
