"""The page of a Pradot in a real browser, with the network cut off."""

import re

import numpy as np
import pytest
import torch

from anomalib_ot.drawing.pictures import Picture, stack
from anomalib_ot.models.pradot import PradotModel, PradotSettings
from anomalib_ot.models.pradot.views.cells import write_page
from anomalib_ot.models.pradot.views.prototypes import nearest_patches
from anomalib_ot.transport import grid_coordinates

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.slow

WIDTHS = (400, 1400)
NAMES = ('<img src="http://localhost/x">/1', "a_kind_of_anomaly_with_a_long_name/000_and_more", "good/2")
SIZE = (64, 96)
GRID = (8, 12)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = PradotModel(
        PradotSettings(
            backbone="resnet18",
            layers=["layer2", "layer3"],
            pre_trained=False,
            prototypes_per_cell=2,
            alphas=[0.0, 0.3],
            whitened_channels=0,
        )
    ).eval()
    model.initialise(model.extract(torch.rand(4, 3, *SIZE)))
    return model


@pytest.fixture(scope="module")
def pictures():
    images = torch.rand(3, 3, *SIZE, generator=torch.Generator().manual_seed(1))
    return [
        Picture(name, image, image, label)
        for name, image, label in zip(NAMES, images, (True, False, None), strict=True)
    ]


@pytest.fixture(scope="module")
def written(model, pictures, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "page.html"
    return write_page(model, pictures, path, nearest_patches(model, pictures))


@pytest.fixture
def visit(open_file, written):
    """Opens a page, and waits until it has drawn a cell."""

    def visit(width=1400, path=written, **options):
        page = open_file(path, width, **options)
        if options.get("java_script_enabled", True):
            sync_api.expect(page.locator("#cost")).not_to_be_empty()
        return page

    return visit


def settle(page):
    """Waits until what was asked for is drawn."""
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def pixels(page, canvas):
    return page.evaluate("(id) => document.getElementById(id).toDataURL()", canvas)


def hover(page, row, column, view="picture", grid=GRID):
    box = page.locator(f"#{view}").bounding_box()
    x, y = ((index + 0.5) / count for index, count in zip((column, row), grid[::-1], strict=True))
    page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"])
    settle(page)


def set_weight(page, weight):
    slider = page.locator("#weight")
    slider.evaluate("(it, value) => { it.value = value; it.dispatchEvent(new Event('input')); }", round(10 * weight))
    settle(page)


def read(page):
    """What the page says of the cell: its place and the prototype's, both counted from 1, and the costs."""
    text = page.locator("#sentence").text_content()
    number = r"([\d.]+)"
    found = re.match(
        rf"The cell at row {number}, column {number} costs {number}, rank {number} of {number}: look {number}, "
        rf"place {number}. Its prototype is no. {number} of {number}, at row {number}, column {number}, as in (.+), "
        rf"row {number}, column {number}\.",
        text,
    )
    assert found, text
    return found.groups()


def expected(model, pictures, picture, layer, alpha, weight, row, column):
    """The same of what torch computes."""
    prototypes = model.prototypes_of(layer, alpha)
    embeddings = model.embeddings(stack(pictures))[layer]
    grid = embeddings.shape[-2:]
    it = prototypes.assign(embeddings, weight)
    scores = it.score(weight)[picture]
    index = int(it.prototype[picture, row, column])
    place = (prototypes.coordinates[index] * (torch.tensor(grid) - 1)).round(decimals=1) + 1
    rank = 1 + int((scores > scores[row, column] + 1e-4).sum())
    look, space = (1 - weight) * it.feature[picture, row, column], weight * it.space[picture, row, column]
    patch = nearest_patches(model, pictures)[layer, alpha]
    source = grid_coordinates(*grid)[patch.cells[index]] * (torch.tensor(grid) - 1) + 1
    numbers = [row + 1, column + 1, scores[row, column], rank, scores.numel(), look, space, index + 1]
    numbers += [len(prototypes.features), *place, *source]
    return [float(each) for each in numbers], patch.pictures[index]


@pytest.mark.parametrize("view", ["picture", "map"])
@pytest.mark.parametrize(("layer", "grid"), [("layer2", (8, 12)), ("layer3", (4, 6))])
@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_hovering_shows_what_torch_computes(visit, model, pictures, view, layer, grid, alpha):
    page = visit()
    page.get_by_label("good/2").check(force=True)
    page.select_option("#layer", str(model.layers.index(layer)))
    page.select_option("#set", "1" if alpha else "0")
    for weight, row, column in ((None, 2, 3), (0.5, 3, 5)):
        if weight is not None:
            set_weight(page, weight)
        hover(page, row, column, view, grid)
        *numbers, source, source_row, source_column = read(page)
        wanted, picture = expected(model, pictures, 2, layer, alpha, alpha if weight is None else weight, row, column)
        assert [float(it) for it in (*numbers, source_row, source_column)] == pytest.approx(wanted, abs=6e-4)
        assert source == picture


def test_details_say_what_the_sentence_says(visit):
    page = visit()
    hover(page, 4, 7)
    row, column, cost, rank, cells, look, place, number, count, there, across, *_ = read(page)
    text = page.locator("#details").inner_text()
    for part in (
        cost,
        f"rank {rank} of {cells}",
        look,
        place,
        f"no. {number} of {count}",
        f"row {row}, column {column}",
    ):
        assert part in text
    assert f"row {there}, column {across}" in page.locator("#prototype-place").inner_text()


def test_moving_alpha_changes_the_map(visit):
    page = visit()
    seen = []
    for weight in (0, 0.3, 0.7):
        set_weight(page, weight)
        seen.append((pixels(page, "map"), pixels(page, "picture")))
    assert all(len(set(each)) == 3 for each in zip(*seen, strict=True))
    set_weight(page, 0)
    assert (pixels(page, "map"), pixels(page, "picture")) == seen[0]
    assert page.locator("#weight").get_attribute("aria-valuetext").endswith("= 0 (learned)")


def test_map_has_the_colours_of_the_costs(visit, model, pictures):
    page = visit()
    # The outline of the cell is far from where the colours are looked at.
    hover(page, 0, 0)
    scores = model.prototypes_of("layer2", 0.0)(model.embeddings(stack(pictures))["layer2"])[0, 0]
    read_all = """() => {
        const canvas = document.getElementById('map');
        return [canvas.width, ...canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data];
    }"""
    width, *values = page.evaluate(read_all)
    shown = np.array(values).reshape(-1, width, 4)[..., :3].sum(-1)
    middles = [
        ((np.arange(count) + 0.5) * side / count).astype(int) for count, side in zip(GRID, shown.shape, strict=True)
    ]
    brightness = shown[np.ix_(*middles)]
    assert np.corrcoef(brightness[5:, 7:].flatten(), scores[5:, 7:].flatten().numpy())[0, 1] > 0.95


def test_the_cell_is_cut_from_the_picture(visit, pictures):
    page = visit()
    hover(page, 5, 9)
    middle = "() => [...document.getElementById('cell-patch').getContext('2d').getImageData(0, 0, 104, 104).data]"
    shown = np.array(page.evaluate(middle)).reshape(104, 104, 4)[..., :3].mean((0, 1))
    wanted = pictures[0].image[:, 40:48, 72:80].mean((1, 2)).numpy() * 255
    np.testing.assert_allclose(shown, wanted, atol=10)


def test_overlay_follows_its_slider(visit):
    page = visit()
    before = pixels(page, "picture"), pixels(page, "map")
    page.locator("#opacity").focus()
    page.keyboard.press("Home")
    settle(page)
    assert pixels(page, "picture") != before[0]
    assert pixels(page, "map") == before[1]
    assert page.locator("#opacity-value").text_content() == "0 %"


def place(page):
    return tuple(int(it) - 1 for it in read(page)[:2])


@pytest.mark.parametrize("view", ["picture", "map"])
def test_arrow_keys_move_from_cell_to_cell(visit, view):
    page = visit()
    hover(page, 4, 7)
    page.locator(f"#{view}-stage").focus()
    before = pixels(page, view)
    moves = {"ArrowRight": (4, 8), "ArrowDown": (5, 8), "ArrowLeft": (5, 7), "ArrowUp": (4, 7), "Home": (4, 0)}
    for key, there in moves.items():
        page.keyboard.press(key)
        settle(page)
        assert place(page) == there
    page.keyboard.press("ArrowLeft")
    settle(page)
    assert place(page) == (4, 0)
    assert pixels(page, view) != before
    page.keyboard.press("End")
    settle(page)
    assert place(page) == (4, 11)
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"


def tab_to(page, selector, limit=30):
    for _ in range(limit):
        page.keyboard.press("Tab")
        if page.evaluate("selector => document.activeElement.matches(selector)", selector):
            return
    pytest.fail(f"Tab does not reach {selector}")


def test_all_is_reached_by_keyboard(visit):
    page = visit()
    page.keyboard.press("Tab")
    assert page.locator(".skip:focus").bounding_box()["x"] >= 0
    tab_to(page, "#pictures input", limit=1)
    first = pixels(page, "picture")
    page.keyboard.press("ArrowRight")
    settle(page)
    assert pixels(page, "picture") != first
    tab_to(page, "#layer")
    page.keyboard.press("ArrowDown")
    settle(page)
    assert read(page)[4] == "24"
    tab_to(page, "#set", limit=1)
    page.keyboard.press("ArrowDown")
    settle(page)
    assert page.locator("#weight-value").text_content() == "0.3 (learned)"
    for selector in ("#costliest", "#picture-stage", "#opacity", "#map-stage", "#weight"):
        tab_to(page, selector, limit=1)
    page.keyboard.press("ArrowRight")
    settle(page)
    assert page.locator("#weight-value").text_content() == "0.4"
    tab_to(page, "summary", limit=1)


def test_page_opens_at_the_costliest_cell_and_finds_it_again(visit):
    page = visit()
    first = read(page)
    assert first[3] == "1"
    hover(page, 4, 7)
    assert read(page)[3] != "1"
    page.locator("#costliest").click()
    settle(page)
    assert read(page) == first


def test_a_tap_chooses_a_cell(visit):
    page = visit(400, has_touch=True)
    box = page.locator("#picture").bounding_box()
    page.touchscreen.tap(box["x"] + box["width"] * 3.5 / 12, box["y"] + box["height"] * 2.5 / 8)
    settle(page)
    assert place(page) == (2, 3)


def test_without_patches_a_prototype_is_a_place(visit, model, pictures, tmp_path):
    page = visit(path=write_page(model, pictures, tmp_path / "page.html"))
    assert not page.locator("#prototype-patch").is_visible()
    assert re.search(r"row [\d.]+, column [\d.]+\nno\. \d+ of 192", page.locator("#prototype-place").inner_text())


@pytest.mark.parametrize("width", WIDTHS)
def test_body_does_not_scroll_sideways(visit, width):
    page = visit(width)
    page.evaluate("document.querySelectorAll('details').forEach((it) => { it.open = true })")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    outside = """[...document.querySelectorAll('body *')].filter((it) => !it.closest('#pictures')
        && it.getBoundingClientRect().right > innerWidth + 1).map((it) => it.outerHTML.slice(0, 90))"""
    assert page.evaluate(outside) == []


def test_names_make_no_elements(visit):
    page = visit()
    assert page.locator("#pictures label").nth(0).inner_text().startswith(NAMES[0])
    assert page.locator('img[src^="http"]').count() == 0


def test_without_script_the_page_says_so(visit):
    assert visit(java_script_enabled=False).locator("noscript b").is_visible()


def luminance(colour):
    values = np.array([float(value) for value in colour[colour.index("(") + 1 : -1].split(",")[:3]]) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]


def contrast(*colours):
    dark, light = sorted(map(luminance, colours))
    return (light + 0.05) / (dark + 0.05)


COLOURS = """() => [...document.querySelectorAll('body *')].filter((it) => it.checkVisibility()
        && !it.closest('select, noscript, .skip, .unseen')
        && [...it.childNodes].some((child) => child.nodeType === 3 && child.data.trim())).map((it) => {
    let ground = it;
    while (ground && getComputedStyle(ground).backgroundColor === 'rgba(0, 0, 0, 0)') ground = ground.parentElement;
    const style = getComputedStyle(it);
    const colour = it.closest('svg') ? style.fill : style.color;
    return [it.outerHTML.slice(0, 60), colour, getComputedStyle(ground).backgroundColor];
})"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_have_contrast(visit, scheme):
    page = visit(color_scheme=scheme)
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (luminance(ground) > 0.5) == (scheme == "light")
    found = page.evaluate(COLOURS)
    assert len(found) > 20
    assert [(text, colours) for text, *colours in found if contrast(*colours) < 4.5] == []
    paints = [
        page.evaluate("(it) => getComputedStyle(document.querySelector(it)).fill", f"path.{part}")
        for part in ("look", "place")
    ]
    assert min(contrast(paint, ground) for paint in paints) >= 3


def test_nothing_moves_by_itself(visit):
    page = visit(reduced_motion="reduce")
    assert page.evaluate("document.getAnimations().length") == 0
    moving = """[...document.querySelectorAll('*')].filter((it) => {
        const style = getComputedStyle(it);
        return style.animationName !== 'none' || parseFloat(style.transitionDuration) > 0;
    }).length"""
    assert page.evaluate(moving) == 0
