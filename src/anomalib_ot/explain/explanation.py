"""Explain what a fitted model says of some pictures: all views, the numbers behind them, and a page that lists them."""

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from itertools import chain
from itertools import count as count_from
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from anomalib.models.components import AnomalibModule
from matplotlib.figure import Figure
from PIL import Image

from anomalib_ot import MODELS
from anomalib_ot.drawing.data import Data, Items, paths_of
from anomalib_ot.drawing.figures import FORMATS, pixels_of, require_formats, save
from anomalib_ot.drawing.html import data_uri, render_page
from anomalib_ot.drawing.pictures import Picture, pictures_of
from anomalib_ot.drawing.views import Subject, View
from anomalib_ot.files import claim, replacing, require_ours, write_text
from anomalib_ot.host.asked_post_processing import require_sensitivities
from anomalib_ot.host.checkpoint_files import read_checkpoint
from anomalib_ot.host.checkpoint_record import recorded_model
from anomalib_ot.settings import require

from .data import read_data
from .evidence import Evidence, NormalScores, image_scores
from .selection import REASONS, asked_for, telling
from .views import ScoredSubject, views_of

if TYPE_CHECKING:
    from anomalib_ot.host.checkpoints import SafeCheckpoints

logger = logging.getLogger(__name__)

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
    sensitivities: Mapping[str, float] | None = None,
) -> tuple[Path, list[Explained]]:
    """Write all views of some pictures and of the model that judges them.

    Each picture has a folder ``FOLDER/NAME`` with its views and ``evidence.json``, the model one by its name, and
    ``index.html`` lists them. A folder is written whole or not at all; those of other pictures stay, and so does all
    that was not written by this function.

    Args:
        ckpt_path: Checkpoint of a fitted model of ours.
        data: Data module, by class as for anomalib, or a picture or a folder of them.
        output: Folder to write to.
        root: Folder that the data module's relative root is meant from.
        model: Name of the model's class in ``anomalib_ot.MODELS``; by default what the checkpoint is of.
        pictures: Names of the pictures, as ``scratch/003`` or ``003``, or files or folders of others; by default some
            are chosen.
        count: Number of pictures to choose: by turns those with the highest scores, those nearest to the threshold, and
            usual normal ones.
        views: Names of the views; by default all that can be drawn.
        pixel: Pixel of each picture that a view explains, from the left and from the top, as the model sees it; by
            default the highest of its map.
        formats: Formats of the figures, of png, svg and pdf.
        seed: Seed of what is drawn at random.
        sensitivities: ``image_sensitivity`` and ``pixel_sensitivity`` in [0, 1], in the place of the checkpoint's.

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
    require_sensitivities(sensitivities or {})
    kind = _class_of_checkpoint(ckpt_path, model)
    views_of(kind, views)
    require_place(kind, output)
    # Checkpoints did not always have a split.
    found = read_data(data, root, read_checkpoint(ckpt_path).get("split"))
    asked = asked_for(found, pictures) if pictures is not None else None
    fitted = kind.load_from_checkpoint(ckpt_path, map_location="cpu").eval()
    for name, value in (sensitivities or {}).items():
        setattr(fitted.post_processor, name, value)
    scores = {} if asked is not None else _scores(fitted, found.shown)
    subject = ScoredSubject(fitted, found, normal_scores(fitted, found, scores), seed, pixel)
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
    require(name is None or name in MODELS, "model", tuple(MODELS), name)
    if not path.is_file():
        msg = f"there is no checkpoint {path}"
        raise FileNotFoundError(msg)
    if name is not None:
        return _class_of(name)
    content = read_checkpoint(path)
    recorded = recorded_model(content)
    if recorded in MODELS:
        return _class_of(recorded)
    if recorded is None and (marked := _class_of_tensors(content["state_dict"])):
        return marked
    other = f"{recorded}, " if recorded else ""
    msg = f"{path} is of {other}none of {', '.join(MODELS)}; other models have no such views"
    raise ValueError(msg)


def _class_of(name: str) -> type[AnomalibModule]:
    """A model by its name."""
    return cast("type[AnomalibModule]", getattr(import_module(MODELS[name]), name))


def _class_of_tensors(tensors: Iterable[str]) -> type[AnomalibModule] | None:
    """The model that names of tensors mark, in a checkpoint of the first format."""
    names = tuple(tensors)
    for kind in map(_class_of, MODELS):
        marks = cast("type[SafeCheckpoints]", kind).checkpoint_rules.marks
        if any(name.startswith(marks) for name in names):
            return kind
    return None


def _scores(model: AnomalibModule, items: Items) -> dict[str, float]:
    return image_scores(model, pictures_of(model, (items[index] for index in range(len(items)))))


def write_views(
    subject: ScoredSubject,
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
    wanted = views_of(type(subject.model), views)
    lacking = lacking_views(subject, views)
    require_place(type(subject.model), output)
    claim(output, _PAGE)
    for name, why in lacking.items():
        logger.info("Leaving out %s: %s.", name, why)
    about = {"model": subject.model.name, "checkpoint": checkpoint, "data": subject.data.name, "seed": subject.seed}
    of_pictures, of_model = (
        {name: view for name, view in table.items() if name not in lacking}
        for table in (wanted.of_pictures, wanted.of_model)
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
    wanted = views_of(type(subject.model), views).all
    lacking = {name: why for name, view in wanted.items() if (why := view.missing(subject))}
    if views is not None and lacking:
        name, why = next(iter(lacking.items()))
        msg = f"the view {name} cannot be drawn: {why}"
        raise ValueError(msg)
    return lacking


def _write_picture(
    subject: ScoredSubject,
    picture: Picture,
    reason: str,
    views: Mapping[str, View],
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
        for view in views.values():
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
    subject: Subject, pictures: Sequence[Picture], views: Mapping[str, View], output: Path, formats: Sequence[str]
) -> list[Drawing]:
    """Write the views of the model, if there are any to write."""
    if not views:
        return []
    place = subject.model.name
    with replacing(output / place) as folder:
        drawings = []
        for view in views.values():
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
