"""Write the report of a comparison, as an HTML page and as Markdown."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from anomalib_ot.comparison.record import Record
from anomalib_ot.drawing.html import render_page
from anomalib_ot.files import claim, write_text

from . import figures, tables
from .gallery import Picture, colour_scale, failures_first, pictures
from .groups import Group, group_records
from .tables import Table, markdown

REPORT_FILES = ("report.md", "report.html")
_BASELINE = (
    "The difference to the baseline is in percentage points, averaged over the seeds that both models have. The "
    "interval contains 95 % of 1,000 bootstrap resamples of the test images. Normal and anomalous images are resampled "
    "separately, and both models use the same resamples. The interval describes the variation over test images, not "
    "over seeds."
)
_VERDICTS = (
    "A calibrated model promises that at most this share of new good images is called anomalous, on average over the "
    "drawing of its calibration images. If the interval of the realised share, that of the good test images, is above "
    "the promise, these images caused more false alarms than promised."
)


@dataclass(frozen=True)
class Section:
    """A category's tables and figures."""

    title: str
    tables: list[Table]
    charts: list[figures.Chart]
    histograms: list[figures.Histogram]


@dataclass(frozen=True)
class Report:
    """The content of a report, without the gallery, which only the page has."""

    title: str
    summary: str
    failures: list[Record]
    incomplete: list[str]
    averages: list[Table]
    sections: list[Section]
    about_baseline: str
    about_verdicts: str
    published: Table | None
    overrides: Table | None
    warning: str
    ran: list[Table]


def write_report(
    records: Sequence[Record],
    output: Path,
    title: str,
    baseline: str | None = None,
    reference: Sequence[Mapping[str, str]] = (),
    gallery: int = 24,
) -> tuple[Path, Path]:
    """Write ``report.md`` and ``report.html``. The page needs no other file and no network.

    Args:
        records: The runs, as :func:`~anomalib_ot.comparison.record.read_records` returns them.
        output: Folder to write to.
        title: Title of the report.
        baseline: Label of the model that the others are compared with, if any.
        reference: Published numbers. Each has ``category``, ``model``, ``metric``, ``value`` and ``source``.
        gallery: Largest number of test images to show for each category and number of training images.

    Returns:
        Paths of the two files.

    Raises:
        ValueError: If there are no runs, if two runs of a category were tested on different images, if the baseline is
            not one of the models, or if the files of a run are truncated.
        FileExistsError: If ``output`` contains files of these names that no comparison wrote.
    """
    if not records:
        msg = "there are no runs to report on; run the comparison first"
        raise ValueError(msg)
    models = list(dict.fromkeys(record.key.model for record in records))
    if baseline is not None and baseline not in models:
        msg = f"the baseline {baseline} is not one of the models; choose one of {', '.join(models)}"
        raise ValueError(msg)
    groups = group_records(records)
    report = _report(records, groups, title, baseline, reference)
    shown = sorted((picture for group in groups for picture in pictures(group, gallery)), key=failures_first)
    claim(output, *REPORT_FILES)
    text, page = (output / name for name in REPORT_FILES)
    return write_text(text, _text(report)), write_text(page, _page(report, shown))


def _report(
    records: Sequence[Record],
    groups: Sequence[Group],
    title: str,
    baseline: str | None,
    reference: Sequence[Mapping[str, str]],
) -> Report:
    environment = tables.settings(records, lambda record: record.environment)
    ran = [*tables.settings(records, lambda record: record.config), *environment]
    captions = ("Configuration of all runs", "Configuration that differs", "Environment", "Environment that differs")
    return Report(
        title,
        _summary(records),
        [record for record in records if record.failed],
        [line for group in groups for line in (*group.missing(), *group.unscored())],
        tables.averages(groups),
        [_section(group, baseline) for group in groups],
        _BASELINE if baseline else "",
        _VERDICTS if any(record.verdicts for record in records) else "",
        tables.published(reference, groups) if reference else None,
        tables.overrides(records),
        _warning(environment[1]),
        [
            Table(caption, it.columns, it.rows, numeric=False)
            for caption, it in zip(captions, ran, strict=True)
            if it.rows
        ],
    )


def _summary(records: Sequence[Record]) -> str:
    failed = sum(record.failed for record in records)
    models, categories, seeds = (
        len({getattr(record.key, part) for record in records}) for part in ("model", "category", "seed")
    )
    counts = ((len(records), "run"), (models, "model"), (categories, "category"), (seeds, "seed"))
    words = [f"{n} {name if n == 1 else 'categories' if name == 'category' else name + 's'}" for n, name in counts]
    return f"{words[0]}, {failed} of them failed: {', '.join(words[1:])}."


def _section(group: Group, baseline: str | None) -> Section:
    differences = group.differences(baseline) if baseline else {}
    made = [
        tables.results(group, baseline, differences),
        tables.results_by_kind(group),
        tables.verdicts(group),
        tables.costs(group),
    ]
    return Section(group.title, [it for it in made if it is not None], figures.charts(group), figures.histograms(group))


def _warning(differing: Table) -> str:
    names = ", ".join(dict.fromkeys(row[0].text for row in differing.rows))
    return names and f"The runs have different environments, so their costs may not be comparable: {names}."


def _text(report: Report) -> str:
    """The report in Markdown."""
    blocks = [f"# {markdown(report.title)}", markdown(report.summary)]
    if report.failures or report.incomplete:
        blocks.append("## Failed and missing runs")
        # Tracebacks would hide the tables. They are in the page and in results.json.
        failures = [f"{failure.key}: {failure.message}" for failure in report.failures]
        blocks.append("\n".join(f"- {markdown(line)}" for line in (*failures, *report.incomplete)))
    blocks += [report.about_baseline, report.about_verdicts]
    if report.averages:
        blocks += ["## Averages", *_captioned(report.averages)]
    for section in report.sections:
        blocks += [f"## {markdown(section.title)}", *_captioned(section.tables)]
    if report.published:
        blocks += ["## Published numbers", *_captioned([report.published])]
    if report.overrides:
        blocks += ["## Overrides", *_captioned([report.overrides])]
    blocks += ["## Configuration and environment", markdown(report.warning), *_captioned(report.ran)]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _captioned(several: Iterable[Table]) -> list[str]:
    return [block for table in several for block in (f"{markdown(table.caption)}:", table.markdown())]


def _page(report: Report, shown: Sequence[Picture]) -> str:
    return render_page(__package__, "report", report=report, pictures=shown, scale=colour_scale())
