"""The tables of the model comparison, from the runs in ``benchmarks/results``.

Run as ``python -m benchmarks.readme_tables``. The files in that folder are the ``results.csv`` of ``anomalib-ot
compare`` for ``configs/compare/real.yaml``; ``docs/results.md`` lists the commands. README shows the image AUROC of the
models that ran on all categories, and ``docs/results.md`` AUPRO and the other models. A test compares both pages with
these tables.
"""

from pathlib import Path

import pandas as pd

from anomalib_ot.comparison.report.tables import Cell, Table

_RESULTS = Path(__file__).with_name("results")
# Names in the runs, and names in the tables.
_CATEGORIES = {
    "tray": "tray",
    "screw": "screw",
    "magnetic_tile": "magnetic tile",
    "Assembly": "embedded",
    "bottle": "bottle",
    "juice": "juice",
    "kolektor": "kolektor",
    "paper_mixed": "paper",
    "solar_poly": "solar",
}
_MODELS = {
    "Pradot": "Pradot",
    "WtFlow": "WtFlow",
    "Pradot+WtFlow": "Pradot+WtFlow",
    "Duo": "Duo",
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


def read_runs() -> pd.DataFrame:
    """The metrics of all finished runs, in one row per category, model and seed."""
    runs = pd.concat([pd.read_csv(path) for path in sorted(_RESULTS.glob("*.csv"))])
    runs = runs[runs["error"].isna() & runs["model"].isin(_MODELS)]
    return runs.assign(category=runs["category"].map(_CATEGORIES), model=runs["model"].map(_MODELS))


def table_of_all(runs: pd.DataFrame, metric: str, caption: str) -> Table:
    """A metric with seed 0 of the models that ran on all categories; screw and solar have no masks."""
    means = _arranged(runs[runs["seed"] == 0].groupby(["model", "category"])[metric].mean().dropna())
    complete = means.dropna()
    return _table(caption, complete.assign(mean=complete.mean(axis=1)))


def table_of_others(runs: pd.DataFrame) -> Table:
    """Image AUROC ± standard deviation over the seeds of the models that ran on some categories only."""
    scores = runs.groupby(["model", "category"])["image_AUROC"]
    means = _arranged(scores.mean())
    incomplete = means[means.isna().any(axis=1)].dropna(axis=1)
    return _table("Image AUROC", incomplete, scores.std())


def _arranged(values: pd.Series) -> pd.DataFrame:
    """Models as rows and categories as columns, in the order of the tables."""
    table = values.reset_index().pivot_table(index="model", columns="category", values=values.name)
    return table.reindex(
        [name for name in _MODELS.values() if name in table.index],
        columns=[name for name in _CATEGORIES.values() if name in table],
    )


def _table(caption: str, means: pd.DataFrame, deviations: pd.Series | None = None) -> Table:
    """A table of means, with their standard deviations if given, and the best of each column in bold."""
    best = means.round(1).max()
    table = Table(caption, ["model", *means])
    for model, values in means.iterrows():
        cells = [Cell(model)]
        for column, mean in values.items():
            spread = "" if deviations is None else f" ± {deviations[model, column]:.1f}"
            cells.append(Cell(f"{mean:.1f}{spread}", round(mean, 1) == best[column]))
        table.rows.append(cells)
    return table


def tables() -> list[tuple[str, str]]:
    """Each page with a table in Markdown that it shows."""
    runs = read_runs()
    images = table_of_all(runs, "image_AUROC", "Image AUROC").markdown()
    return [
        ("README.md", images),
        ("docs/results.md", table_of_all(runs, "pixel_AUPRO", "AUPRO").markdown()),
        ("docs/results.md", table_of_others(runs).markdown()),
    ]


def main() -> None:
    """Print the tables."""
    print(*(table for _, table in tables()), sep="\n\n")


if __name__ == "__main__":
    main()
