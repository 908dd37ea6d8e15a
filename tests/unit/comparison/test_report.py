"""Tests of the report of a few small runs."""

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.stats import beta

from anomalib_ot.comparison.bootstrap import Difference
from anomalib_ot.comparison.record import Key, Predictions, Record, read_records, write_record
from anomalib_ot.comparison.report.figures import charts, histograms
from anomalib_ot.comparison.report.gallery import pictures
from anomalib_ot.comparison.report.groups import group_records
from anomalib_ot.comparison.report.page import write_report
from anomalib_ot.comparison.report.tables import ABSENT, averages, markdown, results, settings, verdicts
from anomalib_ot.comparison.verdicts import Verdicts

ODD = '<b>x</b> & "y" | z'
KINDS = ["dent", "good", "good", "scratch"]
LABELS = np.array([1, 0, 0, 1])
PERFECT, LEVEL = [0.9, 0.1, 0.2, 0.8], [0.4, 0.4, 0.4, 0.4]
TRACEBACK = 'Traceback (most recent call last):\n  File "<run>"\n\nMemoryError: 9 | <GiB> too many'


class Page(HTMLParser):
    """Text, tables and tags of a page."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.tables, self.captions, self.text, self.cell = [], [], [], "", None
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        if tag == "table":
            self.captions.append(attrs["aria-label"])
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append("")
            self.cell = tag
        elif tag == "strong":
            self.tables[-1][-1][-1] += "*"

    def handle_endtag(self, tag):
        self.cell = None if tag == self.cell else self.cell

    def handle_data(self, data):
        self.text += data
        if self.cell:
            self.tables[-1][-1][-1] += data

    def table(self, caption):
        (found,) = [table for name, table in zip(self.captions, self.tables, strict=True) if name.startswith(caption)]
        return found


@pytest.fixture
def images(tmp_path):
    paths = [tmp_path / "data" / kind / f"{i}.png" for i, kind in enumerate(KINDS)]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 20), "teal").save(path)
    return [str(path) for path in paths]


@pytest.fixture
def runs(tmp_path):
    return tmp_path / "runs"


@pytest.fixture
def keep(runs, images):
    """Keeps a run of four images, with maps where there are pixel metrics."""

    def keep(category, model, seed, scores, shots=None, labels=LABELS, verdicts=None, p_values=None, **metrics):
        pixels = any(name.startswith("pixel") for name in metrics)
        maps = np.linspace(-1, 2, 4 * 8 * 16).reshape(4, 8, 16) if pixels else None
        truth = (maps > 1) & (labels == 1)[:, None, None] if pixels else None
        record = Record(
            Key(category, model, shots, seed),
            config={"model": {"class_path": model}, "image_size": [8, 16]},
            metrics=metrics,
            curves={"ROC": [[0, 0, 1], [0, 1, 1]]} | ({"PRO": [[0, 0.3, 1], [0, 0.6, 1]]} if pixels else {}),
            costs={"fit_s": 10.0 + seed, "parameters": 3412000},
            overrides={"batch_size": "16 (memory)"} if model == "A" else {},
            environment={"torch": "2.10", "time": f"2025-01-0{seed + 1}"},
            verdicts=verdicts,
        )
        predictions = Predictions(images, KINDS, labels, np.array(scores, dtype=np.float32), maps, truth, p_values)
        return write_record(runs, record, predictions)

    return keep


@pytest.fixture
def records(runs, keep):
    """Two categories, three models, two seeds; one run failed, one category has no masks."""
    for seed in (0, 1):
        keep("screw", "A", seed, LEVEL, image_AUROC=90 - 10 * seed, image_F1Max=70)
        keep("screw", "B", seed, PERFECT, image_AUROC=85 + 0.04 * seed, image_F1Max=80)
        kinds = {"image_AUROC_dent": 60 + seed, "pixel_AUSPRO_dent": 50}
        keep("tray", "A", seed, LEVEL, image_AUROC=70, pixel_AUROC=90, pixel_AUPRO=80, **kinds)
        keep("tray", "B", seed, PERFECT, image_AUROC=75, pixel_AUROC=91, **kinds)
        keep("tray", ODD, seed, LEVEL, image_AUROC=74, pixel_AUROC=92, pixel_AUPRO=81, **kinds)
    keep("screw", ODD, 0, PERFECT, image_AUROC=84, image_F1Max=60)
    write_record(runs, Record(Key("screw", ODD, None, 1), error=TRACEBACK))
    return read_records(runs)


@pytest.fixture
def written(records, tmp_path):
    reference = [{"category": "tray", "model": "B", "metric": "image_AUROC", "value": "99.9", "source": "Them, 2020"}]
    return write_report(records, tmp_path / "deep" / "report", ODD, "A", reference)


@pytest.fixture
def text(written):
    return written[0].read_text()


@pytest.fixture
def page(written):
    return Page(written[1])


def block(text, caption):
    """Rows of the table with this caption, without its rule."""
    rows = text.split(f"\n{caption}", 1)[1].split("\n\n", 2)[1].splitlines()
    return [rows[0], *rows[2:]]


def test_results_are_means_with_spread_and_difference(text):
    assert block(text, "Results on screw") == [
        "| model | image AUROC | image AUROC minus A | image F1Max |",
        r"| \<b\>x\</b\> \& " + r'"y" \| z (1 of 2 seeds) | 84.0 | +50.0 [50.0, 50.0] (1 of 2 seeds) | 60.0 |',
        "| A | **85.0 ± 7.1** | baseline | 70.0 ± 0.0 |",
        "| B | **85.0 ± 0.0** | +50.0 [50.0, 50.0] | **80.0 ± 0.0** |",
    ]


def test_metrics_that_a_model_lacks_are_no_zeros(page, text):
    header, _, _, b = page.table("Results on tray")
    assert header == ["model", "image AUROC", "image AUROC minus A", "pixel AUROC", "pixel AUPRO"]
    assert b == ["B", "*75.0 ± 0.0", "+50.0 [50.0, 50.0]", "91.0 ± 0.0", ABSENT]
    assert "pixel" not in " ".join(block(text, "Results on screw"))


def test_kinds_have_a_table_of_their_own(text, page):
    assert block(text, "By kind of anomaly on tray")[:2] == [
        "| model | image AUROC, dent | pixel AUSPRO, dent |",
        r"| \<b\>x\</b\> \& " + r'"y" \| z | **60.5 ± 0.7** | **50.0 ± 0.0** |',
    ]
    assert not any(caption.startswith("By kind of anomaly on screw") for caption in page.captions)


def test_page_and_text_say_the_same(text, page):
    def words(cells):
        return sorted(re.sub(r"[*|()]", " ", cells.replace("\\", "")).split())

    for caption, table in zip(page.captions, page.tables, strict=True):
        assert words(" ".join(map(" ".join, table))) == words(" ".join(block(text, markdown(caption))))


def test_difference_cell(records):
    (screw, _) = group_records(records)
    table = results(screw, "A", {"B": Difference(3.44, -1.21, 5.55, (0, 1)), ODD: Difference(-0.04, -7, -0.06, (0,))})
    cells = {row[0].text: row[2] for row in table.rows}
    assert cells["B"].text == "+3.4 [\N{MINUS SIGN}1.2, 5.5]"
    assert (cells[ODD].text, cells[ODD].note) == ("0.0 [\N{MINUS SIGN}7.0, \N{MINUS SIGN}0.1]", "1 of 2 seeds")


def test_failed_and_missing_runs_come_first(text, page):
    assert text.index("## Failed and missing runs") < text.index("Results on screw")
    name = f"{ODD} on screw, seed 1"
    assert f"- {markdown(f'{name}: MemoryError: 9 | <GiB> too many')}\n" in text
    assert "Traceback" not in text
    assert f"{name}: MemoryError: 9 | <GiB> too many{TRACEBACK}" in page.text.replace("\n{", "{")
    assert f"{ODD} on screw has results for 1 of 2 seeds; seed 1 failed or did not run" in page.text
    assert page.text.index(TRACEBACK) < page.text.index("Results on screw")


def test_model_that_never_ran_on_a_category_has_a_row(keep):
    run = [keep("screw", "A", 0, LEVEL, image_AUROC=90), keep("tray", "B", 0, LEVEL, image_AUROC=80)]
    for group, absent in zip(group_records(run), "BA", strict=True):
        rows = {row[0].text: row for row in results(group, None, {}).rows}
        assert (rows[absent][0].note, rows[absent][1].text) == ("no result", ABSENT)
        assert group.missing() == [f"{absent} has no result on {group.title}"]
    (table,) = averages(group_records(run))
    assert "no category has results of all models" in table.caption
    assert [row[1].text for row in table.rows] == [ABSENT, ABSENT]


def test_averages_name_their_categories(records, keep, page):
    assert page.table("Image AUROC by category")[1:] == [
        [ODD, "79.0", "84.0", "74.0"],
        ["A", "77.5", "*85.0", "70.0"],
        ["B", "*80.0", "*85.0", "*75.0"],
    ]
    (table,) = averages(group_records([*records, keep("tile", "A", 0, LEVEL, image_AUROC=50)]))
    assert table.caption.endswith("average over the categories with results of all models: screw, tray")
    assert [row[1].text for row in table.rows] == ["79.0", "77.5", "80.0"]


def test_averages_of_two_metrics(records, keep):
    (image,) = averages(group_records(records))
    run = keep("screw", "A", 0, LEVEL, image_AUROC=60, pixel_AUPRO=40)
    both = averages(group_records([*records, replace(run, key=replace(run.key, category="tile"))]))
    assert image.caption.startswith("Image AUROC by category")
    assert both[1].caption.startswith("Pixel AUPRO by category")
    assert both[1].columns == ["model", "average", "tray", "tile"]
    assert [row[0].text for row in both[1].rows] == [ODD, "A"]


def test_more_models_than_colours_have_lines_of_their_own(keep):
    curves = {"ROC": [[0.0, 1.0], [0.0, 1.0]]}
    runs = [keep("screw", f"model {index}", 0, LEVEL, image_AUROC=90) for index in range(20)]
    (group,) = group_records([replace(run, curves=curves) for run in runs])
    (chart,) = charts(group)
    assert len({(curve.colour, curve.dash) for curve in chart.curves}) == 20


def test_lowest_costs_are_bold_but_not_the_fewest_parameters(text):
    assert block(text, "Costs on screw") == [
        "| model | fit, s | parameters |",
        r"| \<b\>x\</b\> \& " + r'"y" \| z (1 of 2 seeds) | **10.0** | 3,412,000 |',
        "| A | 10.5 | 3,412,000 |",
        "| B | 10.5 | 3,412,000 |",
    ]


def calibrated(source="folds", false_alarms=2, detected=30, **changes):
    return replace(
        Verdicts(0.01, 0.05, 19, source, false_alarms, 50, detected, 40, calibrated_on_test=False), **changes
    )


def test_verdicts_are_those_of_a_hand_count(keep, tmp_path):
    enough = {"supported_rate": 0.01, "calibration_images": 120}
    run = [
        keep("screw", "A", 0, LEVEL, verdicts=calibrated()),
        keep("screw", "B", 0, LEVEL, verdicts=calibrated("held_out", calibrated_on_test=True, **enough)),
        keep("screw", "C", 0, LEVEL),
        keep("tray", "A", 0, LEVEL),
    ]
    text, page = write_report(run, tmp_path, "it")
    # The interval of Clopper and Pearson, in percent.
    low, high = 100 * beta.ppf(0.025, 2, 49), 100 * beta.ppf(0.975, 3, 48)
    assert block(text.read_text(), "Verdicts on screw") == [
        "| model | calibration images | promised | realised [95 % interval] | detected |",
        f"| A | 19 (folds of the training images) | 5 (1 asked for) | 4.0 [{low:.1f}, {high:.1f}] | 75.0 |",
        f"| B | 120 (held out) | 1 | {ABSENT} (calibrated on test images) | 75.0 |",
        f"| C | {ABSENT} | {ABSENT} | {ABSENT} | {ABSENT} |",
    ]
    for written in (text.read_text(), Page(page).text):
        assert "promises that at most this share of new good images is called anomalous" in written
        assert "Verdicts on tray" not in written


def test_verdicts_are_means_over_seeds_whose_images_count_once(keep):
    found = (calibrated(false_alarms=1), calibrated(false_alarms=3, detected=20, calibration_images=24))
    run = [keep("screw", "A", seed, LEVEL, verdicts=it) for seed, it in enumerate((*found, None))]
    table = verdicts(group_records(run)[0])
    low, high = 100 * beta.ppf(0.025, 2, 49), 100 * beta.ppf(0.975, 3, 48)
    assert table.caption.endswith("mean over seeds 0, 1, 2")
    ((_, count, promised, realised, detected),) = table.rows
    assert (count.text, count.note) == ("19 to 24", "folds of the training images; 2 of 3 seeds")
    assert (promised.text, realised.text, detected.text) == ("5", f"4.0 [{low:.1f}, {high:.1f}]", "62.5")


def test_p_values_stand_beside_the_scores_in_the_gallery(keep, tmp_path):
    p_values = np.array([1 / 65, 1, 0.5, 2 / 65])
    run = [keep("screw", "A", 0, PERFECT, verdicts=calibrated(), p_values=p_values), keep("screw", "B", 0, PERFECT)]
    shown = {picture.name: picture.verdicts for picture in pictures(group_records(run)[0], 24)}
    assert [it.p_value for it in shown["dent/0.png"]] == [pytest.approx(1 / 65), None]
    text = Page(write_report(run, tmp_path, "it")[1]).text
    assert re.findall(r"\bp = [\d.]+", text).count("p = 0.015") == 1
    assert len(re.findall(r"\bp = ", text)) == 4
    assert "p is the p-value of the score" in text


def test_a_report_of_runs_without_verdicts_tells_nothing_of_them(written):
    for path in written:
        assert "p-value" not in path.read_text()
        assert "Verdicts on" not in path.read_text()
        assert "promise" not in path.read_text()


def test_published_numbers_stand_apart(text):
    assert block(text, "Published by others")[1:] == ["| tray | B | image AUROC | 99.9 | 75.0 ± 0.0 | Them, 2020 |"]
    assert text.count("99.9") == 1


def test_published_averages_and_shots_stand_beside_ours(keep, runs, tmp_path):
    for category, auroc in (("screw", 60), ("tray", 80)):
        keep(category, "A", 0, LEVEL, shots=2, image_AUROC=auroc)
        keep(category, "A", 0, LEVEL, image_AUROC=auroc + 15)
    keep("tray", "B", 0, LEVEL, shots=2, image_AUROC=50)
    numbers = [("average", "A"), ("average, 2 shots", "A"), ("tray, 2 shots", "A"), ("average, 2 shots", "B")]
    published = {"metric": "image_AUROC", "value": "1", "source": "Them"}
    reference = [{"category": category, "model": model, **published} for category, model in numbers]
    text = write_report(read_records(runs), tmp_path / "out", "it", reference=reference)[0].read_text()
    measured = [line.split(" | ")[4] for line in block(text, "Published by others")[1:]]
    assert measured == ["85.0", "70.0", "80.0", ABSENT]


def test_a_published_average_of_a_data_set_stands_beside_that_of_its_categories(keep, runs, tmp_path):
    for category, auroc in (("MPDD/tubes", 60), ("MPDD/connector", 80), ("VisA/candle", 10)):
        keep(category, "A", 0, LEVEL, shots=1, image_AUROC=auroc)
    published = {"model": "A", "metric": "image_AUROC", "value": "1", "source": "Them"}
    categories = ("MPDD/average, 1 shot", "VisA/average, 1 shot", "average, 1 shot", "MPDD/average")
    reference = [{"category": category, **published} for category in categories]
    text = write_report(read_records(runs), tmp_path / "out", "it", reference=reference)[0].read_text()
    measured = [line.split(" | ")[4] for line in block(text, "Published by others")[1:]]
    assert measured == ["70.0", "10.0", "50.0", ABSENT]


def test_what_was_run(text):
    assert block(text, "Settings in which a model differs")[1:] == ["| A | batch_size | 16 (memory) | all |"]
    assert block(text, "Configuration of all runs")[1:] == ["| image_size | [8, 16] |"]
    assert "| model.class_path | B | B |" in block(text, "Configuration that differs")
    assert block(text, "Environment:")[1:] == ["| torch | 2.10 |", "| time | 2025-01-01 to 2025-01-02 |"]
    assert "have different environments" not in text


def test_different_environments_are_noted(records, tmp_path):
    records[0] = replace(records[0], environment={"torch": "2.11"})
    text = write_report(records, tmp_path, "it")[0].read_text()
    assert "have different environments, so their costs may not be comparable: torch." in text
    _, differing = settings(records, lambda record: record.environment)
    assert ["torch", "2.11", str(records[0].key)] in [[cell.text for cell in row] for row in differing.rows]


def test_labels_are_text(written, page):
    html = written[1].read_text()
    assert "<b>x</b>" not in html
    assert ("title", {}) in page.tags
    assert page.text.count(ODD) > 5
    assert any(attrs.get("alt") == f"{ODD}, map of dent/0.png, score 0.40" for _, attrs in page.tags)


def test_page_needs_nothing_else(written, page):
    html = written[1].read_text()
    links = [attrs[name] for _, attrs in page.tags for name in ("src", "href", "srcset", "action") if name in attrs]
    assert links
    assert all(link.startswith(("data:", "#")) for link in links)
    assert "url(" not in html
    assert "@import" not in html
    assert not {tag for tag, _ in page.tags} & {"link", "iframe", "object", "embed", "base"}
    (policy,) = [attrs["content"] for tag, attrs in page.tags if "http-equiv" in attrs]
    assert "default-src 'none'" in policy
    identifiers = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(set(identifiers)) == len(identifiers)
    assert {link[1:] for link in links if link.startswith("#")} <= set(identifiers)


def test_page_is_accessible(page):
    assert ("html", {"lang": "en"}) in page.tags
    assert all(attrs.get("scope") in ("row", "col") for tag, attrs in page.tags if tag == "th")
    assert all("alt" in attrs for tag, attrs in page.tags if tag == "img")
    regions = [attrs for _, attrs in page.tags if attrs.get("class") == "scroll"]
    assert len(regions) == len(page.tables)
    assert all((it["tabindex"], it["role"]) == ("0", "region") and it["aria-label"] for it in regions)
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


def test_curves_are_means_over_seeds(records):
    index = next(index for index, record in enumerate(records) if record.key == Key("screw", "A"))
    records[index] = replace(records[index], curves={"ROC": [[0, 1], [0, 1]]})
    screw, tray = group_records(records)
    (roc,) = charts(screw)
    assert [curve.label for curve in roc.curves] == [ODD, "A", "B"]
    middle = next(y for x, y in roc.curves[1].points if x == 0.5)
    assert middle == (0.5 + 1) / 2
    assert [chart.ticks[0][-1] for chart in charts(tray)] == ["1", "0.3"]
    # At the limit of 0.3 the overlap is 0.6.
    assert charts(tray)[1].curves[0].points[-1] == (1, 0.6)
    assert len({(curve.colour, curve.dash) for curve in roc.curves}) == 3


def test_histograms_count_each_class_as_shares(keep):
    (group,) = group_records([keep("screw", "A", 0, [0.9, 0.1, 0.1, 50], image_AUROC=90)])
    (it,) = histograms(group)
    assert (it.normal[0], sum(it.normal)) == (1, 1)
    assert sum(it.anomalous) == 1
    assert it.anomalous[-1] == 0.5
    assert it.outside == 1
    assert it.threshold == pytest.approx(0.4 / (it.high - it.low), rel=0.01)


def test_gallery_puts_failures_first(keep):
    wrong = [0.1, 0.3, 0.2, 0.8]  # the dent is missed, and ranks last instead of first
    group = group_records([keep("screw", "A", 0, PERFECT, pixel_AUROC=1), keep("screw", "B", 0, wrong)])[0]
    first, *_ = shown = pictures(group, 24)
    assert [picture.kind for picture in shown[:1]] == ["dent"]
    assert (first.wrong, first.disagreement) == (0.5, 0.5)
    assert [verdict.wrong for verdict in first.verdicts] == [False, True]
    assert [bool(verdict.map) for verdict in first.verdicts] == [True, False]
    assert first.size == (128, 64)
    assert first.image.startswith("data:image/jpeg")
    assert len(shown) == 4
    assert len(pictures(group, 2)) == 2


def test_gallery_shows_pictures_of_sixteen_bits_from_their_darkest_to_their_brightest(images, keep):
    for path in images:
        Image.fromarray(np.repeat(np.array([[300, 1100, 1900]], np.uint16), 20, axis=1).repeat(30, axis=0)).save(path)
    (first, *_) = pictures(group_records([keep("screw", "A", 0, PERFECT)])[0], 24)
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(first.image.partition(",")[2]))).convert("L"), dtype=int)
    assert shown[:, :20].mean() < 20
    assert 100 < shown[:, 54:74].mean() < 155
    assert shown[:, -20:].mean() > 235


@pytest.mark.parametrize("wrap", [dict, lambda data: {"init_args": {"datamodule": data}}], ids=["own", "few shots"])
@pytest.mark.parametrize("root", ["{tmp}", "{tmp}/data", "data", "elsewhere", None])
def test_gallery_shows_paths_from_the_root_of_the_data(keep, images, tmp_path, monkeypatch, root, wrap):
    monkeypatch.chdir(tmp_path)
    nested = tmp_path / "data" / "bad" / "line 2"
    nested.mkdir(parents=True)
    images[:] = [str(Path(image).rename(nested / Path(image).name)) if "dent" in image else image for image in images]
    data = wrap({"init_args": {} if root is None else {"root": root.format(tmp=tmp_path)}})
    record = keep("screw", "A", 0, PERFECT)
    group = group_records([replace(record, config={**record.config, "data": data})])[0]
    above = "data/" if root == "{tmp}" else ""
    shown = {picture.kind: picture.name for picture in pictures(group, 24)}
    assert shown["dent"].startswith(f"{above}bad/line 2/")
    assert shown["scratch"].startswith(f"{above}scratch/")


def test_gallery_has_what_models_disagree_on_too(keep):
    # Both miss the scratch, at one rank; they rank the normal images the other way round.
    group = group_records(
        [keep("screw", "A", 0, [0.9, 0.1, 0.4, 0.3]), keep("screw", "B", 0, [0.9, 0.4, 0.1, 0.3])],
    )[0]
    shown = pictures(group, 2)
    assert [(picture.kind, picture.wrong) for picture in shown] == [("scratch", 1), ("good", 0)]
    assert shown[1].disagreement == pytest.approx(1 / 3)


def test_image_that_is_gone_is_said_so(records, images, tmp_path):
    for path in images:
        open(path, "w").write("no image")  # noqa: PTH123, SIM115
    page = Page(write_report(records, tmp_path, "it")[1])
    assert page.text.count("The image file cannot be read.") == 8
    assert any(attrs.get("alt") == "ground-truth mask of scratch/3.png, outlined" for _, attrs in page.tags)


def test_report_without_maps_masks_or_metrics(keep, tmp_path):
    text, html = write_report([keep("screw", "A", 0, LEVEL)], tmp_path, "it", "A")
    assert "| A | baseline |" in text.read_text()
    assert Page(html).text.count("no map") == 4


def test_few_shots_stand_apart(keep, tmp_path):
    run = [keep("screw", "A", 0, LEVEL, shots=shots, image_AUROC=80) for shots in (1, 4)]
    page = Page(write_report(run, tmp_path, "it")[1])
    assert page.table("Results on screw, 1 shot,")
    assert page.table("Results on screw, 4 shots,")


def test_scores_that_are_not_a_number_have_no_interval(keep, tmp_path):
    run = [keep("screw", name, 0, scores, image_AUROC=80) for name, scores in (("A", LEVEL), ("B", [np.nan, 0, 0, 1]))]
    text, html = write_report(run, tmp_path, "it", "A")
    assert "B on screw, seed 0: 1 of 4 scores are NaN, so the run has no interval" in text.read_text()
    assert Page(html).table("Results on screw")[2] == ["B", "*80.0", ABSENT]


def test_report_of_failures_alone(tmp_path):
    failed = Record(Key("screw", "A"), error=TRACEBACK)
    text, html = write_report([failed], tmp_path, "it", "A")
    assert "MemoryError" in text.read_text()
    assert "1 run, 1 of them failed: 1 model, 1 category, 1 seed." in Page(html).text


def test_different_test_sets_are_refused(keep, tmp_path):
    run = [keep("screw", "A", 0, LEVEL), keep("screw", "B", 0, LEVEL, labels=np.array([1, 0, 1, 1]))]
    with pytest.raises(
        ValueError, match=r"A on screw, seed 0 and B on screw, seed 0 were tested on .* run one of them"
    ):
        write_report(run, tmp_path / "report", "it")
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"records": []}, "no runs to report on"),
        ({"baseline": "C"}, "baseline C is not one of the models; choose one of A"),
    ],
)
def test_nothing_to_report(keep, tmp_path, arguments, message):
    arguments = {"records": [keep("screw", "A", 0, LEVEL)], "output": tmp_path, "title": "it", **arguments}
    with pytest.raises(ValueError, match=message):
        write_report(**arguments)


def test_run_that_is_cut_off(records, tmp_path):
    broken = next(record.folder / "maps.npz" for record in records if (record.folder / "maps.npz").exists())
    broken.write_bytes(broken.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"cannot be read .* delete this folder"):
        write_report(records, tmp_path / "report", "it")


def test_records_do_not_keep_maps(records, tmp_path):
    write_report(records, tmp_path, "it", "A")
    assert not any("predictions" in vars(record) for record in records)


def test_old_report_stays_where_the_new_one_cannot_be_written(records, tmp_path, monkeypatch):
    text, _ = write_report(records, tmp_path, "first")
    before = text.read_text()

    def full(path, *_, **__):
        path.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full)
    with pytest.raises(OSError, match="No space left"):
        write_report(records, tmp_path, "second")
    assert text.read_text() == before
    assert not list(tmp_path.glob("*.partial"))
