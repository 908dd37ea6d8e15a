"""Explain the scores of a fitted model: views, their numbers, and a page that lists them."""

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

from anomalib_ot import MODELS
from anomalib_ot.drawing.data import Data, Items, paths_of
from anomalib_ot.drawing.figures import FORMATS, embedded, require_formats, save
from anomalib_ot.drawing.html import Embedded, render_page
from anomalib_ot.drawing.pictures import Picture, pictures_of
from anomalib_ot.drawing.views import Subject, View
from anomalib_ot.files import claim, replacing, require_ours, write_text
from anomalib_ot.host.asked_post_processing import require_sensitivities
from anomalib_ot.host.checkpoint_class import class_of, recorded_name
from anomalib_ot.host.checkpoint_files import read_checkpoint
from anomalib_ot.host.checkpoint_record import described
from anomalib_ot.host.image_check import recorded_reading
from anomalib_ot.settings import require

from .data import read_data
from .evidence import Evidence, NormalScores, image_scores
from .selection import REASONS, informative, requested
from .views import ScoredSubject, views_of

logger = logging.getLogger(__name__)

_PAGE = "index.html"
_THUMBNAIL = 1100


@dataclass(frozen=True)
class Drawing:
    """A view on the page.

    Args:
        about: Description of the view.
        link: Path of its file, relative to the page.
        thumbnail: Its thumbnail, if it is a figure.
    """

    about: str
    link: str
    thumbnail: Embedded | None = None


@dataclass(frozen=True)
class Explained:
    """The explanation of an image.

    Args:
        evidence: The evidence.
        reason: Why the image was chosen.
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
    post_processing: Mapping[str, float] | None = None,
) -> tuple[Path, list[Explained]]:
    """Write all views of some images and of the model.

    Each image has a folder ``FOLDER/NAME`` with its views and ``evidence.json``. The model has a folder with its name.
    ``index.html`` lists them. Each folder is written completely or not at all. Folders of other images and
    foreign files do not change.

    Args:
        ckpt_path: Checkpoint of a fitted model of this package.
        data: Data module, by class as for anomalib, or an image or a folder of images.
        output: Folder to write to.
        root: Base folder of the data module's relative root.
        model: Name of the model's class in ``anomalib_ot.MODELS``; by default the class in the checkpoint.
        pictures: Names of images such as ``scratch/003`` or ``003``, or files or folders of other images; by default
            some images are chosen.
        count: Number of images to choose, alternately with the highest score, nearest to the threshold, and typical
            normal.
        views: Names of the views; by default all that can be drawn.
        pixel: Pixel that a view explains, from the left and from the top of the model's input; by default the highest
            pixel of the map.
        formats: Formats of the figures: png, svg and pdf.
        seed: Seed of random choices.
        post_processing: Settings that replace those of the checkpoint: ``false_alarm_rate`` in (0, 1), or, for
            anomalib's post-processor, ``image_sensitivity`` and ``pixel_sensitivity`` in [0, 1].

    Returns:
        The page, and the explanation of each image.

    Raises:
        ValueError: If an argument is invalid, an image cannot be found or read, or the checkpoint does not contain a
            fitted model of this package.
        FileNotFoundError: If the checkpoint does not exist.
        FileExistsError: If ``output`` contains a foreign file of a name that is needed.
    """
    require(count >= 1, "count", "at least 1", count)
    require(pictures is None or bool(pictures), "pictures", "at least one, or left out", pictures)
    require_formats(formats)
    settings = post_processing or {}
    require_sensitivities(settings)
    require(model is None or model in MODELS, "model", tuple(MODELS), model)
    content = read_checkpoint(ckpt_path)
    kind = class_of(model or recorded_name(content, ckpt_path))
    views_of(kind, views)
    require_place(kind, output)
    # Checkpoints of earlier versions have no split.
    found = read_data(data, root, content.get("split"), recorded_reading(content))
    asked = requested(found, pictures) if pictures is not None else None
    fitted = kind.load_from_checkpoint(ckpt_path, map_location="cpu").eval()
    for name, value in settings.items():
        if not hasattr(fitted.post_processor, name):
            theirs = described(fitted.post_processor)
            msg = f"{name} cannot be used with this checkpoint, which has the post_processor {theirs}; leave it out"
            raise ValueError(msg)
        setattr(fitted.post_processor, name, value)
    scores = {} if asked is not None else _scores(fitted, found.shown)
    subject = ScoredSubject(fitted, found, normal_scores(fitted, found, scores), seed, pixel)
    chosen = informative(fitted, found, scores, count) if asked is None else asked
    prepared = pictures_of(fitted, (each.read() for each in chosen))
    pictures_and_reasons = zip(prepared, (each.reason for each in chosen), strict=True)
    return write_views(subject, pictures_and_reasons, output, views, formats, str(ckpt_path))


def require_place(model: type[AnomalibModule], output: Path) -> None:
    """Refuse an output folder whose page or model folder has foreign files."""
    require_ours(output, _PAGE)
    require_ours(output / model.__name__)


def normal_scores(model: AnomalibModule, data: Data, known: Mapping[str, float] | None = None) -> NormalScores:
    """Calibration scores of the post-processor, or scores of the held-out normal images if it has none.

    Args:
        model: A fitted model of this package.
        data: The images.
        known: Scores by path that need not be computed again.

    Returns:
        The scores, or the reason why there are none.
    """
    if calibration := NormalScores.of_calibration(model):
        return calibration
    paths = paths_of(data.held_out)
    scores = dict(known or {})
    missing = [data.held_out[index] for index, path in enumerate(paths) if path not in scores]
    scores |= _scores(model, missing)
    return NormalScores({path: scores[path] for path in paths}, data.why_none)


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
    """Write the views of images and of the model, and the page that lists them.

    Args:
        subject: The model, and the data of its views.
        pictures: The images, each with the reason why it was chosen.
        output: Folder to write to. Folders of other images do not change.
        views: Names of the views; by default all that can be drawn.
        formats: Formats of the figures.
        checkpoint: Path of the checkpoint that the page shows.

    Returns:
        The page, and the explanation of each image.

    Raises:
        ValueError: If a view is unknown, or a requested view cannot be drawn.
        FileExistsError: If ``output`` contains a foreign file of a name that is needed.
    """
    wanted = views_of(type(subject.model), views)
    lacking = lacking_views(subject, views)
    require_place(type(subject.model), output)
    claim(output, _PAGE)
    for name, why in lacking.items():
        logger.info("Omitting the view %s: %s.", name, why)
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
    """Views that cannot be drawn, with the reasons.

    Raises:
        ValueError: If a view is unknown, or a requested view cannot be drawn.
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
    """Write the views and the numbers of an image."""
    evidence = subject.evidence(picture)
    numbers = {**evidence.to_dict(), "chosen_as": reason, **about}
    drawings = []
    with replacing(output / picture.name) as folder:
        write_text(folder / "evidence.json", json.dumps(numbers, indent=1, ensure_ascii=False))
        for view in views.values():
            drawings += _save(view, view.draw(subject, picture), folder, picture.name, formats)
    return Explained(evidence, reason, drawings)


def _unused(picture: Picture, others: Sequence[Explained], model: str) -> Picture:
    """The image with a name that differs from the other images, the page and the folder of the model."""
    names = {_PAGE, model, *(other.evidence.picture.name for other in others)}
    first, *rest = Path(picture.name).parts
    name = "-".join((first, *rest)) if first in {_PAGE, model} else picture.name
    candidates = chain([name], (f"{name}-{number}" for number in count_from(2)))
    return replace(picture, name=next(each for each in candidates if each not in names))


def _write_model(
    subject: Subject, pictures: Sequence[Picture], views: Mapping[str, View], output: Path, formats: Sequence[str]
) -> list[Drawing]:
    """Write the views of the model, if there are any."""
    if not views:
        return []
    place = subject.model.name
    with replacing(output / place) as folder:
        drawings = []
        for view in views.values():
            before = {*folder.iterdir()}
            figures = view.draw(subject, pictures, folder)
            # Files that a view writes itself are not figures.
            drawings += [Drawing(view.about, f"{place}/{path.name}") for path in {*folder.iterdir()} - before]
            drawings += _save(view, figures, folder, place, formats)
    return drawings


def _save(view: View, figures: dict[str, Figure], folder: Path, place: str, formats: Sequence[str]) -> list[Drawing]:
    drawings = []
    for name, figure in figures.items():
        first, *_ = save(figure, folder / name, formats)
        drawings.append(Drawing(view.about, f"{place}/{first.name}", embedded(figure, _THUMBNAIL)))
    return drawings


def _others(output: Path, pictures: Sequence[Picture]) -> list[str]:
    """Folders of images that were explained before."""
    found = [path.parent for pattern in ("*", "*/*") for path in output.glob(f"{pattern}/evidence.json")]
    # Interrupted writes leave hidden folders.
    folders = {path.relative_to(output).as_posix() for path in found if not path.name.startswith(".")}
    return sorted(folders - {picture.name for picture in pictures})


def summary(explained: Explained) -> str:
    """One line with the prediction for an image."""
    evidence = explained.evidence
    verdict = {True: "anomalous", False: "normal", None: "no threshold"}[evidence.is_anomalous]
    return (
        f"{evidence.picture.name}: {verdict}, score {evidence.score_in_words()}, {evidence.p_value_in_words()} "
        f"({explained.reason})"
    )
