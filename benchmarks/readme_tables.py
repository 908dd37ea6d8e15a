"""The tables of the model comparison, from the runs in ``benchmarks/results``.

Run as ``python -m benchmarks.readme_tables``. The files in that folder are the ``results.csv`` of ``anomalib-ot
compare`` for ``configs/compare/real.yaml``; ``docs/results.md`` lists the commands. README shows the image metrics and
``docs/results.md`` the pixel metrics. A test compares both pages with these tables.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

import pandas as pd

from anomalib_ot.comparison.report.tables import Cell, Table

_RESULTS = Path(__file__).with_name("results")
_SEEDS = 3
# Names in the runs, and names in the tables.
_CATEGORIES = {
    "tray": "tray",
    "screw": "screw",
    "magnetic_tile": "magnetic tile",
    "Assembly": "embedded",
}
_MODELS = {
    "Pradot": "Pradot",
    "WtFlow": "WtFlow",
    "Pradot+WtFlow": "Pradot+WtFlow",
    "WtFlow+PaDiM": "WtFlow+PaDiM",
    "Foct": "Foct, 4 images",
    "PaDiM": "PaDiM",
    "PatchCore": "PatchCore, 1 % coreset",
    "MHPatchcore": "MHPatchcore",
    "PatchFlow": "PatchFlow",
    "STFPM": "STFPM",
    "FRE": "FRE",
    "DFM": "DFM",
    "DFKDE": "DFKDE",
}
_PIXEL = {"pixel_AUROC": "AUROC", "pixel_AUPRO": "AUPRO", "pixel_AUSPRO": "AU-sPRO"}


def read_runs() -> pd.DataFrame:
    """The metrics of all finished runs, in one row per category, model and seed."""
    runs = pd.concat([pd.read_csv(path) for path in sorted(_RESULTS.glob("*.csv"))])
    runs = runs[runs["error"].isna()]
    return runs.assign(category=runs["category"].map(_CATEGORIES), model=runs["model"].map(_MODELS))


def image_table(runs: pd.DataFrame) -> Table:
    """Image AUROC ± standard deviation over the seeds, and the mean for models that ran on all categories."""
    scores = runs.groupby(["model", "category"])["image_AUROC"].agg(["mean", "std", "count"])
    means = _arranged(scores["mean"])

    def spread(model: str, category: str) -> tuple[str, str]:
        _, deviation, count = scores.loc[(model, category)]
        return f" ± {deviation:.1f}" if count > 1 else "", "" if count == _SEEDS else f"{count:.0f}"

    # There is no mean if a category is missing.
    return _table("Image AUROC", means.assign(mean=means.mean(axis=1, skipna=False)), spread)


def pixel_table(runs: pd.DataFrame) -> Table:
    """Pixel metrics, each the mean over the seeds; screw has no masks."""
    means = runs.groupby(["model", "category"])[list(_PIXEL)].mean()
    columns = {
        f"{category}, {name}": table[category]
        for category in _CATEGORIES.values()
        for metric, name in _PIXEL.items()
        if category in (table := _arranged(means[metric].dropna()))
    }
    return _table("Pixel metrics", pd.DataFrame(columns).reindex(_ordered(means.index.levels[0])).dropna(how="all"))


def _arranged(values: pd.Series) -> pd.DataFrame:
    """Models as rows and categories as columns, in the order of the tables."""
    table = values.reset_index().pivot_table(index="model", columns="category", values=values.name)
    return table.reindex(_ordered(table.index), columns=[name for name in _CATEGORIES.values() if name in table])


def _ordered(models: Iterable[str]) -> list[str]:
    present = set(models)
    return [name for name in _MODELS.values() if name in present]


def _table(
    caption: str, means: pd.DataFrame, spread: Callable[[str, str], tuple[str, str]] = lambda _model, _column: ("", "")
) -> Table:
    """A table of means with the best of each column in bold; ``spread`` gives a suffix and a remark for each mean."""
    best = means.round(1).max()
    table = Table(caption, ["model", *means])
    for model, values in means.iterrows():
        cells = [Cell(model)]
        for column, mean in values.items():
            if pd.isna(mean):
                cells.append(Cell(""))
                continue
            more, note = spread(model, column) if column != "mean" else ("", "")
            cells.append(Cell(f"{mean:.1f}{more}", round(mean, 1) == best[column], note))
        table.rows.append(cells)
    return table


def tables() -> dict[str, str]:
    """The tables in Markdown, by page."""
    runs = read_runs()
    return {"README.md": image_table(runs).markdown(), "docs/results.md": pixel_table(runs).markdown()}


def main() -> None:
    """Print the tables."""
    print(*tables().values(), sep="\n\n")


if __name__ == "__main__":
    main()
