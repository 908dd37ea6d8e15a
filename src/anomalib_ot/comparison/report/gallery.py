"""The gallery of test images, with the maps and scores of each model."""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain
from os.path import commonpath
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageFilter
from scipy.stats import rankdata

from anomalib_ot.comparison.record import Predictions, Record
from anomalib_ot.drawing.figures import COLOURS
from anomalib_ot.drawing.html import data_uri
from anomalib_ot.host.class_paths import root_of
from anomalib_ot.images.reading import deep_values, naming_unreadable

from .groups import Group

SIDE = 128
_THRESHOLD = 0.5
_OUTLINE = (0, 229, 255)


@dataclass(frozen=True)
class Verdict:
    """Prediction of a model for an image.

    Args:
        model: Label of the model.
        score: Image score; 0.5 is the threshold.
        wrong: Whether the score is on the wrong side of the threshold.
        map: Anomaly map as a data URI; empty if the model has no maps.
        p_value: P-value of the score; None if the model is not calibrated.
    """

    model: str
    score: float
    wrong: bool
    map: str
    p_value: float | None = None


@dataclass(frozen=True)
class Picture:
    """A row of the gallery.

    Args:
        name: Path of the image from the root of the data.
        kind: Kind of anomaly, or ``good``.
        group: Title of its group.
        anomalous: Whether the image is anomalous.
        wrong: Share of the models that misclassify it.
        disagreement: Standard deviation over the models of the rank of its score in [0, 1].
        image: Thumbnail as a data URI; empty if the file cannot be read.
        truth: Thumbnail with the outline of the ground-truth mask; empty if there is no mask.
        size: Width and height of all its thumbnails in pixels.
        verdicts: Prediction of each model.
    """

    name: str
    kind: str
    group: str
    anomalous: bool
    wrong: float
    disagreement: float
    image: str
    truth: str
    size: tuple[int, int]
    verdicts: list[Verdict]


def failures_first(picture: Picture) -> tuple[float, float, str, str, str]:
    """Sort key: images that most models misclassify come first, then those on which the models disagree."""
    return -picture.wrong, -picture.disagreement, picture.group, picture.kind, picture.name


def pictures(group: Group, count: int) -> list[Picture]:
    """Choose at most ``count`` images of a group.

    Images that most models misclassify and images on which the models disagree most are chosen alternately. Each model
    is represented by its first seed. Images are matched by kind and file name.
    """
    runs = [runs[0] for runs in group.runs.values() if runs]
    if not runs:
        return []
    scores, labels = zip(*(_ordered(group.scores[run.key]) for run in runs), strict=True)
    wrong = (np.stack(scores) > _THRESHOLD) != labels[0].astype(bool)
    disagreement = _disagreement(np.stack(scores))
    chosen = _choose(wrong.mean(0), disagreement, count)
    looks = [_look(run, chosen) for run in runs]
    root = root_of(runs[0].config.get("data", {}))
    places = [*_roots(root), *_roots(_common_folder(group.scores[runs[0].key].images))]
    made = []
    for row, index in enumerate(chosen):
        sources = [look[row] for look in looks]
        size, image, truth = _photograph(sources)
        verdicts = [
            Verdict(run.key.model, source.score, bool(wrong[model, index]), _map_uri(source.map, size), source.p_value)
            for model, (run, source) in enumerate(zip(runs, sources, strict=True))
        ]
        first = sources[0]
        share, spread = float(wrong[:, index].mean()), float(disagreement[index])
        name, anomalous = _name(Path(first.image), places), bool(labels[0][index])
        made.append(Picture(name, first.kind, group.title, anomalous, share, spread, image, truth, size, verdicts))
    return made


def _roots(folder: Path | None) -> list[Path]:
    """The forms of a folder with which the paths of images may begin."""
    return [] if folder is None else [folder, folder.absolute(), folder.resolve()]


def _common_folder(images: Sequence[str]) -> Path | None:
    """The deepest common folder that is above the folder of each image; None if there is no common folder."""
    with suppress(ValueError):
        return Path(commonpath([Path(image).parent.parent for image in images]))
    return None


def _name(image: Path, roots: Sequence[Path]) -> str:
    """Path of an image from the first root that contains it, or from the folder above its own folder."""
    root = next((root for root in roots if image.is_relative_to(root)), image.parent.parent)
    return image.relative_to(root).as_posix()


def colour_scale() -> str:
    """The colour scale of the maps from 0 (left) to 1 (right), as a data URI."""
    return data_uri(_coloured(np.linspace(0, 1, 64)[None]), "PNG")


@dataclass(frozen=True)
class _Source:
    """The predictions of one model for one image."""

    image: str
    kind: str
    score: float
    map: NDArray[np.floating[Any]] | None
    truth: NDArray[np.bool_] | None
    p_value: float | None


def _ordered(predictions: Predictions) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    order = predictions.name_order()
    return predictions.scores[order], predictions.labels[order]


def _disagreement(scores: NDArray[np.float32]) -> NDArray[np.float64]:
    """Standard deviation over models (rows) of the rank of each image (columns), with ranks scaled to [0, 1]."""
    ranks = rankdata(np.nan_to_num(scores, nan=-np.inf), axis=1) - 1
    return np.asarray((ranks / max(scores.shape[1] - 1, 1)).std(0))


def _choose(wrong: NDArray[np.float64], disagreement: NDArray[np.float64], count: int) -> list[int]:
    by_failure = np.lexsort((-disagreement, -wrong)).tolist()
    by_disagreement = np.argsort(-disagreement, kind="stable").tolist()
    by_turns = chain.from_iterable(zip(by_failure, by_disagreement, strict=True))
    return list(dict.fromkeys(by_turns))[:count]


def _look(run: Record, chosen: Sequence[int]) -> list[_Source]:
    """Predictions of a run for the chosen images. Its other maps are released."""
    predictions = replace(run).predictions
    order = predictions.name_order()
    return [
        _Source(
            predictions.images[index],
            predictions.kinds[index],
            float(predictions.scores[index]),
            None if predictions.maps is None else predictions.maps[index].astype(np.float32),
            None if predictions.truth is None else predictions.truth[index],
            None if predictions.p_values is None else float(predictions.p_values[index]),
        )
        for index in (order[position] for position in chosen)
    ]


def _photograph(sources: Sequence[_Source]) -> tuple[tuple[int, int], str, str]:
    """Size and thumbnails of an image, without and with the outline of the defects, from the first readable file."""
    truth = next((source.truth for source in sources if source.truth is not None and source.truth.any()), None)
    thumbnail = _thumbnail(dict.fromkeys(source.image for source in sources))
    if thumbnail:
        size, image = thumbnail.size, data_uri(thumbnail, "JPEG")
    else:
        shapes = (source.map.shape for source in sources if source.map is not None)
        size, image = _fit(*next(shapes, (SIDE, SIDE))[::-1]), ""
    if truth is None:
        return size, image, ""
    return size, image, data_uri(_outlined(thumbnail or Image.new("RGB", size, "gray"), truth), "JPEG")


def _thumbnail(paths: Iterable[str]) -> Image.Image | None:
    for path in paths:
        # The file may be missing, truncated or not an image.
        with suppress(FileNotFoundError, ValueError):
            image = _opened(path)
            return image.resize(_fit(*image.size), Image.Resampling.LANCZOS)
    return None


def _opened(path: str) -> Image.Image:
    """An image with eight bits a channel. Images of more bits are stretched from their lowest to highest value."""
    found = deep_values(path)
    if found is None:
        with naming_unreadable(path), Image.open(path) as image:
            return image.convert("RGB")
    values = found[0].astype(np.float64)
    stretched = (values - values.min()) / max(values.max() - values.min(), np.finfo(np.float64).tiny)
    return Image.fromarray((255 * stretched).astype(np.uint8)).convert("RGB")


def _fit(width: int, height: int) -> tuple[int, int]:
    scale = SIDE / max(width, height)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _outlined(thumbnail: Image.Image, truth: NDArray[np.bool_]) -> Image.Image:
    """The thumbnail with a bright outline around the defects and a dark one around it, visible on any background."""
    mask = Image.fromarray(truth.astype(np.uint8) * 255).resize(thumbnail.size, Image.Resampling.NEAREST)
    wide, wider = (mask.filter(ImageFilter.MaxFilter(size)) for size in (3, 5))
    outlined = thumbnail.copy()
    outlined.paste((0, 0, 0), mask=ImageChops.subtract(wider, wide))
    outlined.paste(_OUTLINE, mask=ImageChops.subtract(wide, mask))
    return outlined


def _map_uri(anomaly_map: NDArray[np.floating[Any]] | None, size: tuple[int, int]) -> str:
    if anomaly_map is None:
        return ""
    return data_uri(_coloured(anomaly_map).resize(size, Image.Resampling.BILINEAR), "WEBP")


def _coloured(values: NDArray[np.floating[Any]]) -> Image.Image:
    return Image.fromarray(colormaps[COLOURS](np.nan_to_num(values).clip(0, 1), bytes=True)[..., :3].copy())
