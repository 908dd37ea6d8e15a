"""Self-contained HTML pages, which need no other file and no network."""

import base64
import io
from dataclasses import dataclass
from hashlib import sha256
from importlib.resources import files

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from PIL import Image

_PACKAGE = "anomalib_ot.drawing"


def render_page(package: str, name: str, **content: object) -> str:
    """Render a page with embedded style and script.

    A content security policy forbids all other scripts and all requests.

    Args:
        package: Package whose folder ``templates`` contains ``NAME.html``, which extends ``page.html`` and fills the
            blocks ``title`` and ``body``, ``NAME.css``, which is added to the common style, and ``NAME.js`` if the page
            has a script.
        name: Name of the templates.
        content: Variables of the template. Text is escaped.

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
    has_script = (files(package) / "templates" / f"{name}.js").is_file()
    script = _read(package, f"{name}.js") if has_script else ""
    return environment.get_template(f"{name}.html").render(
        style=_read(_PACKAGE, "page.css") + _read(package, f"{name}.css"),
        script=script,
        # The hash permits only this script, even if a label contains markup.
        script_hash=base64.b64encode(sha256(script.encode()).digest()).decode(),
        **content,
    )


@dataclass(frozen=True)
class Embedded:
    """An image on a page; the macro ``embedded`` of ``embedded.html`` shows it.

    Args:
        uri: Its pixels as a data URI.
        size: Its width and height in pixels.
    """

    uri: str
    size: tuple[int, int]

    @classmethod
    def of(cls, image: Image.Image, side: int | None = None) -> "Embedded":
        """Embed an image.

        Args:
            image: The image.
            side: Longest side in pixels, to which larger images are reduced.
        """
        if side is not None:
            image = image.copy()
            image.thumbnail((side, side))
        return cls(data_uri(image, "WEBP"), image.size)


def data_uri(image: Image.Image, form: str, **options: object) -> str:
    """Encode an image as a data URI.

    Args:
        image: The image.
        form: Pillow's name of the format, ``JPEG``, ``PNG`` or ``WEBP``.
        options: Further options of Pillow's encoder.

    Returns:
        The data URI.
    """
    buffer = io.BytesIO()
    image.save(buffer, form, **{"quality": 80, **options})
    return f"data:image/{form.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _read(package: str, name: str) -> str:
    return (files(package) / "templates" / name).read_text(encoding="utf-8")
