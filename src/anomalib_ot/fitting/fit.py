"""From a folder of good images to a folder with a checked model and a report."""

import logging
import shutil
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import yaml

from anomalib_ot.comparison.engines import ENGINES, require_installed
from anomalib_ot.decide.conformal import UnsupportedRateWarning, require_rate
from anomalib_ot.export.exporters import require_openvino
from anomalib_ot.features.file_features import FileFeatures
from anomalib_ot.files import claim, delete_ours, require_ours, write_text
from anomalib_ot.images.folder import IMAGE_SUFFIXES, require_apart
from anomalib_ot.images.reading import Reading, ValueRange, check_value_range
from anomalib_ot.offline import offline_backbone
from anomalib_ot.selection import CANDIDATES, Candidate, Trial, choose, on_backbones
from anomalib_ot.settings import require, require_seed

from .exported import INT8, MODEL, SUFFIXES, exported_once, files_of
from .handed_over import HandedOver
from .looking import FEATURES, look_at
from .report import report_page
from .steps import STEPS, Steps
from .stock import CONFIG, configuration, images_of, train
from .table import TABLE, table

logger = logging.getLogger(__name__)

REPORT = "report.html"
CHECKPOINT = "model.ckpt"
WORK = "work"
_TRIALS = "trials.json"
FILES = (REPORT, TABLE, CHECKPOINT, CONFIG, *(f"{name}{suffix}" for name in (MODEL, INT8) for suffix in SUFFIXES))
"""Names of the files that a fit hands over."""


def fit(
    images: Path,
    output: Path,
    model: str | None = None,
    minutes: float = 0,
    backbones: Sequence[str] = (),
    false_alarm_rate: float = 0.01,
    keep: Sequence[str] = (),
    engine: str = "processes",
    seed: int = 0,
    value_range: ValueRange | None = None,
) -> HandedOver:
    """Look at the images, choose a model, train it, export it, and write the folder that goes to the line.

    Args:
        images: Folder of good images; subfolders count.
        output: Folder to write to. Foreign files do not change. Its folder ``work`` keeps each finished step, so that
            a repeated call continues, and skips what has not changed.
        model: Name of the model; by default the recommended one, unless the trial of another is better by
            :data:`~anomalib_ot.selection.ranking.MARGIN`.
        minutes: Time to try other models too. The model is always tried. The training and the export come on top.
        backbones: Backbones; by default the one of :func:`~anomalib_ot.offline.offline_backbone`. The model has the
            first one; models on the others are tried too if there is time.
        false_alarm_rate: Promised rate of false alarms, in (0, 1).
        keep: Suspicious images that are good, by their paths below ``images``; ``all`` keeps all of them.
        engine: Where other models are tried, as for :func:`~anomalib_ot.selection.choosing.choose`.
        seed: Seed of all random numbers.
        value_range: Values that map to black and white in images with more than 8 bits per channel;
            by default the range of the data type.

    Returns:
        What was found and made.

    Raises:
        ValueError: If an argument is invalid, or there are too few usable images.
        FileNotFoundError: If there is no such folder, or an image to keep is not in it.
        FileExistsError: If ``output`` contains foreign files of these names, or the model of another folder.
        ImportError: If a package that the model, its export or the engine needs is not installed.
        RuntimeError: If the model cannot be fitted, or the training failed.
    """
    require_rate("false_alarm_rate", false_alarm_rate)
    require_seed(seed)
    check_value_range(value_range)
    require(minutes >= 0, "minutes", "at least 0", minutes)
    _require_images(images, keep)
    require(engine in ENGINES, "engine", ENGINES, engine)
    if engine == "ray":
        require_installed("ray", "ray")
    named = _candidates(model)
    images, output = images.resolve(), output.resolve()
    work = output / WORK
    require_apart(output, images)
    require_ours(output, *FILES)
    require_ours(work, _TRIALS, STEPS)
    _require_same_product(images, output)
    require_openvino()
    # A model on the first backbone alone is tried if there is no time for others.
    candidates = on_backbones(named, backbones or [offline_backbone()])[: None if minutes else 1]
    start = time.monotonic()
    look, features = look_at(images, candidates, keep, work, seed, value_range)
    claim(work, _TRIALS)
    trials = _trials(look.used, candidates, minutes, engine, features, work, seed, value_range)
    if model:
        # The model that is asked for is trained, whatever its trial.
        trials.sort(key=lambda trial: trial.candidate != candidates[0])
    delete_ours(work / FEATURES)
    chosen = trials[0].candidate
    if model and chosen != candidates[0]:
        msg = f"{candidates[0].name} cannot be fitted to these images, as the log says; choose another model"
        raise RuntimeError(msg)
    is_full_range = value_range is not None or look.inspection.deep > 0
    reading = Reading(is_full_range, value_range)
    config = configuration(chosen, images, _left_out(images, look.used), false_alarm_rate, seed, reading)
    config_file, checkpoint = train(config, chosen.name, look.used, work)
    with warnings.catch_warnings():
        # The training has logged it, and the report says it first.
        warnings.simplefilter("ignore", UnsupportedRateWarning)
        calibration, exported = exported_once(config, config_file.parent, checkpoint, look.used, Steps(work))
        _hand_over([config_file, checkpoint, *files_of(exported)], output)
        seconds = time.monotonic() - start
        handed = HandedOver(images, output, look, trials, calibration, exported, seconds, seed, value_range)
        write_text(output / TABLE, table(handed))
        write_text(output / REPORT, report_page(handed))
    return handed


def summary(handed: HandedOver) -> str:
    """A line with the result."""
    look, rate = handed.look, 100 * handed.calibration.promise.supported_rate
    return (
        f"{handed.chosen.name}, from {len(look.used)} images of {handed.images}, {look.left_out} left out; promises "
        f"{rate:.3g} % false alarms"
    )


def _candidates(model: str | None) -> list[Candidate]:
    """The candidates, that of a name first.

    Raises:
        ValueError: If no candidate has the name.
    """
    named = [each for each in CANDIDATES if model in (None, each.name, each.model)]
    names = ", ".join(dict.fromkeys(each.model for each in CANDIDATES))
    require(bool(named), "model", f"one of {names}", model)
    return [named[0], *(each for each in CANDIDATES if each is not named[0])]


def _require_images(images: Path, keep: Sequence[str]) -> None:
    """Check that images to keep are there.

    Raises:
        FileNotFoundError: If one is not.
    """
    if missing := [name for name in keep if name != "all" and not (images / name).is_file()]:
        msg = f"keep names {missing[0]}, which is no file in {images}"
        raise FileNotFoundError(msg)


def _require_same_product(images: Path, output: Path) -> None:
    """Check that the output has no model of another folder.

    Raises:
        FileExistsError: If it has.
    """
    try:
        root = images_of(yaml.safe_load((output / CONFIG).read_text(encoding="utf-8")))
    except (AttributeError, OSError, KeyError, TypeError, ValueError, yaml.YAMLError):
        return
    if root != str(images):
        msg = f"{output} has the model of {root}; choose another output for that of {images}"
        raise FileExistsError(msg)


def _hand_over(files: Sequence[Path], output: Path) -> None:
    """Copy files to the output folder, and remove those of an earlier fit that are not among them.

    The report of an earlier fit is removed first, so that an interruption leaves none that describes other files.
    """
    claim(output, *FILES)
    for name in FILES:
        if name in (REPORT, TABLE) or name not in {path.name for path in files}:
            (output / name).unlink(missing_ok=True)
    for path in files:
        partial = output / f".{path.name}"
        shutil.copyfile(path, partial)
        partial.replace(output / path.name)


def _left_out(images: Path, used: Sequence[Path]) -> list[Path]:
    """All other images that anomalib would find, hidden ones too."""
    found = {path for path in images.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()}
    return sorted(found - {*used})


def _trials(
    used: Sequence[Path],
    candidates: Sequence[Candidate],
    minutes: float,
    engine: str,
    known: FileFeatures | None,
    work: Path,
    seed: int,
    value_range: ValueRange | None,
) -> list[Trial]:
    def progress(trials: list[Trial], trying: Candidate | None) -> None:
        best = f"; best so far {trials[0].candidate.name} with {trials[0].mean:.1f}" if trials else ""
        if trying is not None:
            logger.info("Trying %s on synthetic anomalies%s.", trying.name, best)

    return choose(
        used,
        candidates,
        # The first candidate is always tried.
        minutes=minutes or 1,
        state=work / _TRIALS,
        progress=progress,
        engine=engine,
        known=known,
        seed=seed,
        value_range=value_range,
    )
