"""From a folder of good images to a folder with a checked model and a report."""

import csv
import io
import logging
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from anomalib.data import AnomalibDataModule
from anomalib.models.components import AnomalibModule
from lightning.pytorch.trainer.states import TrainerFn
from rich.progress import track
from torch import Tensor

from anomalib_ot.decide.conformal import require_rate
from anomalib_ot.decide.post_processor import ConformalPostProcessor
from anomalib_ot.export.exporters import require_openvino
from anomalib_ot.features.backbone_defaults import default_image_size, default_layers
from anomalib_ot.features.backbones import layers_of_backbone
from anomalib_ot.features.image_extractor import ImageExtractor
from anomalib_ot.files import claim, require_ours, write_text
from anomalib_ot.host.class_paths import class_of, create
from anomalib_ot.images.folder import IMAGE_SUFFIXES, require_apart
from anomalib_ot.images.reading import read_values
from anomalib_ot.inspection.contamination import Suspect, find_groups, find_suspects
from anomalib_ot.inspection.look import inspect_images
from anomalib_ot.offline import offline_backbone
from anomalib_ot.selection import CANDIDATES, Candidate, Trial, choose
from anomalib_ot.settings import require, require_seed

from .exported import INT8, MODEL, SUFFIXES, export, files_of
from .handed_over import HandedOver, Look, Verdicts
from .report import report_page
from .stock import configuration, train

logger = logging.getLogger(__name__)

REPORT = "report.html"
TABLE = "images.csv"
CHECKPOINT = "model.ckpt"
CONFIG = "config.yaml"
WORK = "work"
_TRIALS = "trials.json"
FILES = (REPORT, TABLE, CHECKPOINT, CONFIG, *(f"{name}{suffix}" for name in (MODEL, INT8) for suffix in SUFFIXES))
"""Names of the files that a fit hands over."""

# Of the features that show which images are unlike the others: their stride, and the side of the images.
_STRIDE, _SIDE = 16, 224


def fit(
    images: Path,
    output: Path,
    model: str | None = None,
    minutes: float = 0,
    backbone: str | None = None,
    false_alarm_rate: float = 0.01,
    keep: Sequence[str] = (),
    seed: int = 0,
) -> HandedOver:
    """Look at the images, choose a model, train it, export it, and write the folder that goes to the line.

    Args:
        images: Folder of good images; subfolders count.
        output: Folder to write to. Foreign files do not change. Its folder ``work`` keeps the trials and the training,
            so that a repeated call continues.
        model: Name of the model; by default the recommended one.
        minutes: Time to try other models too, for the report. The model is always tried; see
            :data:`~anomalib_ot.selection.ranking.MARGIN`. The training and the export come on top.
        backbone: Backbone of all models; by default the one of :func:`~anomalib_ot.offline.offline_backbone`.
        false_alarm_rate: Promised rate of false alarms, in (0, 1).
        keep: Suspicious images that are good, by their paths below ``images``; ``all`` keeps all of them.
        seed: Seed of all random numbers.

    Returns:
        What was found and made.

    Raises:
        ValueError: If an argument is invalid, or there are too few usable images.
        FileNotFoundError: If there is no such folder, or an image to keep is not in it.
        FileExistsError: If ``output`` contains foreign files of these names, or the model of another folder.
        ModuleNotFoundError: If a package that the model or its export needs is not installed.
        RuntimeError: If the training failed.
    """
    require_rate("false_alarm_rate", false_alarm_rate)
    require_seed(seed)
    require(minutes >= 0, "minutes", "at least 0", minutes)
    _require_images(images, keep)
    candidates = _candidates(model)[: None if minutes else 1]
    images, output = images.resolve(), output.resolve()
    require_apart(output, images)
    require_ours(output, *FILES)
    require_ours(output / WORK, _TRIALS)
    _require_same_product(images, output)
    require_openvino()
    backbone = backbone or offline_backbone()
    start = time.monotonic()
    look = _look(images, backbone, keep, seed)
    claim(output / WORK, _TRIALS)
    trials = _trials(look.used, backbone, candidates, minutes, output / WORK, seed)
    chosen = trials[0].candidate
    logger.info("Training %s on %d images.", chosen.name, len(look.used))
    config = configuration(chosen, backbone, images, _left_out(images, look.used), false_alarm_rate, seed)
    config_file, checkpoint = train(config, look.used, output / WORK)
    module, processor, data = _trained(config, checkpoint)
    logger.info("Exporting to OpenVINO.")
    exported = export(module, data, config_file.parent, chosen.image_size, look.used[0])
    _hand_over([config_file, checkpoint, *files_of(exported)], output)
    trained_on = [*map(Path, data.train_data.samples.image_path)]
    verdicts = Verdicts.of(processor, trained_on)
    handed = HandedOver(images, output, look, trials, verdicts, exported, time.monotonic() - start, seed)
    for name, text in ((TABLE, _table(handed)), (REPORT, report_page(handed))):
        # A name of a file may be no valid text.
        write_text(output / name, text.encode("utf-8", "backslashreplace").decode())
    return handed


def summary(handed: HandedOver) -> str:
    """A line with the result."""
    look, rate = handed.look, 100 * handed.verdicts.supported
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
        root = yaml.safe_load((output / CONFIG).read_text(encoding="utf-8"))["data"]["init_args"]["root"]
    except (OSError, KeyError, TypeError, ValueError, yaml.YAMLError):
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


def _look(images: Path, backbone: str, keep: Sequence[str], seed: int) -> Look:
    """Look at the images, and find those that may be bad."""
    logger.info("Looking at the images of %s.", images)
    inspection = inspect_images(images)
    maps = _maps(inspection.images, backbone)
    suspects = find_suspects(inspection.images, maps, seed=seed)
    look = Look(inspection, suspects, _dropped(suspects, images, keep), find_groups(inspection.images, maps))
    for finding in inspection.left_out:
        logger.warning("Left out %s: %s", finding.path, finding.detail)
    for path in look.dropped:
        logger.warning("Left out %s: it looks unlike the other images and may be bad. To use it, set keep.", path)
    logger.info("%d images are used.", len(look.used))
    return look


def _maps(paths: Sequence[Path], backbone: str) -> Tensor:
    """Feature maps (N, D, H, W) of the images, to find those that are unlike the others."""
    (layer,) = default_layers(layers_of_backbone(backbone), [_STRIDE])
    size = default_image_size(backbone, (_SIDE, _SIDE))
    images = map(read_values, track(paths, "Extracting features", transient=True))
    return ImageExtractor(backbone, size, [layer], len(paths)).of(images, len(paths)).features[layer]


def _dropped(suspects: Sequence[Suspect], images: Path, keep: Sequence[str]) -> list[Path]:
    """The suspects that are not kept; images to keep may be unsuspicious."""
    kept = {images / name for name in keep}
    return [] if "all" in keep else [each.path for each in suspects if each.path not in kept]


def _left_out(images: Path, used: Sequence[Path]) -> list[Path]:
    """All other images that anomalib would find, hidden ones too."""
    found = {path for path in images.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()}
    return sorted(found - {*used})


def _trials(
    used: Sequence[Path], backbone: str, candidates: Sequence[Candidate], minutes: float, work: Path, seed: int
) -> list[Trial]:
    def progress(trials: list[Trial], trying: Candidate | None) -> None:
        best = f"; best so far {trials[0].candidate.name} with {trials[0].mean:.1f}" if trials else ""
        if trying is not None:
            logger.info("Trying %s on synthetic anomalies%s.", trying.name, best)

    return choose(
        used,
        backbone,
        # The first candidate is always tried.
        minutes=minutes or 1,
        state=work / _TRIALS,
        progress=progress,
        candidates=candidates,
        seed=seed,
    )


def _trained(
    config: dict[str, Any], checkpoint: Path
) -> tuple[AnomalibModule, ConformalPostProcessor, AnomalibDataModule]:
    """The trained model, its post-processor, and its data module, which is set up.

    Raises:
        RuntimeError: If the model has no threshold.
    """
    kind, processor = class_of(AnomalibModule, config["model"]), ConformalPostProcessor()
    module = kind.load_from_checkpoint(checkpoint, post_processor=processor, map_location="cpu").eval()
    if not processor.is_calibrated("image"):
        msg = f"{kind.__name__} gives these images scores that set no threshold; choose another model with --model"
        raise RuntimeError(msg)
    data = create(AnomalibDataModule, config["data"])
    data.setup(TrainerFn.FITTING)
    return module, processor, data


def _table(handed: HandedOver) -> str:
    """A row for each image: whether it is used, why not, and the p-value of its calibration."""
    look = handed.look
    notes = {finding.path: finding.detail for finding in reversed(look.inspection.findings)}
    notes |= dict.fromkeys((each.path for each in look.suspects), "It looks unlike the other images.")
    p_values = dict(handed.verdicts.p_values)
    used = {*look.used}
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(("path", "used", "p_value", "finding"))
    for path in sorted({*notes, *used}):
        p_value = f"{p_values[path]:.4g}" if path in p_values else ""
        writer.writerow((path, "yes" if path in used else "no", p_value, notes.get(path, "")))
    return file.getvalue()
