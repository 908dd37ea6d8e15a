"""Tables and the plot of promised and realised rates, from the rows of :mod:`benchmarks.false_alarms`.

Run as ``python -m benchmarks.promises --rows ROWS.csv --plot PLOT.png``.
"""

from itertools import product
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from jsonargparse import auto_cli
from matplotlib import pyplot as plt
from scipy.stats import betabinom, binomtest

from anomalib_ot.comparison.report.tables import Cell, Table

_LEVEL = 0.05
# Thresholds that need no held-out images.
_OWN = ("folds", "support")
_FACTOR = 1.96
# A split is a category, a seed and a number of images; its rows below the supported rate have the same threshold.
_THRESHOLD = ["category", "model", "images", "seed", "split", "threshold", "rank"]


def report(rows: Path, plot: Path) -> None:
    """Print the tables, those of the guide in Markdown, and draw the plot.

    Args:
        rows: CSV file of the runs.
        plot: PNG file of the plot.
    """
    runs = pd.read_csv(rows)
    print(table(runs), guide(runs), cases(runs), sep="\n\n")
    draw(runs, plot)
    print(f"\nPlot: {plot}")


def table(runs: pd.DataFrame) -> str:
    """Realised rates with 95 % intervals, detection rates, and the splits that keep the promise."""
    lines = []
    columns = ["model", "images", "split", "threshold", "rate"]
    for (model, images, how, source, rate), own in runs.groupby(columns, dropna=False, sort=False):
        realised, low, high = interval(own)
        within = [kept(row) for row in own.itertuples()]
        lines.append(
            {
                "model": model,
                "images": images,
                "split": how,
                "threshold": source,
                "promised %": 100 * rate,
                "supported %": 100 * own.supported.mean(),
                "realised %": 100 * realised,
                "interval": f"{100 * low:.1f} to {100 * high:.1f}",
                "detected %": 100 * own.detected.sum() / own.anomalous.sum(),
                "kept": f"{sum(within)} of {len(within)}" if rate == rate else "",  # noqa: PLR0124 - NaN
            }
        )
    return pd.DataFrame(lines).to_string(index=False, float_format="{:.1f}".format, na_rep="")


def interval(rows: pd.DataFrame) -> tuple[float, float, float]:
    """Share of good images that are rejected over some splits, and its 95 % interval.

    The interval is the wider one of two: a binomial one, and that of the ratio of two means over the splits, whose
    thresholds are random too. Both are too narrow where splits share images.
    """
    alarms, good = rows.false_alarms.to_numpy(), rows.good.to_numpy()
    rate = alarms.sum() / good.sum()
    low, high = binomtest(int(alarms.sum()), int(good.sum())).proportion_ci()
    count = len(rows)
    if count > 1:
        error = np.sqrt(count / (count - 1) * ((alarms - rate * good) ** 2).sum()) / good.sum()
        low, high = min(low, max(0.0, rate - _FACTOR * error)), max(high, rate + _FACTOR * error)
    return float(rate), float(low), float(high)


def chances(row: Any) -> tuple[float, float]:
    """Probabilities of as many false alarms as in a split, or more, and of as many or fewer, by the promise.

    The threshold is random too: the rate of false alarms above the k-th highest of n calibration scores has a beta
    distribution with the parameters k and n + 1 - k.
    """
    promised = betabinom(row.good, row.rank, row.calibration + 1 - row.rank)
    return float(promised.sf(row.false_alarms - 1)), float(promised.cdf(row.false_alarms))


def kept(row: Any) -> bool:
    """Whether a split has no more false alarms than the promise explains, at 5 %."""
    return row.supported == row.supported and chances(row)[0] > _LEVEL


def cases(runs: pd.DataFrame) -> str:
    """How many thresholds keep their promise, by model, source and split, and the categories where fewer than 95 % do.

    A case is ``kept`` if the promise explains its false alarms at 5 %, and ``within`` if they are in the central 95 %
    of their distribution. Rates that give a split the same threshold are one case.
    """
    promised = runs[runs.supported.notna()].drop_duplicates(_THRESHOLD)
    found = [chances(row) for row in promised.itertuples()]
    more, fewer = (np.array(each) for each in zip(*found, strict=True))
    counted = promised.assign(kept=more > _LEVEL, within=(more > _LEVEL / 2) & (fewer > _LEVEL / 2))
    lines = []
    for (model, source, how), own in counted.groupby(["model", "threshold", "split"], sort=False):
        shares = own.groupby("category", sort=False).kept.agg(["mean", "sum", "count"])
        low = [
            f"{name} {row['sum']:g} of {row['count']:g}" for name, row in shares.iterrows() if row["mean"] < 1 - _LEVEL
        ]
        lines.append(
            {
                "model": model,
                "threshold": source,
                "split": how,
                "cases": len(own),
                "kept %": 100 * own.kept.mean(),
                "within %": 100 * own.within.mean(),
                "kept below 95 %": ", ".join(low),
            }
        )
    return pd.DataFrame(lines).to_string(index=False, float_format="{:.1f}".format, na_rep="")


def guide(runs: pd.DataFrame) -> str:
    """The tables of the guide in Markdown: realised rates with intervals, and detection rates, over random splits.

    The first has the rates that the images support, the second the thresholds that promise nothing.
    """
    random = runs[runs["split"] == "random"]
    own = random[random.threshold.isin(_OWN)]
    supported = own.groupby(["images", "rate"]).supported.transform("mean")
    promised = own.assign(promise=supported.map(_percent)).drop_duplicates(_THRESHOLD, keep="last")
    others = random[random.rate.isna()]
    tables = [_shares(promised, "promise", "promised")]
    return "\n\n".join([*tables, *([_shares(others, "threshold", "threshold")] if len(others) else [])])


def _shares(runs: pd.DataFrame, by: str, header: str) -> str:
    """Realised and detected shares in Markdown: a row for each number of images and value of a column."""
    models = [*runs.model.unique()]
    table = Table("", ["images", header, *(each for model in models for each in (model, "detected"))])
    for (images, value), rows in runs.groupby(["images", by], sort=False):
        cells = [Cell(str(images)), Cell(str(value))]
        for model in models:
            shown = rows[rows.model == model]
            cells += _cells(shown) if len(shown) else [Cell(""), Cell("")]
        table.rows.append(cells)
    return table.markdown()


def _cells(rows: pd.DataFrame) -> list[Cell]:
    rate, low, high = (100 * each for each in interval(rows))
    detected = 100 * rows.detected.sum() / rows.anomalous.sum()
    return [Cell(f"{rate:.1f} % ({low:.1f} to {high:.1f})"), Cell(f"{detected:.0f} %")]


def _percent(rate: float) -> str:
    return f"{100 * rate:.3g} %"


def draw(runs: pd.DataFrame, path: Path) -> None:
    """Save the realised rate against the rate that the images support: a panel for each model and kind of split.

    Each line is a number of training images, over all categories and splits, with the thresholds that need no held-out
    images. Below the diagonal, the promise is kept.
    """
    shown = runs[runs.threshold.isin(_OWN) & runs.supported.notna()]
    kinds, models = shown["split"].unique(), shown.model.unique()
    limit = 100 * shown.supported.max()
    mpl.use("Agg")
    size = (3.2 * len(models), 3.2 * len(kinds))
    figure, panels = plt.subplots(len(kinds), len(models), figsize=size, squeeze=False, sharex=True, sharey=True)
    for (row, kind), (column, model) in product(enumerate(kinds), enumerate(models)):
        panel = panels[row, column]
        own = shown[(shown["split"] == kind) & (shown.model == model)]
        panel.plot([0, limit], [0, limit], color="grey", linestyle="--", linewidth=1)
        for images, lines in own.groupby("images", sort=False):
            _draw_line(panel, lines, f"{images} images")
        panel.set_title(model if kind == "random" else f"{model}, {kind}", fontsize=10)
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7, loc="upper left")
    figure.supxlabel("promised false alarms in %", fontsize=10)
    figure.supylabel("realised false alarms in %", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def _draw_line(panel: Any, rows: pd.DataFrame, label: str) -> None:
    """Draw the realised rates with their intervals, each threshold once."""
    supported = rows.drop_duplicates(_THRESHOLD, keep="last").groupby("rate").supported.mean()
    points = [
        (100 * supported[rate], *(100 * each for each in interval(rows[rows.rate == rate]))) for rate in supported.index
    ]
    promised, realised, low, high = np.array(points).T
    style = {"marker": "o", "markersize": 3, "linewidth": 1, "capsize": 2}
    panel.errorbar(promised, realised, (realised - low, high - realised), label=label, **style)


if __name__ == "__main__":
    auto_cli(report, as_positional=False)
