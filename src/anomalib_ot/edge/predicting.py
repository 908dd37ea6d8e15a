"""Predict the images of a folder with an exported model."""

import logging
import warnings
from collections.abc import Iterable
from contextlib import closing, nullcontext, suppress
from pathlib import Path

from anomalib_ot.decide.conformal import UnsupportedRateWarning, require_rate, why_unsupported
from anomalib_ot.images.folder import require_apart, require_stream, stream_of
from anomalib_ot.images.reading import ValueRange, check_value_range, reading_asked_for
from anomalib_ot.prediction_table import TABLE

from .inferencer import EdgeInferencer, Prediction
from .inputs import pixels_of
from .results import Overlays, Results

logger = logging.getLogger(__name__)


def predict(
    model: Path,
    data: Path,
    output: Path,
    false_alarm_rate: float | None = None,
    watch: float | None = None,
    overlays: Overlays = "anomalous",
    value_range: ValueRange | None = None,
    device: str = "CPU",
) -> str:
    """Predict images in the order of their paths, and write ``predictions.csv``, ``predictions.json`` and overlays.

    Args:
        model: Exported ``model.xml``, or its folder.
        data: An image or a folder of images.
        output: Folder to write to. Results of an earlier run are moved to a folder in it; foreign files do not change.
        false_alarm_rate: Promised rate of false alarms, in (0, 1); by default that of the export.
        watch: Seconds between two looks at a growing folder, which is followed until the command is interrupted; by
            default, the folder is read once.
        overlays: Images to draw the heat map and the contour of the mask on.
        value_range: Values that map to black and white in images with more than 8 bits per channel; by default, those
            of the training.
        device: Device of OpenVINO.

    Returns:
        A line with the path of the table and the number of anomalous images.

    Raises:
        ValueError: If an argument is invalid, no image can be read, or the calibration is that of another export.
        FileNotFoundError: If there is no model, or no image.
        FileExistsError: If ``output`` contains foreign files of the names of results.
        ModuleNotFoundError: If OpenVINO is not installed.
    """
    _require_arguments(data, output, false_alarm_rate, watch, value_range)
    inferencer = EdgeInferencer(model, device)
    inferencer.require_decision(false_alarm_rate)
    _log_promise(inferencer, false_alarm_rate)
    reading = reading_asked_for(value_range, inferencer.reading)
    unreadable: dict[Path, str] = {}
    decision = inferencer.decision
    about = {
        "model": str(inferencer.path),
        "model_class": decision and decision.model,
        "false_alarm_rate": false_alarm_rate or (decision and decision.false_alarm_rate),
        "value_range": reading.value_range,
    }
    # An interruption is the usual end of watching.
    interruptible = nullcontext() if watch is None else suppress(KeyboardInterrupt)
    with closing(Results(output, about, overlays)) as results, warnings.catch_warnings(), interruptible:
        # Logged once already.
        warnings.simplefilter("ignore", UnsupportedRateWarning)
        for paths in stream_of(data, watch, unreadable) if data.is_dir() else [[data]]:
            _predict_each(inferencer, paths, data, results, unreadable, false_alarm_rate, reading.value_range)
    if unreadable and {*results.labels} == {"unreadable"} and watch is None:
        first = next(iter(unreadable.values()))
        msg = f"none of the {len(unreadable)} images of {data} can be predicted; the first error: {first}"
        raise ValueError(msg)
    return f"{(output / TABLE).resolve()}: {_summary(results, len(unreadable))}"


def _require_arguments(
    data: Path, output: Path, false_alarm_rate: float | None, watch: float | None, value_range: ValueRange | None
) -> None:
    if false_alarm_rate is not None:
        require_rate("false_alarm_rate", false_alarm_rate)
    check_value_range(value_range)
    if watch is not None or not data.is_file():
        require_stream(data, watch)
    if data.is_dir():
        require_apart(output, data)


def _log_promise(inferencer: EdgeInferencer, false_alarm_rate: float | None) -> None:
    """Say what the verdicts promise, where it is not what a user expects."""
    decision = inferencer.decision
    if decision is None:
        logger.info(
            "%s has no calibration: its own threshold decides, and there are neither raw scores nor p-values.",
            inferencer.path,
        )
    elif why := why_unsupported(len(decision.image.scores), false_alarm_rate or decision.false_alarm_rate):
        logger.warning("%s", why)


def _predict_each(
    inferencer: EdgeInferencer,
    paths: Iterable[Path],
    data: Path,
    results: Results,
    unreadable: dict[Path, str],
    false_alarm_rate: float | None,
    value_range: ValueRange | None,
) -> None:
    """Predict images one by one; the memory of one image suffices for any number."""
    for path in paths:
        try:
            pixels = pixels_of(path, value_range)
        except (FileNotFoundError, ValueError) as error:
            unreadable[path] = str(error)
            results.add_unreadable(path, str(error))
            logger.warning("unreadable %s: %s", path, error)
            continue
        unreadable.pop(path, None)
        prediction = inferencer.predict(pixels, false_alarm_rate)
        results.add(path, path.relative_to(data) if data.is_dir() else Path(path.name), pixels, prediction)
        logger.info("%s", _line(path, prediction))


def _line(path: Path, prediction: Prediction) -> str:
    p_value = "" if prediction.p_value is None else f", p-value {prediction.p_value:.3g}"
    remark = f" ({prediction.blank})" if prediction.blank else ""
    return f"{prediction.label or 'scored':9} {path}: score {prediction.score:.4f}{p_value}{remark}"


def _summary(results: Results, unreadable: int) -> str:
    labels = results.labels
    count = sum(labels.values()) - labels.get("unreadable", 0)
    skipped = f", {unreadable} could not be read" if unreadable else ""
    if "" in labels:
        return f"scores of {count} images without a verdict, as the model has no threshold{skipped}"
    return f"{labels.get('anomalous', 0)} of {count} images are anomalous{skipped}"
