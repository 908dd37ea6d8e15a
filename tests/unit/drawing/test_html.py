import base64
import io
import re
from hashlib import sha256

import pytest
from jinja2 import UndefinedError
from PIL import Image

from anomalib_ot.drawing.html import data_uri, render_page


@pytest.fixture
def package(tmp_path, monkeypatch):
    templates = tmp_path / "some_view" / "templates"
    templates.mkdir(parents=True)
    (templates.parent / "__init__.py").touch()
    (templates / "it.html").write_text(
        '{% extends "page.html" %}{% block title %}{{ label }}{% endblock %}'
        "{% block body %}<p>{{ label }}</p>{% endblock %}"
    )
    (templates / "it.css").write_text("p { margin: 7px; }")
    (templates / "it.js").write_text('"use strict"; const within = 1 < 2;')
    monkeypatch.syspath_prepend(tmp_path)
    return "some_view"


def test_page_has_its_style_after_the_common_one(package):
    page = render_page(package, "it", label="")
    assert 0 < page.index("--ground") < page.index("margin: 7px") < page.index("</style>")


def test_only_the_script_of_the_page_may_run(package):
    page = render_page(package, "it", label="<script>alert(1)</script>")
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    assert script == '"use strict"; const within = 1 < 2;'
    allowed = base64.b64encode(sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'" in page


def test_text_is_escaped(package):
    page = render_page(package, "it", label="<b>&")
    assert "<title>&lt;b&gt;&amp;</title>" in page
    assert "<p>&lt;b&gt;&amp;</p>" in page


def test_what_a_template_shows_must_be_given(package):
    with pytest.raises(UndefinedError, match="label"):
        render_page(package, "it")


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_picture_is_part_of_its_uri(form):
    uri = data_uri(Image.new("RGB", (5, 3), "teal"), form)
    head, _, content = uri.partition(",")
    assert head == f"data:image/{form.lower()};base64"
    image = Image.open(io.BytesIO(base64.b64decode(content)))
    assert (image.format, image.size) == (form, (5, 3))
