"""The page that a fit hands over with the model."""

import shlex
from dataclasses import dataclass
from math import isnan
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from anomalib_ot.decide.conformal import images_for
from anomalib_ot.drawing.html import Embedded, render_page
from anomalib_ot.edge.drawing import drawn_on, overlay
from anomalib_ot.edge.inferencer import EdgeInferencer
from anomalib_ot.edge.inputs import pixels_of
from anomalib_ot.host.calibration import HELD_OUT, TRAINED, clause
from anomalib_ot.images.reading import Reading
from anomalib_ot.selection import MARGIN, Trial

from .defects import defects_of, in_words
from .exported import Exported
from .handed_over import HandedOver
from .stock import CONFIG

_SIDE = 220
_UNCERTAIN = 6
_MOST_SUSPECTS = 24


@dataclass(frozen=True)
class Shown:
    """An image on the page.

    Args:
        path: The image.
        name: Its path below the folder of the images.
        about: What the page says of it.
        image: The image with its map.
    """

    path: Path
    name: str
    about: str
    image: Embedded


def report_page(handed: HandedOver) -> str:
    """Render the page.

    Args:
        handed: What was found and made, whose exported model lies in the output folder.

    Returns:
        The page, which needs no other file.
    """
    model = handed.output / "model.xml"
    minutes = handed.seconds / 60
    trial = handed.trials[0]
    return render_page(
        "anomalib_ot.fitting",
        "fit",
        product=str(Path(*handed.images.parts[-2:])),
        summary=_summary(handed),
        about=f"Images of {handed.images}. This call of the fit took {minutes:.1f} minutes, with seed {handed.seed}.",
        notes=_notes(handed),
        counts=_counts(handed),
        about_suspects=_about_suspects(handed),
        suspects=[*_suspects(handed)],
        findings=[
            (_name(handed, each.path), each.detail, "no" if each.is_left_out else "yes")
            for each in handed.look.inspection.findings
        ],
        about_choice=_about_choice(handed),
        trial_columns=["model", "mean", *map(in_words, trial.auroc), "ms per image", "fit in s"],
        trials=[_row(trial) for trial in handed.trials],
        about_verdicts=_about_verdicts(handed),
        uncertain=[*_uncertain(handed, EdgeInferencer(model))],
        defects=defects_of(trial, handed.look.used[0], handed.seed, handed.value_range),
        files=[_file(name, each) for name, each in zip(("model.xml", "model_int8.xml"), handed.exported, strict=True)],
        command=shlex.join(["anomalib-ot", "predict", str(handed.output), "NEW_IMAGES"]),
        code="\n".join(
            (
                "from anomalib_ot.edge import EdgeInferencer",
                f"prediction = EdgeInferencer({str(model)!r}).predict('NEW_IMAGE.png')",
                "print(prediction.label, prediction.score, prediction.p_value)",
            )
        ),
        again=shlex.join(["anomalib", "train", "--config", str(handed.output / CONFIG)]),
        is_repeatable=handed.is_repeatable,
    )


def _summary(handed: HandedOver) -> str:
    look, rate = handed.look, 100 * handed.calibration.promise.supported_rate
    return (
        f"{handed.chosen.name}, from {len(look.used)} good images; {look.left_out} others were left out. It rejects "
        f"about {rate:.2g} % of new good images, if they are like these."
    )


def _notes(handed: HandedOver) -> list[str]:
    """What a user should check before using the model."""
    notes = []
    if len(handed.look.groups) > 1:
        sizes = " and ".join(str(len(group)) for group in handed.look.groups)
        first = " and ".join(_name(handed, group[0]) for group in handed.look.groups)
        notes.append(
            f"The images look like two products, of {sizes} images, such as {first}. A model of one product detects "
            "more: give each its own folder."
        )
    dropped = len(handed.look.dropped)
    if dropped:
        notes.append(
            f"{dropped} images may be bad and were left out. Look at them below; to use those that "
            "are good, repeat the command with --keep and their names. Without them, the rate of false alarms may be "
            f"{100 * dropped / (dropped + len(handed.look.used)):.2g} percentage points higher than promised."
        )
    promise = handed.calibration.promise
    if promise.supported_rate > promise.false_alarm_rate:
        notes.append(
            f"The threshold comes from {promise.calibration_images} good images, which support a rate of false alarms "
            f"of {100 * promise.supported_rate:.2g} %, not of {100 * promise.false_alarm_rate:g} %. For that, at least "
            f"{images_for(promise.false_alarm_rate)} are needed."
        )
    if promise.calibration_source == TRAINED:
        notes.append(
            "The threshold comes from images that the model was trained on: expect far more false alarms than "
            "promised. The log of the training says why."
        )
    return notes


def _counts(handed: HandedOver) -> list[tuple[str, str]]:
    inspection = handed.look.inspection
    sizes = [f"{width} x {height}" for (width, height), _ in inspection.sizes.most_common(3)]
    more = f" and {len(inspection.sizes) - 3} others" if len(inspection.sizes) > 3 else ""  # noqa: PLR2004
    counts = [
        ("found", str(len(inspection.images) + len(inspection.left_out))),
        ("used", str(len(handed.look.used))),
        ("left out as unreadable, blank or doubled", str(len(inspection.left_out))),
        ("left out as possibly bad", str(len(handed.look.dropped))),
        ("sizes in pixels", ", ".join(sizes) + more),
    ]
    if inspection.deep:
        reading = Reading(is_full_range=True, value_range=handed.value_range)
        counts.append(("with more than 8 bits per channel", f"{inspection.deep}, read {reading}"))
    if len(inspection.folders) > 1:
        counts.append(("folders", str(len(inspection.folders))))
    return counts


def _about_suspects(handed: HandedOver) -> str:
    kept = len(handed.look.suspects) - len(handed.look.dropped)
    ending = f" {kept} of them are used, as asked for." if kept else ""
    more = len(handed.look.suspects) - _MOST_SUSPECTS
    rest = f" {more} more are in images.csv." if more > 0 else ""
    return (
        "Models that were fitted without these images score them unlike all others. Red places are the most unusual."
        f"{ending}{rest}"
    )


def _suspects(handed: HandedOver) -> list[Shown]:
    dropped = {*handed.look.dropped}
    return [
        Shown(
            suspect.path,
            _name(handed, suspect.path),
            "left out" if suspect.path in dropped else "used",
            _embedded(pixels_of(suspect.path, handed.value_range), suspect.anomaly_map),
        )
        for suspect in handed.look.suspects[:_MOST_SUSPECTS]
    ]


def _about_choice(handed: HandedOver) -> str:
    if not handed.trials[0].auroc:
        return (
            f"{handed.chosen.name} was trained. It was not tried on drawn defects, as the images are too small for "
            "them."
        )
    learned = (
        "A part of the good images was not learned from. The table says how well the model tells these from the same "
        "images with defects drawn on them: 100 is perfect, 50 is chance. On nine products, Duo had 10 to 31 points "
        "more for real defects than for drawn ones. On a surface without parts, a piece that is missing, exchanged or "
        "moved looks like the surface."
    )
    if len(handed.trials) == 1:
        return f"{handed.chosen.name} was not compared with other models; --minutes 20 would do so. {learned}"
    return (
        f"{handed.chosen.name}, in the first row, was trained. {learned} Without --model, the recommended model is "
        f"trained, unless another one at its size exceeds its mean by more than {MARGIN:g} point. Smaller differences "
        "say little about real defects."
    )


def _row(trial: Trial) -> list[str]:
    means = [f"{value:.1f}" for value in (trial.mean, *trial.auroc.values()) if not isnan(value)] or [""]
    return [trial.candidate.name, *means, f"{trial.ms_per_image:.0f}", f"{trial.fit_s:.0f}"]


def _about_verdicts(handed: HandedOver) -> str:
    promise = handed.calibration.promise
    exact = "on average" if promise.calibration_source == HELD_OUT else "approximately"
    return (
        f"The threshold comes from {promise.calibration_images} good images that {clause(promise.calibration_source)}. "
        f"It rejects at most {100 * promise.supported_rate:.2g} % of new good images {exact}, as long as light, "
        "camera, material and tolerance stay the same. anomalib-ot predict takes another rate with --false_alarm_rate."
    )


def _uncertain(handed: HandedOver, inferencer: EdgeInferencer) -> list[Shown]:
    shown = []
    for path, p_value in handed.calibration.p_values[:_UNCERTAIN]:
        pixels = pixels_of(path, handed.value_range)
        image = Embedded.of(overlay(pixels, inferencer.predict(pixels)), _SIDE)
        shown.append(Shown(path, _name(handed, path), f"p {p_value:.2g}", image))
    return shown


def _file(name: str, each: Exported) -> list[str]:
    return [
        name,
        "" if each.ms_per_image is None else f"{each.ms_per_image:.1f}",
        "" if each.mib is None else f"{each.mib:.1f}",
        f"not kept: {each.why_not}" if each.why_not else "the same as torch on the good images",
    ]


def _embedded(pixels: NDArray[np.float32], deviation: NDArray[np.float32]) -> Embedded:
    """An image (h, w, 3) in [0, 1] with the deviation (H, W) of its cells: none of that of a normal cell is visible."""
    heat = (deviation - 1) / (deviation.max() - 1) if deviation.max() > 1 else 0 * deviation
    return Embedded.of(drawn_on(pixels, heat.clip(0, 1)), _SIDE)


def _name(handed: HandedOver, path: Path) -> str:
    return str(path.relative_to(handed.images))
