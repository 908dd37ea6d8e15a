"""What the page of a small model holds."""

import base64
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from anomalib_ot.drawing.pictures import Picture, stack
from anomalib_ot.models.pradot import PradotModel, PradotSettings
from anomalib_ot.models.pradot.views.cells import write_page
from anomalib_ot.models.pradot.views.prototypes import nearest_patches

ODD = 'bad</script><img src="http://localhost/x">/"0" & \'1\''
WEIGHTS = [0, 0.1, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1]


class Page(HTMLParser):
    """Text, tags and data of a page."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.text, self.script = [], "", None
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        if tag == "script":
            self.script = attrs.get("type")

    def handle_endtag(self, tag):
        self.script = None if tag == "script" else self.script

    def handle_data(self, data):
        if self.script == "application/json":
            self.data = json.loads(data)
        else:
            self.text += data


def unpack(packed):
    values = np.frombuffer(base64.b64decode(packed["values"]), np.dtype(packed["type"]).newbyteorder("<"))
    return values.astype(np.int64) * packed.get("unit", 1)


@pytest.fixture(scope="module")
def pictures():
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    return [
        Picture(name, image, image, label)
        for name, image, label in zip((ODD, "good/1"), images, (True, None), strict=True)
    ]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = PradotModel(
        PradotSettings(
            backbone="test_resnet",
            layers=["layer2", "layer3"],
            pre_trained=False,
            prototypes_per_cell=[2, 1],
            alphas=[0.0, 0.25],
            whitened_channels=0,
        )
    ).eval()
    model.initialise(model.extract(torch.rand(2, 3, 64, 64)))
    return model


@pytest.fixture(scope="module")
def patches(model, pictures):
    return nearest_patches(model, pictures)


@pytest.fixture(scope="module")
def written(model, pictures, tmp_path_factory):
    return write_page(model, pictures, tmp_path_factory.mktemp("page") / "deep" / "page.html")


@pytest.fixture(scope="module")
def page(written):
    return Page(written)


def sets(page):
    return [each for layer in page.data["layers"] for each in layer["sets"]]


def test_layers_sets_and_weights_are_those_of_the_model(page):
    layers = page.data["layers"]
    assert [(it["name"], it["rows"], it["columns"]) for it in layers] == [("layer2", 8, 8), ("layer3", 4, 4)]
    assert [(it["alpha"], it["count"]) for it in sets(page)] == [(0, 128), (0.25, 128), (0, 16), (0.25, 16)]
    # Those learned with are among the weights to score with.
    assert page.data["weights"] == WEIGHTS


def test_costs_are_those_of_the_model(page, model, pictures):
    embeddings = model.embeddings(stack(pictures))
    for it, (layer, prototypes) in zip(sets(page), model.by_layer(), strict=True):
        shape = (len(WEIGHTS), 2, *embeddings[layer].shape[-2:])
        feature, space = (unpack(it[part]).reshape(shape) for part in ("features", "spaces"))
        at = WEIGHTS.index(prototypes.alpha)
        score = (1 - prototypes.alpha) * feature[at] + prototypes.alpha * space[at]
        np.testing.assert_allclose(score, prototypes(embeddings[layer])[:, 0].numpy(), atol=3e-5)
        for weight, *parts in zip(WEIGHTS, feature, space, strict=True):
            expected = prototypes.assign(embeddings[layer], weight)
            for part, wanted in zip(parts, (expected.feature, expected.space), strict=True):
                np.testing.assert_allclose(part, wanted.numpy(), atol=3e-5)


def test_prototypes_are_those_of_the_model(page, model, pictures):
    embeddings = model.embeddings(stack(pictures))
    for it, (layer, prototypes) in zip(sets(page), model.by_layer(), strict=True):
        winners, numbers = unpack(it["winners"]), unpack(it["numbers"])
        expected = [prototypes.assign(embeddings[layer], weight).prototype.flatten() for weight in WEIGHTS]
        np.testing.assert_array_equal(numbers[winners], torch.cat(expected))
        places = unpack(it["coordinates"]).reshape(-1, 2)[winners]
        np.testing.assert_allclose(places, prototypes.coordinates[torch.cat(expected)].numpy(), atol=2e-5)


def test_scale_of_a_layer_reaches_the_highest_cost(page, model, pictures):
    embeddings = model.embeddings(stack(pictures))
    for layer in page.data["layers"]:
        maps = embeddings[layer["name"]]
        scores = [
            prototypes.assign(maps, weight).score(weight).max()
            for name, prototypes in model.by_layer()
            for weight in WEIGHTS
            if name == layer["name"]
        ]
        assert layer["highest"] == pytest.approx(float(max(scores)))


def test_sheet_has_the_patch_of_each_prototype_that_is_shown(model, pictures, patches, tmp_path):
    page = Page(write_page(model, pictures, tmp_path / "page.html", patches))
    for it, nearest in zip(sets(page), patches.values(), strict=True):
        numbers = unpack(it["numbers"])
        sheet = np.asarray(Image.open(io.BytesIO(base64.b64decode(it["sheet"].partition(",")[2]))))
        side = it["patch"][0]
        assert sheet.shape[1] == it["across"] * side
        blocks = [
            sheet[row * side : (row + 1) * side, column * side : (column + 1) * side]
            for row, column in (divmod(index, it["across"]) for index in range(len(numbers)))
        ]
        wanted = nearest.patches[torch.from_numpy(numbers)].permute(0, 2, 3, 1).numpy() * 255
        # The mean outlives the compression of noise.
        np.testing.assert_allclose(np.mean(blocks, axis=(1, 2)), wanted.mean((1, 2)), atol=8)
        assert [it["names"][index] for index in unpack(it["pictures"])] == [nearest.pictures[i] for i in numbers]
        np.testing.assert_array_equal(unpack(it["cells"]), nearest.cells[torch.from_numpy(numbers)])


def test_names_are_text(written, page):
    assert page.text.count(ODD) == 1
    assert "bad</script>" not in written.read_text()
    assert len([tag for tag, _ in page.tags if tag == "img"]) == 2
    assert page.text.count("anomalous") == 1
    assert "normal\n" not in page.text


def test_names_of_training_pictures_are_text(model, pictures, patches, tmp_path):
    path = write_page(model, pictures, tmp_path / "page.html", patches)
    assert "</script><img" not in path.read_text()
    assert ODD in {name for it in sets(Page(path)) for name in it["names"]}


def test_page_needs_nothing_else(written, page):
    html = written.read_text()
    links = [attrs[name] for _, attrs in page.tags for name in ("src", "href", "srcset", "action") if name in attrs]
    assert links
    assert all(link.startswith(("data:", "#")) for link in links)
    assert "url(" not in html
    assert "@import" not in html
    assert not {tag for tag, _ in page.tags} & {"link", "iframe", "object", "embed", "base"}
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    (policy,) = [attrs["content"] for _, attrs in page.tags if "http-equiv" in attrs]
    assert re.search(r"default-src 'none'; .*script-src 'sha256-[^']+';", policy)


def test_same_pictures_give_the_same_page(model, pictures, written, tmp_path):
    assert write_page(model, pictures, tmp_path / "page.html").read_bytes() == written.read_bytes()


def test_without_pictures_there_is_no_page(model, tmp_path):
    with pytest.raises(ValueError, match="no images to show; give one or more"):
        write_page(model, [], tmp_path / "page.html")


def test_patches_of_another_model_are_refused(model, pictures, patches, tmp_path):
    key = ("layer3", 0.25)
    for others in (
        {},
        {other: it for other, it in patches.items() if other != key},
        {**patches, key: replace(patches[key], patches=patches[key].patches[1:])},
    ):
        with pytest.raises(ValueError, match=r"patches must be those of this model; layer. with alpha"):
            write_page(model, pictures, tmp_path / "page.html", others)
    assert not (tmp_path / "page.html").exists()


def test_model_that_is_not_fitted_is_refused(pictures, tmp_path):
    with pytest.raises(RuntimeError, match="no prototypes yet"):
        write_page(
            PradotModel(PradotSettings(backbone="test_resnet", layers=["layer3"], pre_trained=False)).eval(),
            pictures,
            tmp_path / "page.html",
        )
