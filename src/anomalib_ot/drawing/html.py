"""HTML pages that need no other file and no network."""

import base64
import io
from hashlib import sha256
from importlib.resources import files

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from PIL import Image

_PACKAGE = "anomalib_ot.drawing"


def render_page(package: str, name: str, **content: object) -> str:
    """Fill in a page, with its style and its script within.

    Nothing but this script may run in the page, and nothing is fetched: a content security policy forbids both.

    Args:
        package: Package whose folder ``templates`` has ``NAME.html``, which extends ``page.html`` and fills the blocks
            ``title`` and ``body``, ``NAME.css``, which follows the common style, and ``NAME.js``.
        name: Name of the page's templates.
        content: What the template shows; text is escaped.

    Returns:
        The page.
    """
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package), PackageLoader(_PACKAGE)]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = _read(package, f"{name}.js")
    return environment.get_template(f"{name}.html").render(
        style=_read(_PACKAGE, "page.css") + _read(package, f"{name}.css"),
        script=script,
        # Only this very script may run, whatever a label says.
        script_hash=base64.b64encode(sha256(script.encode()).digest()).decode(),
        **content,
    )


def data_uri(image: Image.Image, form: str, **options: object) -> str:
    """A picture as part of a page.

    Args:
        image: The picture.
        form: Pillow's name of the format, ``JPEG``, ``PNG`` or ``WEBP``.
        options: What Pillow's encoder of the format takes besides.

    Returns:
        Its data URI.
    """
    buffer = io.BytesIO()
    image.save(buffer, form, **{"quality": 80, **options})
    return f"data:image/{form.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _read(package: str, name: str) -> str:
    return (files(package) / "templates" / name).read_text(encoding="utf-8")
