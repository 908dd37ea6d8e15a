"""Explain what a fitted model says of some pictures: all views, the numbers behind them, and a page that lists them."""

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from itertools import count as count_from
from pathlib import Path
from typing import Any

from anomalib.models.components import AnomalibModule
from matplotlib.figure import Figure
from PIL import Image

from anomalib_ot.drawing.figures import FORMATS, pixels_of, require_formats, save
from anomalib_ot.drawing.html import data_uri, render_page
from anomalib_ot.drawing.pictures import Picture, pictures_of
from anomalib_ot.files import claim, replacing, require_ours, write_text
from anomalib_ot.host.checkpoint_files import read_checkpoint
from anomalib_ot.host.checkpoints import recorded_model
from anomalib_ot.models import Foct, Pradot, WtFlow
from anomalib_ot.settings import require

from .data import Data, Items, paths_of, read_data
from .evidence import Evidence, NormalScores, image_scores
from .selection import REASONS, asked_for, telling
from .views import MODEL_VIEWS, PICTURE_VIEWS, VIEWS, Subject, View, views_of

logger = logging.getLogger(__name__)

# Parts of a model by which a checkpoint is known that does not record its model.
_PARTS: dict[str, type[AnomalibModule]] = {
    "model.prototypes.": Pradot,
    "model.semantic.": Foct,
    "model.heads.": WtFlow,
}
_PAGE = "index.html"
_THUMBNAIL = 1100


@dataclass(frozen=True)
class Drawing:
    """A view on the page.

    Args:
        about: What it shows.
        link: Its file, from the page.
        thumbnail: A small picture of it as a data URI, empty if there is none.
        size: Width and height of that, in pixels.
    """

    about: str
    link: str
    thumbnail: str = ""
    size: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Explained:
    """What was written about a picture.

    Args:
        evidence: The numbers.
        reason: Why it was chosen.
        drawings: Its views.
    """

    evidence: Evidence
    reason: str
    drawings: list[Drawing]


def explain(
    ckpt_path: Path,
    data: str | dict[str, Any],
    output: Path,
    root: Path | None = None,
    model: str | None = None,
    pictures: Sequence[str] | None = None,
    count: int = len(REASONS),
    views: Sequence[str] | None = None,
    pixel: tuple[float, float] | None = None,
    formats: Sequence[str] = FORMATS,
    seed: int = 0,
) -> tuple[Path, list[Explained]]:
    """Write all views of some pictures and of the model that judges them.

    Each picture has a folder ``FOLDER/NAME`` with its views and ``evidence.json``, the model one by its name, and
    ``index.html`` lists them. A folder is written whole or not at all; those of other pictures stay, and so does all
    that was not written by this function.

    Args:
        ckpt_path: Checkpoint of a fitted Foct, Pradot or WtFlow.
        data: Data module, by class as for anomalib, or a picture or a folder of them.
        output: Folder to write to.
        root: Folder that the data module's relative root is meant from.
        model: Name of the model's class; by default what the checkpoint is of.
        pictures: Names of the pictures, as ``scratch/003`` or ``003``, or files or folders of others; by default some
            are chosen.
        count: Number of pictures to choose: by turns those with the highest scores, those nearest to the threshold, and
            usual normal ones.
        views: Names of the views; by default all that can be drawn.
        pixel: Pixel of each picture whose transport is drawn, from the left and from the top, as the model sees it; by
            default the highest of its map.
        formats: Formats of the figures, of png, svg and pdf.
        seed: Seed of what is drawn at random.

    Returns:
        The page, and what was written about each picture.

    Raises:
        ValueError: If an argument is unknown, a picture cannot be found or read, or the checkpoint is not of a fitted
            model of ours.
        FileNotFoundError: If there is no such checkpoint.
        FileExistsError: If something else has a name in ``output`` that is needed.
    """
    require(count >= 1, "count", "at least 1", count)
    require(pictures is None or bool(pictures), "pictures", "at least one, or left out", pictures)
    require_formats(formats)
    kind = _class_of_checkpoint(ckpt_path, model)
    views_of(kind, views)
    require_place(kind, output)
    # Checkpoints did not always have a split.
    found = read_data(data, root, read_checkpoint(ckpt_path).get("split"))
    asked = asked_for(found, pictures) if pictures is not None else None
    fitted = kind.load_from_checkpoint(ckpt_path, map_location="cpu").eval()
    scores = {} if asked is not None else _scores(fitted, found.shown)
    subject = Subject(fitted, found, normal_scores(fitted, found, scores), seed, pixel)
    chosen = telling(fitted, found, scores, count) if asked is None else asked
    prepared = pictures_of(fitted, (each.read() for each in chosen))
    pictures_and_reasons = zip(prepared, (each.reason for each in chosen), strict=True)
    return write_views(subject, pictures_and_reasons, output, views, formats, str(ckpt_path))


def require_place(model: type[AnomalibModule], output: Path) -> None:
    """Refuse a folder in which the page, or the folder of a model, is something that we did not write."""
    require_ours(output, _PAGE)
    require_ours(output / model.__name__)


def normal_scores(model: AnomalibModule, data: Data, known: Mapping[str, float] | None = None) -> NormalScores:
    """Scores of the normal pictures that are held out.

    Args:
        model: A fitted model of ours.
        data: The pictures.
        known: Scores that need not be computed again, by path.

    Returns:
        The scores, or why there are none.
    """
    paths = paths_of(data.held_out)
    scores = dict(known or {})
    missing = [data.held_out[index] for index, path in enumerate(paths) if path not in scores]
    scores |= _scores(model, missing)
    return NormalScores({path: scores[path] for path in paths}, data.why_none)


def _class_of_checkpoint(path: Path, name: str | None) -> type[AnomalibModule]:
    """The class of the model in a checkpoint, as it records it, or else by the names of its tensors."""
    classes = {each.__name__: each for each in _PARTS.values()}
    require(name is None or name in classes, "model", tuple(classes), name)
    if not path.is_file():
        msg = f"there is no checkpoint {path}"
        raise FileNotFoundError(msg)
    if name is not None:
        return classes[name]
    content = read_checkpoint(path)
    recorded = recorded_model(content)
    if recorded in classes:
        return classes[recorded]
    if recorded is None:
        for part, kind in _PARTS.items():
            if any(tensor.startswith(part) for tensor in content["state_dict"]):
                return kind
    other = f"{recorded}, " if recorded else ""
    msg = f"{path} is of {other}none of {', '.join(classes)}; other models have no such views"
    raise ValueError(msg)


def _scores(model: AnomalibModule, items: Items) -> dict[str, float]:
    return image_scores(model, pictures_of(model, (items[index] for index in range(len(items)))))


def write_views(
    subject: Subject,
    pictures: Iterable[tuple[Picture, str]],
    output: Path,
    views: Sequence[str] | None = None,
    formats: Sequence[str] = FORMATS,
    checkpoint: str = "",
) -> tuple[Path, list[Explained]]:
    """Write views of pictures and of the model, and the page that lists them.

    Args:
        subject: The model, and what its views are drawn from.
        pictures: The pictures, each with the reason why it was chosen.
        output: Folder to write to; what is there of other pictures stays.
        views: Names of the views; by default all that can be drawn.
        formats: Formats of the figures.
        checkpoint: What the page names as the model's checkpoint.

    Returns:
        The page, and what was written about each picture.

    Raises:
        ValueError: If a view is unknown, or one that is asked for cannot be drawn.
        FileExistsError: If something else has a name in ``output`` that is needed.
    """
    names = views_of(type(subject.model), views)
    lacking = lacking_views(subject, views)
    require_place(type(subject.model), output)
    claim(output, _PAGE)
    for name, why in lacking.items():
        logger.info("Leaving out %s: %s.", name, why)
    about = {"model": subject.model.name, "checkpoint": checkpoint, "data": subject.data.name, "seed": subject.seed}
    of_pictures, of_model = (
        [name for name in names if name in table and name not in lacking] for table in (PICTURE_VIEWS, MODEL_VIEWS)
    )
    explained: list[Explained] = []
    for picture, reason in pictures:
        unique = _unused(picture, explained, subject.model.name)
        logger.info("Drawing %s", unique.name)
        explained.append(_write_picture(subject, unique, reason, of_pictures, output, formats, about))
    shown = [each.evidence.picture for each in explained]
    page = render_page(
        "anomalib_ot.explain",
        "explain",
        about=about,
        explained=explained,
        of_model=_write_model(subject, shown, of_model, output, formats),
        lacking=lacking,
        others=_others(output, shown),
    )
    return write_text(output / _PAGE, page), explained


def lacking_views(subject: Subject, views: Sequence[str] | None = None) -> dict[str, str]:
    """Views that cannot be drawn, with the reason why.

    Raises:
        ValueError: If a view is unknown, or one that is asked for is among them.
    """
    names = views_of(type(subject.model), views)
    lacking = {name: why for name in names if (why := VIEWS[name].missing(subject))}
    if views is not None and lacking:
        name, why = next(iter(lacking.items()))
        msg = f"the view {name} cannot be drawn: {why}"
        raise ValueError(msg)
    return lacking


def _write_picture(
    subject: Subject,
    picture: Picture,
    reason: str,
    names: Sequence[str],
    output: Path,
    formats: Sequence[str],
    about: Mapping[str, Any],
) -> Explained:
    """Write the views and the numbers of a picture."""
    evidence = subject.evidence(picture)
    numbers = {**evidence.to_dict(), "chosen_as": reason, **about}
    drawings = []
    with replacing(output / picture.name) as folder:
        (folder / "evidence.json").write_text(json.dumps(numbers, indent=1, ensure_ascii=False), encoding="utf-8")
        for name in names:
            view = PICTURE_VIEWS[name]
            drawings += _save(view, view.draw(subject, picture), folder, picture.name, formats)
    return Explained(evidence, reason, drawings)


def _unused(picture: Picture, others: Sequence[Explained], model: str) -> Picture:
    """A picture with a name that none of the others has, nor the page or the folder of the model."""
    names = {_PAGE, model, *(other.evidence.picture.name for other in others)}
    first, *rest = Path(picture.name).parts
    name = "-".join((first, *rest)) if first in {_PAGE, model} else picture.name
    candidates = chain([name], (f"{name}-{number}" for number in count_from(2)))
    return replace(picture, name=next(each for each in candidates if each not in names))


def _write_model(
    subject: Subject, pictures: Sequence[Picture], names: Sequence[str], output: Path, formats: Sequence[str]
) -> list[Drawing]:
    """Write the views of the model, if there are any to write."""
    if not names:
        return []
    place = subject.model.name
    with replacing(output / place) as folder:
        drawings = []
        for name in names:
            view = MODEL_VIEWS[name]
            before = {*folder.iterdir()}
            figures = view.draw(subject, pictures, folder)
            # What a view writes itself is no figure.
            drawings += [Drawing(view.about, f"{place}/{path.name}") for path in {*folder.iterdir()} - before]
            drawings += _save(view, figures, folder, place, formats)
    return drawings


def _save(view: View, figures: dict[str, Figure], folder: Path, place: str, formats: Sequence[str]) -> list[Drawing]:
    drawings = []
    for name, figure in figures.items():
        first, *_ = save(figure, folder / name, formats)
        image = Image.fromarray(pixels_of(figure)).convert("RGB")
        image.thumbnail((_THUMBNAIL, _THUMBNAIL))
        drawings.append(Drawing(view.about, f"{place}/{first.name}", data_uri(image, "WEBP"), image.size))
    return drawings


def _others(output: Path, pictures: Sequence[Picture]) -> list[str]:
    """Folders of pictures that were explained before."""
    found = [path.parent for pattern in ("*", "*/*") for path in output.glob(f"{pattern}/evidence.json")]
    # What was broken off lies under hidden names.
    folders = {path.relative_to(output).as_posix() for path in found if not path.name.startswith(".")}
    return sorted(folders - {picture.name for picture in pictures})


def summary(explained: Explained) -> str:
    """One line of what the model says of a picture."""
    evidence = explained.evidence
    verdict = {True: "anomalous", False: "normal", None: "no threshold"}[evidence.is_anomalous]
    return (
        f"{evidence.picture.name}: {verdict}, score {evidence.score_in_words()}, {evidence.p_value_in_words()} "
        f"({explained.reason})"
    )
