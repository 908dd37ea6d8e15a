"""Monitor the images of a folder with the model of a checkpoint."""

import csv
import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext, suppress
from functools import partial
from io import StringIO
from itertools import chain
from pathlib import Path
from typing import Any

from anomalib.models.components import AnomalibModule
from torch import Tensor

from anomalib_ot.data.full_range import images_read
from anomalib_ot.decide.conformal import require_rate
from anomalib_ot.decide.drift import DriftMonitor
from anomalib_ot.decide.post_processor import ConformalPostProcessor
from anomalib_ot.drawing.pictures import pictures_of
from anomalib_ot.explain.evidence import scored_map
from anomalib_ot.files import claim, require_ours, write_text
from anomalib_ot.host.calibration import HELD_OUT, TRAINED, clause
from anomalib_ot.host.checkpoint_class import class_of, recorded_name
from anomalib_ot.host.checkpoint_files import read_checkpoint
from anomalib_ot.host.checkpoint_record import described
from anomalib_ot.images.folder import images_in, require_stream, stream_of
from anomalib_ot.images.reading import (
    EIGHT_BITS,
    Reading,
    ValueRange,
    check_value_range,
    naming_unreadable,
    reading_asked_for,
)
from anomalib_ot.logs import errors_alone
from anomalib_ot.settings import require_whole

from .appearance import appearance_of
from .course import SCORE, Course, Seen, named
from .page import drift_page

logger = logging.getLogger(__name__)

# Of an image: the value of each quantity, and the raw map (h, w).
Measure = Callable[[Path], tuple[dict[str, float], Tensor]]

TABLE = "drift.csv"
PAGE = "drift.html"
_COLUMNS = ("path", "score_raw", "p_value", "martingale", "alarm")
_PROGRESS = 500
# Share of the promised rate, by quantity. They sum to 1, so that the rate bounds the alarms of all.
PARTS = {SCORE: 0.5, "brightness": 0.25, "sharpness": 0.25}


def monitor(
    ckpt_path: Path,
    data: Path,
    output: Path,
    watch: float | None = None,
    reference: Path | None = None,
    false_alarm_rate: float = 0.01,
    seed: int = 0,
    *,
    appearance: bool = True,
    value_range: ValueRange | None = None,
) -> tuple[Path, Course]:
    """Score the images of a folder in the order of their paths, and write ``drift.csv`` and ``drift.html``.

    Args:
        ckpt_path: Checkpoint of a fitted model of this package.
        data: Folder of the images.
        output: Folder to write to. Foreign files do not change.
        watch: Seconds between two looks at a growing folder, which is followed until the command is interrupted; by
            default, the folder is read once.
        reference: Folder of good images to compare with, which the model was not trained on; by default, the images
            are compared with the calibration scores of the checkpoint.
        false_alarm_rate: Promised probability of a false alarm over the whole stream, in (0, 1).
        seed: Seed of the smoothing of p-values.
        appearance: Whether to watch the brightness and the sharpness of the images too. They are compared with those of
            the reference, or of the stream alone.
        value_range: Values that map to black and white in images with more than 8 bits per channel; by default, these
            are read as in the training.

    Returns:
        The page, and what the monitor has seen.

    Raises:
        ValueError: If an argument is invalid, no image can be read, the checkpoint does not contain a fitted model of
            this package, or there is nothing to compare with.
        FileNotFoundError: If the checkpoint or a folder does not exist, or a folder that is not watched is empty.
        FileExistsError: If ``output`` contains foreign files of these names.
    """
    require_rate("false_alarm_rate", false_alarm_rate)
    require_whole(0, "seed", seed)
    check_value_range(value_range)
    require_stream(data, watch)
    if reference is not None:
        require_stream(reference)
    require_ours(output, TABLE, PAGE)
    model = _fitted(ckpt_path)
    reading = reading_asked_for(value_range, getattr(model, "reading", EIGHT_BITS))
    rates = {name: part * false_alarm_rate for name, part in PARTS.items()} if appearance else {SCORE: false_alarm_rate}
    measure = partial(_measured, model, reading, appearance=appearance)
    course = (
        _calibrated(model, ckpt_path, rates, seed)
        if reference is None
        else _referenced(measure, reference, rates, seed)
    )
    about = {
        "model": model.name,
        "checkpoint": str(ckpt_path),
        "data": str(data),
        "reference": reference,
        "value_range": reading.value_range,
    }
    claim(output, TABLE, PAGE)
    # An interruption is the usual end of watching.
    with nullcontext() if watch is None else suppress(KeyboardInterrupt):
        for paths in stream_of(data, watch, course.skipped):
            alarms = len(course.alarms)
            try:
                _add(measure, paths, course)
            finally:
                _write_table(course, output)
            # The page of a folder that is read once follows below.
            if watch is not None:
                _write_page(course, output, about)
                if len(course.alarms) > alarms:
                    logger.warning("%s", summary(course))
    page = _write_page(course, output, about)
    if not course.seen and watch is None:
        first = next(iter(course.skipped.values()))
        msg = f"none of the {len(course.skipped)} images of {data} can be scored; the first error: {first}"
        raise ValueError(msg)
    return page, course


def summary(course: Course) -> str:
    """One line with the result for a stream."""
    skipped = f", {len(course.skipped)} skipped" if course.skipped else ""
    counts = f"{len(course.seen)} images{skipped}"
    if course.alarms:
        return f"{counts}: {'; '.join(_drift(course, quantity) for quantity in course.alarms)}"
    states = course.seen[-1].states if course.seen else {}
    values = ", ".join(
        f"{name} {states[name].martingale if states else 1.0:.3g} of {monitor.threshold:.6g}"
        for name, monitor in course.monitors.items()
    )
    return f"{counts}: no drift (martingales: {values})"


def _drift(course: Course, quantity: str) -> str:
    direction = "higher" if course.is_higher(quantity) else "lower"
    change = " to ".join(f"{each:.4g}" for each in course.medians(quantity))
    since, alarm = course.since(quantity)[0].path, course.alarms[quantity].path
    return f"drift to {direction} {named(quantity)} ({change}), probably since {since}, alarm at {alarm}"


def _fitted(path: Path) -> AnomalibModule:
    kind = class_of(recorded_name(read_checkpoint(path), path))
    # A monitor gives no verdicts, so that the rate of the model's own threshold does not matter.
    with errors_alone(ConformalPostProcessor.__module__):
        return kind.load_from_checkpoint(path, map_location="cpu").eval()


def _calibrated(model: AnomalibModule, path: Path, rates: Mapping[str, float], seed: int) -> Course:
    """Monitors that compare scores with the calibration of a checkpoint, and all else with the stream alone."""
    processor: Any = model.post_processor
    if not isinstance(processor, ConformalPostProcessor) or not processor.is_calibrated("image"):
        msg = (
            f"{path} has no scores of good images (its post_processor is {described(processor)}); set reference to a "
            "folder of good images that the model was not trained on, or train with ConformalPostProcessor"
        )
        raise ValueError(msg)
    if processor.calibration_source == TRAINED:
        msg = (
            f"{path} has scores of good images that the model was trained on, and new ones score higher without any "
            "drift; set reference to a folder of good images that the model was not trained on"
        )
        raise ValueError(msg)
    is_held_out = processor.calibration_source == HELD_OUT
    if not is_held_out:
        logger.info(
            "Watching for higher scores only: the calibration scores are those of good images that %s, and this model, "
            "which knows more images, scores good ones slightly lower. To watch for lower scores too, set reference to "
            "a folder of good images that the model was not trained on.",
            clause(processor.calibration_source),
        )
    scores = processor.image_calibration.cpu().numpy()
    monitors = {name: DriftMonitor(None, rate, seed) for name, rate in rates.items() if name != SCORE}
    return Course({SCORE: DriftMonitor(scores, rates[SCORE], seed, watch_lower=is_held_out), **monitors})


def _referenced(measure: Measure, folder: Path, rates: Mapping[str, float], seed: int) -> Course:
    """Monitors that compare with the images of a folder."""
    known = [measure(path) for path in images_in(folder)]
    monitors = {name: DriftMonitor([values[name] for values, _ in known], rate, seed) for name, rate in rates.items()}
    return Course(monitors, (each for _, each in known))


def _measured(
    model: AnomalibModule, reading: Reading, path: Path, *, appearance: bool
) -> tuple[dict[str, float], Tensor]:
    """Raw score of an image, with its brightness and sharpness if these are watched, and its raw map (h, w).

    Raises:
        ValueError: If it cannot be read.
    """
    item: Any
    # A reader of ours names the file itself.
    with nullcontext() if reading.is_full_range else naming_unreadable(path):
        item = images_read(path, reading)[0]
    (picture,) = pictures_of(model, [item])
    score, anomaly_map = scored_map(model, picture)
    return {SCORE: score, **(appearance_of(item.image) if appearance else {})}, anomaly_map


def _add(measure: Measure, paths: Iterable[Path], course: Course) -> None:
    """Add images to the course; those that cannot be scored are skipped."""
    for path in paths:
        try:
            course.add(path, *measure(path))
        except (FileNotFoundError, ValueError) as error:
            course.skipped[path] = str(error)
            logger.warning("Skipping %s: %s", path, error)
            continue
        course.skipped.pop(path, None)
        if not len(course.seen) % _PROGRESS:
            logger.info("Scored %d images", len(course.seen))


def _row(seen: Seen, others: Iterable[str]) -> tuple[str, ...]:
    """The row of an image, with the quantities other than the score."""
    state = seen.states[SCORE]
    return (
        str(seen.path),
        f"{seen.values[SCORE]:.9g}",
        f"{state.p_value:.6g}",
        f"{state.martingale:.6g}",
        "yes" if any(each.is_alarm for each in seen.states.values()) else "no",
        *chain.from_iterable((f"{seen.values[name]:.9g}", f"{seen.states[name].martingale:.6g}") for name in others),
    )


def _write_table(course: Course, output: Path) -> None:
    """Write all rows at once, so that monitors with the same output do not mix theirs."""
    rows = StringIO(newline="")
    table = csv.writer(rows, lineterminator="\n")
    others = [name for name in course.monitors if name != SCORE]
    table.writerow((*_COLUMNS, *chain.from_iterable((name, f"martingale_{name}") for name in others)))
    table.writerows(_row(seen, others) for seen in course.seen)
    write_text(output / TABLE, rows.getvalue())


def _write_page(course: Course, output: Path, about: dict[str, Any]) -> Path:
    return write_text(output / PAGE, drift_page(course, about, summary(course)))
