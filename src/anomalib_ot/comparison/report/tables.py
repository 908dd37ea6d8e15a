"""The tables of a report, shared by Markdown and HTML."""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any

from scipy.stats import binomtest

from anomalib_ot.comparison.bootstrap import Difference
from anomalib_ot.comparison.record import Key, Record
from anomalib_ot.comparison.verdicts import Verdicts
from anomalib_ot.host.calibration import FOLDS, HELD_OUT, SUPPORT, TRAINED

from .groups import Group

ABSENT = "\N{EN DASH}"
OVERALL = ("image_AUROC", "image_F1Max", "pixel_AUROC", "pixel_F1Max", "pixel_AUPRO", "pixel_AUSPRO")
_BY_KIND = re.compile(r"(image_AUROC|pixel_AUSPRO)_(.+)")
_COSTS = {
    "fit_s": "fit, s",
    "ms_per_image": "torch, ms/image",
    "openvino_ms_per_image": "OpenVINO, ms/image",
    "peak_mib": "peak memory, MiB",
    "size_mib": "size on disk, MiB",
    "parameters": "parameters",
}
# Neither fewer nor more of them is better.
_WITHOUT_BEST = {"parameters"}
_SOURCES: Mapping[str, str] = {
    HELD_OUT: "held out",
    FOLDS: "folds of the training images",
    SUPPORT: "support images",
    TRAINED: "trained on",
}
_AVERAGED = ("image_AUROC", "pixel_AUPRO")
# Characters that Markdown interprets; an underscore only at the edge of a word.
_MARKDOWN = re.compile(r"[\\`*~<>|&]|\](?=[(\[:])|(?<![^\W_])_|_(?![^\W_])")
_TIME = "time"
_NAMED = 4


@dataclass(frozen=True)
class Cell:
    """Text of a cell, whether it is the best of its column, and a note."""

    text: str
    best: bool = False
    note: str = ""


@dataclass(frozen=True)
class Table:
    """A table; the first cell of each row is its header.

    Args:
        caption: Title of the table.
        columns: Header of each column.
        rows: Cells of each row.
        numeric: Whether all columns but the first hold numbers.
    """

    caption: str
    columns: list[str]
    rows: list[list[Cell]] = field(default_factory=list)
    numeric: bool = True

    def markdown(self) -> str:
        """The table in Markdown, without its caption."""
        rule = ["---", *["---:" if self.numeric else "---"] * (len(self.columns) - 1)]
        lines = [[markdown(column) for column in self.columns], rule]
        lines += [[_markdown_cell(cell) for cell in row] for row in self.rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def markdown(text: str) -> str:
    """Text on one line, with the characters of Markdown escaped."""
    return _MARKDOWN.sub(r"\\\g<0>", " ".join(text.split()))


def results(group: Group, baseline: str | None, differences: Mapping[str, Difference]) -> Table:
    """Mean ± standard deviation of each metric over the seeds, with a row for each model. The best is bold."""
    names = _measured(group)
    overall = [name for name in OVERALL if name in names]
    overall += [name for name in names if name not in overall and not _BY_KIND.fullmatch(name)]
    columns = [_metric_column(group, name) for name in overall]
    headers = [_label(name) for name in overall]
    if baseline is not None:
        columns.insert(1, [_difference(group, model, baseline, differences) for model in group.runs])
        headers.insert(1, f"image AUROC minus {baseline}")
    caption = f"Results on {group.title}, in percent" + _seeds(group)
    return _table(caption, ["model", *headers], _models(group), columns)


def results_by_kind(group: Group) -> Table | None:
    """Like :func:`results`, for each kind of anomaly; None if it was not measured."""
    names = [name for name in _measured(group) if _BY_KIND.fullmatch(name)]
    if not names:
        return None
    caption = f"By kind of anomaly on {group.title}, in percent" + _seeds(group)
    headers = [_BY_KIND.sub(lambda match: f"{_label(match[1])}, {match[2]}", name) for name in names]
    return _table(caption, ["model", *headers], _models(group), [_metric_column(group, name) for name in names])


def verdicts(group: Group) -> Table | None:
    """Promised and realised false alarms and detected anomalies of each model; None if no run knows them."""
    runs = {model: [run.verdicts for run in group.runs[model] if run.verdicts] for model in group.runs}
    if not any(runs.values()):
        return None
    headers = ["model", "calibration images", "promised", "realised [95 % interval]", "detected"]
    caption = f"Verdicts on {group.title}: false alarms and detected anomalies, in percent"
    if len(group.seeds) > 1:
        caption += f", mean over seeds {', '.join(map(str, group.seeds))}"
    rows = [
        [model, *(_verdicts(some, len(group.runs[model.text])) if some else [Cell(ABSENT)] * (len(headers) - 1))]
        for model, some in zip(_models(group), runs.values(), strict=True)
    ]
    return Table(caption, headers, rows)


def _verdicts(runs: Sequence[Verdicts], seeds: int) -> list[Cell]:
    """Cells of a model, from its runs with verdicts and the number of all its runs."""
    counts = " to ".join(dict.fromkeys(str(choose(run.calibration_images for run in runs)) for choose in (min, max)))
    sources = dict.fromkeys(_SOURCES.get(run.calibration_source, run.calibration_source) for run in runs)
    asked, promised = (f"{100 * fmean(rates):.3g}" for rates in zip(*map(_rates, runs), strict=True))
    return [
        Cell(counts, note="; ".join(filter(None, [*sources, _fewer(len(runs), seeds)]))),
        Cell(promised, note="" if asked == promised else f"{asked} asked for"),
        _realised(runs),
        Cell(_percent(100 * fmean(run.detected / run.anomalous_images for run in runs))),
    ]


def _rates(run: Verdicts) -> tuple[float, float]:
    return run.false_alarm_rate, run.supported_rate


def _realised(runs: Sequence[Verdicts]) -> Cell:
    if any(run.calibrated_on_test for run in runs):
        return Cell(ABSENT, note="calibrated on test images")
    alarms, good = fmean(run.false_alarms for run in runs), runs[0].good_images
    # All seeds have the same test images, and tell as much as one about other images.
    low, high = binomtest(round(alarms), good).proportion_ci()
    return Cell(f"{_percent(100 * alarms / good)} [{_percent(100 * low)}, {_percent(100 * high)}]")


def averages(groups: Sequence[Group]) -> list[Table]:
    """Image AUROC and AUPRO by category and on average, for each number of training images with several categories."""
    by_shots: dict[int | None, list[Group]] = defaultdict(list)
    for group in groups:
        by_shots[group.shots].append(group)
    return [
        _average(measured, metric)
        for several in by_shots.values()
        for metric in _AVERAGED
        if len(measured := [group for group in several if metric in _measured(group)]) > 1
    ]


def _average(groups: Sequence[Group], metric: str) -> Table:
    means = {
        group.title: {m: fmean(values) for m in group.runs if (values := group.values(m, metric))} for group in groups
    }
    models = [model for model in groups[0].runs if any(model in mean for mean in means.values())]
    shared = [title for title, mean in means.items() if all(model in mean for model in models)]
    columns = [_column([mean.get(model) for model in models], _percent, max) for mean in means.values()]
    average = [fmean(means[title][model] for title in shared) if shared else None for model in models]
    columns.insert(0, _column(average, _percent, max))
    what = (
        f"average over the categories with results of all models: {', '.join(shared)}"
        if shared
        else "no category has results of all models"
    )
    label = _label(metric)
    caption = f"{label[0].upper()}{label[1:]} by category, in percent, mean over seeds; {what}"
    return _table(caption, ["model", "average", *means], [Cell(model) for model in models], columns)


def costs(group: Group) -> Table | None:
    """Mean of each cost over the seeds, with the lowest in bold, if lower is better; None if nothing was measured."""
    names = {cost for model in group.runs for run in group.runs[model] for cost in run.costs}
    shown = [name for name in _COSTS if name in names]
    if not shown:
        return None
    columns = []
    for name in shown:
        values = [group.costs(model, name) for model in group.runs]
        choose = None if name in _WITHOUT_BEST else min
        columns.append(_column([fmean(v) if v else None for v in values], _significant, choose))
    headers = [_COSTS[name] for name in shown]
    return _table(f"Costs on {group.title}, mean over seeds", ["model", *headers], _models(group), columns)


def published(reference: Sequence[Mapping[str, str]], groups: Sequence[Group]) -> Table:
    """Published numbers, beside the measured ones if the model ran in this comparison."""
    rows = []
    for row in reference:
        cells = (row["category"], row["model"], _label(row["metric"]), row["value"], _measured_here(row, groups))
        rows.append([Cell(text) for text in (*cells, row["source"])])
    caption = "Published by others on their own data and hardware, in percent, and measured here"
    return Table(caption, ["category", "model", "metric", "published", "measured here", "source"], rows, numeric=False)


def _measured_here(row: Mapping[str, str], groups: Sequence[Group]) -> str:
    """The same number from our runs: for one group, or averaged over all groups with this number of training images.

    ``average`` is over all categories, and ``MVTecAD/average`` over those of this data set.
    """
    name, model, metric = row["category"], row["model"], row["metric"]
    averaged = [group for group in groups if name in group.averages]
    if averaged:
        means = [fmean(values) for group in averaged if (values := _values(group, model, metric))]
        return _percent(fmean(means)) if len(means) == len(averaged) else ABSENT
    values = [value for group in groups if group.title == name for value in _values(group, model, metric)]
    return _spread(values) if values else ABSENT


def _values(group: Group, model: str, metric: str) -> list[float]:
    return group.values(model, metric) if model in group.runs else []


def overrides(records: Sequence[Record]) -> Table | None:
    """Settings in which models differ from the shared ones; None if there are none."""
    runs: dict[tuple[str, str, str], list[Key]] = defaultdict(list)
    records = [record for record in records if not record.failed]
    for record in records:
        for setting, value in record.overrides.items():
            runs[record.key.model, setting, value].append(record.key)
    if not runs:
        return None
    rows = [
        [Cell(text) for text in (model, setting, value, _whose(keys, [r.key for r in records if r.key.model == model]))]
        for (model, setting, value), keys in runs.items()
    ]
    return Table(
        "Settings in which a model differs from the shared ones",
        ["model", "setting", "value", "runs"],
        rows,
        numeric=False,
    )


def settings(records: Sequence[Record], part: Callable[[Record], Mapping[str, Any]]) -> tuple[Table, Table]:
    """Tables of the shared and of the differing values of a configuration or environment.

    Args:
        records: The runs. Those without this part do not count.
        part: Returns the part of a run.
    """
    records = [record for record in records if part(record)]
    values: dict[str, dict[str, list[Key]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        for name, text in _flat(part(record)):
            values[name][text].append(record.key)
    shared = Table("Shared by all runs", ["setting", "value"], numeric=False)
    differing = Table("Different between runs", ["setting", "value", "runs"], numeric=False)
    everyone = [record.key for record in records]
    for name, texts in values.items():
        if _is_time(name):
            shared.rows.append([Cell(name), Cell(" to ".join(dict.fromkeys((min(texts), max(texts)))))])
        elif len(texts) == 1 and [len(keys) for keys in texts.values()] == [len(records)]:
            shared.rows.append([Cell(name), *map(Cell, texts)])
        else:
            rows = ([name, text, _whose(keys, everyone)] for text, keys in texts.items())
            differing.rows.extend([*map(Cell, row)] for row in rows)
    return shared, differing


def _flat(content: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for name, value in content.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _is_time(name: str) -> bool:
    return name.rpartition(".")[2] == _TIME


def _whose(keys: Collection[Key], everyone: Sequence[Key]) -> str:
    """Short description of runs, by model, category, number of training images or seed if one identifies them."""
    if len(keys) == len(everyone):
        return "all"
    for part, prefix in (("model", ""), ("category", ""), ("shots", "shots "), ("seed", "seed ")):
        names = {getattr(key, part) for key in keys}
        if sum(getattr(key, part) in names for key in everyone) == len(keys):
            return prefix + ", ".join(sorted(map(str, names)))
    first = "; ".join(str(key) for key in list(keys)[:_NAMED])
    return first + (f"; and {len(keys) - _NAMED} more" if len(keys) > _NAMED else "")


def _measured(group: Group) -> list[str]:
    return list(dict.fromkeys(name for runs in group.runs.values() for run in runs for name in run.metrics))


def _label(metric: str) -> str:
    return metric.replace("_", " ", 1)


def _seeds(group: Group) -> str:
    return f", mean ± standard deviation over seeds {', '.join(map(str, group.seeds))}" if len(group.seeds) > 1 else ""


def _models(group: Group) -> list[Cell]:
    return [Cell(model, note=group.note(model)) for model in group.runs]


def _metric_column(group: Group, name: str) -> list[Cell]:
    values = [group.values(model, name) for model in group.runs]
    cells = _column([fmean(some) if some else None for some in values], _percent, max)
    return [
        Cell(_spread(some), cell.best, _fewer(len(some), len(group.runs[model]))) if some else cell
        for some, cell, model in zip(values, cells, group.runs, strict=True)
    ]


def _fewer(measured: int, runs: int) -> str:
    return "" if measured == runs else f"{measured} of {runs} seeds"


def _difference(group: Group, model: str, baseline: str, differences: Mapping[str, Difference]) -> Cell:
    if model == baseline:
        return Cell("baseline")
    if model not in differences:
        return Cell(ABSENT)
    it = differences[model]
    interval = f"{_signed(it.mean, '+')} [{_signed(it.low)}, {_signed(it.high)}]"
    return Cell(interval, note=_fewer(len(it.seeds), len(group.seeds)))


def _column(
    values: Sequence[float | None], show: Callable[[float], str], choose: Callable[..., str] | None
) -> list[Cell]:
    """Cells of a column. With two values or more, all that equal the best at the shown precision are marked."""
    texts = [ABSENT if value is None else show(value) for value in values]
    shown = [text for text in texts if text != ABSENT]
    best = choose(shown, key=lambda text: float(text.replace(",", ""))) if choose and len(shown) > 1 else None
    return [Cell(text, text == best) for text in texts]


def _table(caption: str, headers: list[str], firsts: Sequence[Cell], columns: Sequence[Sequence[Cell]]) -> Table:
    return Table(caption, headers, [[*row] for row in zip(firsts, *columns, strict=True)])


def _spread(values: Sequence[float]) -> str:
    return _percent(fmean(values)) + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def _percent(value: float) -> str:
    return f"{value:.1f}"


def _signed(value: float, plus: str = "") -> str:
    text = f"{abs(value):.1f}"
    if float(text) == 0:
        return text
    return f"\N{MINUS SIGN}{text}" if value < 0 else plus + text


def _significant(value: float) -> str:
    """At least three significant digits, with no digit after the point from 100 on."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:#.3g}"  # noqa: PLR2004


def _markdown_cell(cell: Cell) -> str:
    text = markdown(cell.text)
    text = f"**{text}**" if cell.best else text
    return f"{text} ({markdown(cell.note)})" if cell.note else text
