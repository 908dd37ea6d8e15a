"""The report in a real browser, with the network cut off."""

from functools import partial
from itertools import product

import numpy as np
import pytest
from PIL import Image

from anomalib_ot.comparison.record import Key, Predictions, Record, write_record
from anomalib_ot.comparison.report.page import write_report

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.slow

WIDTHS = (400, 1400)
MODELS = ('<img src="http://localhost/x">', "PaDiM", "A-model-with-a-name-that-is-much-longer-than-any-column")
KINDS = ["good", "dent", "a_kind_of_anomaly_with_a_long_name"]


def keep(runs, images, category, model, seed):
    generator = np.random.default_rng(seed)
    kinds = [kind for kind in KINDS for _ in range(4)]
    labels = np.repeat([0, 1, 1], 4)
    maps = generator.normal(size=(12, 16, 16))
    truth = (maps > 1.5) & (labels == 1)[:, None, None]
    scores = generator.random(12).astype(np.float32)
    pixel = ("pixel_AUROC", "pixel_F1Max", "pixel_AUPRO", "pixel_AUSPRO")
    metrics = {"image_AUROC": 80, "image_F1Max": 70, **dict.fromkeys(pixel, 60)}
    record = Record(
        Key(category, model, None, seed),
        config={"model": {"class_path": model, "path": "deep/" * 40}},
        metrics=metrics | {f"image_AUROC_{kind}": 50 for kind in KINDS[1:]},
        curves={"ROC": [[0, 0.2, 1], [0, 0.9, 1]], "PRO": [[0, 0.2, 1], [0, 0.9, 1]]},
        costs={"fit_s": 12.3, "ms_per_image": 4.5, "peak_mib": 1234.0, "parameters": 1e8},
        overrides={"batch_size": "16 (" + "memory " * 30 + ")"},
        environment={"torch": f"2.{seed}", "cpu": "x" * 200},
    )
    return write_record(runs, record, Predictions(images, kinds, labels, scores, maps, truth))


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    images = [str(folder / kind / f"{i}.png") for kind in KINDS for i in range(4)]
    for kind, i in product(KINDS, range(4)):
        (folder / kind).mkdir(exist_ok=True)
        Image.new("RGB", (64, 48), (60 * i, 90, 120)).save(folder / kind / f"{i}.png")
    records = [keep(folder / "runs", images, *key) for key in product(("screw", "tray/box"), MODELS, (0, 1))]
    error = "Traceback\n" + "  a long line " * 40 + "\nRuntimeError: " + "no_space_" * 60
    records.append(Record(Key("screw", "PaDiM", None, 2), error=error))
    reference = [
        {
            "category": "screw",
            "model": "PaDiM",
            "metric": "image_AUROC",
            "value": "81.3",
            "source": "http://a/" + "b" * 99,
        }
    ]
    return write_report(records, folder / "out", "Models side by side", "PaDiM", reference)[1]


@pytest.fixture
def visit(open_file, report):
    """Opens the report."""
    return partial(open_file, report)


def names(page):
    return [item.get_attribute("data-name") for item in page.query_selector_all("#pictures > li") if item.is_visible()]


def tab_to(page, selector, limit=60):
    for _ in range(limit):
        page.keyboard.press("Tab")
        if page.evaluate("selector => document.activeElement.matches(selector)", selector):
            return
    pytest.fail(f"Tab does not reach {selector}")


@pytest.mark.parametrize("width", WIDTHS)
def test_body_does_not_scroll_sideways(visit, width):
    page = visit(width)
    page.evaluate("document.querySelectorAll('details').forEach((it) => { it.open = true })")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    outside = """[...document.querySelectorAll('body *')].filter((it) => !it.closest('.scroll, pre')
        && it.getBoundingClientRect().right > innerWidth + 1).map((it) => it.outerHTML.slice(0, 90))"""
    assert page.evaluate(outside) == []


@pytest.mark.parametrize("width", WIDTHS)
def test_all_pictures_are_shown(visit, width):
    page = visit(width)
    assert page.evaluate("[...document.images].every((it) => it.complete && it.naturalWidth > 0)")
    assert len(page.query_selector_all("#pictures img")) == 24 * (1 + len(MODELS)) + 16
    assert len(names(page)) == 24


def test_label_of_a_model_makes_no_element(visit):
    page = visit()
    assert page.locator("th", has_text=MODELS[0]).count() > 0
    assert page.locator('img[src^="http"]').count() == 0


def test_skip_link_comes_first_and_leads_to_the_results(visit):
    page = visit()
    page.keyboard.press("Tab")
    link = page.locator(".skip:focus")
    assert link.is_visible()
    assert link.bounding_box()["x"] >= 0
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "results"
    tab_to(page, ".scroll", limit=1)


@pytest.mark.parametrize("width", WIDTHS)
def test_gallery_is_sorted_by_keyboard(visit, width):
    page = visit(width)
    first = names(page)
    tab_to(page, "#sort")
    page.keyboard.press("ArrowDown")
    by_disagreement = names(page)
    spread = [float(it.get_attribute("data-disagreement")) for it in page.query_selector_all("#pictures > li")]
    assert spread == sorted(spread, reverse=True)
    page.keyboard.press("ArrowDown")
    assert names(page) == sorted(first)
    assert len({tuple(first), tuple(by_disagreement), tuple(names(page))}) == 3
    tab_to(page, "button[type=reset]", limit=3)
    page.keyboard.press("Enter")
    sync_api.expect(page.locator("#pictures > li").first).to_have_attribute("data-failures", "1")
    assert names(page) == first


def test_gallery_is_filtered_by_keyboard(visit):
    page = visit()
    tab_to(page, "#category")
    page.keyboard.type("tray")
    assert page.locator("#count").text_content() == "12 of 24 images"
    page.keyboard.press("Tab")
    page.keyboard.type("dent")
    assert sorted(names(page)) == [f"dent/{i}.png" for i in range(4)]
    assert page.locator("#count").text_content() == "4 of 24 images"


def test_traceback_opens_by_keyboard(visit):
    page = visit()
    tab_to(page, ".failures summary")
    page.keyboard.press("Enter")
    assert page.locator(".failures pre").is_visible()


def test_report_is_read_without_script(visit):
    page = visit(java_script_enabled=False)
    assert page.locator("#pictures > li").count() == 24
    assert page.locator("#pictures > li").first.is_visible()
    assert not page.locator("#controls").is_visible()


def luminance(colour):
    values = np.array([float(value) for value in colour[colour.index("(") + 1 : -1].split(",")[:3]]) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]


def contrast(*colours):
    dark, light = sorted(map(luminance, colours))
    return (light + 0.05) / (dark + 0.05)


TEXTS = (
    "body",
    "p.about",
    "a",
    "figcaption",
    "thead th",
    "svg text",
    ".wrong",
    ".failures summary",
    ".warning",
    ".missing",
)
COLOURS = """(selector) => {
    const it = document.querySelector(selector);
    if (!it) return null;
    let ground = it;
    while (ground && getComputedStyle(ground).backgroundColor === 'rgba(0, 0, 0, 0)') ground = ground.parentElement;
    const style = getComputedStyle(it);
    return [it.closest('svg') ? style.fill : style.color, getComputedStyle(ground).backgroundColor];
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_have_contrast(visit, scheme):
    page = visit(color_scheme=scheme)
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (luminance(ground) > 0.5) == (scheme == "light")
    found = {selector: colours for selector in TEXTS if (colours := page.evaluate(COLOURS, selector))}
    assert {"body", "p.about", "a", ".wrong", ".warning"} <= set(found)
    assert {selector: contrast(*colours) for selector, colours in found.items() if contrast(*colours) < 4.5} == {}
    lines = "(it) => [...Array(8).keys()].map((i) => getComputedStyle(document.body).getPropertyValue(`--c${i}`))"
    paints = [(int(it[1:3], 16), int(it[3:5], 16), int(it[5:7], 16)) for it in map(full_hex, page.evaluate(lines))]
    assert min(contrast(f"rgb{paint}", ground) for paint in paints) >= 3


def full_hex(colour):
    colour = colour.strip()
    return colour if len(colour) == 7 else "#" + "".join(2 * digit for digit in colour[1:])
