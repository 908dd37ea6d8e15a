"""The command ``anomalib-ot``. To add a subcommand, write a function and add it to ``_SUBCOMMANDS``.

Only the return value of a subcommand is written to standard output. Subcommands import their dependencies when they
run, so that ``--help`` is fast.
"""

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from anomalib_ot.command_line import run
from anomalib_ot.files import require_ours
from anomalib_ot.shipped import shipped_file, shipped_files

logger = logging.getLogger(__name__)


def weights(cache_dir: Path | None = None, architecture: str = "lite0") -> str:
    """Print a backbone with ImageNet weights from a package, for --model.backbone "$(anomalib-ot weights lite2)".

    Args:
        cache_dir: Folder of the backbone; by default the user's cache directory.
        architecture: EfficientNet-Lite lite0, lite1 or lite2, or its name in timm, such as tf_efficientnet_lite0. The
            name of this option can be left out: anomalib-ot weights lite2.

    Returns:
        The backbone, ``local-dir:PATH``.
    """
    from anomalib_ot.offline import offline_backbone  # noqa: PLC0415

    return offline_backbone(cache_dir, architecture)


def configs(name: str | None = None) -> str:
    """List the shipped plans and configurations, or print one path: anomalib-ot configs --name model/pradot.

    Args:
        name: Name from the list. Names under compare are plans, for anomalib-ot compare --plan. Names under model and
            data are configurations, for --config of anomalib.

    Returns:
        A line with the path for each name, or the path of the given name.
    """
    if name is not None:
        return str(shipped_file(name))
    files = shipped_files()
    width = max(map(len, files))
    return "\n".join(f"{each:{width}}  {path}" for each, path in files.items())


def compare(
    plan: str | None = None,
    models: list[str | dict[str, Any]] | dict[str, Any] | str | None = None,
    data: list[str | dict[str, Any]] | dict[str, Any] | str | None = None,
    root: Path | None = None,
    backbone: str | None = None,
    layers: list[str] | None = None,
    image_size: tuple[int, int] | None = None,
    seeds: list[int] | None = None,
    shots: list[int] | None = None,
    baseline: str | None = None,
    ensemble: list[str] | str | None = None,
    output: Path = Path("results/compare"),
    workers: int = 1,
    engine: Literal["processes", "ray"] = "processes",
    accelerator: str = "auto",
    threads: int | None = None,
    openvino: bool = False,
    time_limit: float | None = None,
    total_time_limit: float | None = None,
) -> str:
    """Compare models on the same images, for example: anomalib-ot compare --plan quick.

    Each run is stored when it ends. To continue an interrupted comparison, repeat the command.

    Args:
        plan: YAML file with models, data and settings, or the name of a shipped plan: quick, real, few_shot, dino,
            mvtec_ad, mvtec_loco or mpdd_few_shot. Other options override it. anomalib-ot configs lists the paths of the
            plans.
        models: Models of the plan to run, or other models, by class as for anomalib; one or a list.
        data: Data of the plan to use, or other data, by class as for anomalib; one or a list.
        root: Base folder of the data's relative roots.
        backbone: Backbone of all models that accept one; local-dir:~/x is the folder x of the home directory.
        layers: Layers of all models that accept several. By default, each model uses its own layers. If the backbone
            does not have them, it uses the last layers of the same strides, such as blocks.2 and blocks.4 for layer2
            and layer3.
        image_size: Height and width of the images of all models.
        seeds: Seeds of all random numbers.
        shots: Numbers of training images, instead of all images.
        baseline: Model that the others are compared with.
        ensemble: Models whose mean is reported as an additional model, such as Pradot+Padim, or a list.
        output: Folder of the results and the report.
        workers: Number of runs at a time.
        engine: Local processes, or Ray with the cluster in RAY_ADDRESS.
        accelerator: Accelerator of the trainer.
        threads: Threads of each run; by default OMP_NUM_THREADS or the CPU cores, shared among the workers.
        openvino: Time the models in OpenVINO as well.
        time_limit: Minutes after which a single run is stopped; the comparison continues.
        total_time_limit: Minutes after which the comparison stops and reports the finished runs; repeat the command to
            continue.

    Returns:
        The report in Markdown.

    Raises:
        RuntimeError: If all runs failed. The report is written nevertheless.
    """
    from anomalib_ot import comparison  # noqa: PLC0415

    read = comparison.read_plan(
        plan,
        _several(models),
        _several(data),
        root,
        backbone=backbone,
        layers=layers,
        image_size=image_size,
        seeds=seeds,
        shots=shots,
        baseline=baseline,
        ensembles=_several(ensemble),
    )
    # Checked before the runs, which may take hours.
    published = read.published()
    require_ours(output, *comparison.REPORT_FILES)
    records = comparison.compare(
        read, output, workers, engine, accelerator, threads, openvino, time_limit, total_time_limit
    )
    text, page = comparison.write_report(records, output, read.title, read.baseline, published)
    logger.info("report: %s", page)
    if all(record.failed for record in records):
        msg = f"all runs failed; the first error is that of {records[0].key}: {records[0].message}; see {page}"
        raise RuntimeError(msg)
    return text.read_text(encoding="utf-8")


def _several(given: Any) -> Any:
    """A list of one or several given values.

    Raises:
        ValueError: If a dictionary is none of a class.
    """
    if isinstance(given, dict) and "class_path" not in given:
        msg = (
            f"expected class_path and init_args, or a list of them, got a dictionary of {', '.join(map(str, given))}; "
            "labels are for the file of a --plan"
        )
        raise ValueError(msg)
    return [given] if isinstance(given, str | dict) else given


def explain(
    ckpt_path: Path,
    data: str | dict[str, Any],
    root: Path | None = None,
    output: Path = Path("results/explain"),
    pictures: list[str] | str | None = None,
    count: int = 3,
    views: list[str] | None = None,
    pixel: tuple[float, float] | None = None,
    formats: list[Literal["png", "svg", "pdf"]] = ["png", "svg"],  # noqa: B006 - never modified
    model: str | None = None,
    seed: int = 0,
    false_alarm_rate: float | None = None,
    image_sensitivity: float | None = None,
    pixel_sensitivity: float | None = None,
) -> str:
    """Explain scores with figures and numbers: anomalib-ot explain --ckpt_path model.ckpt --data Assembly.

    Each image has a folder with its views and numbers. The model has a folder too, and index.html lists them all.

    Args:
        ckpt_path: Checkpoint of a fitted model of this package.
        data: Data module as for anomalib, such as Assembly or '{class_path: MVTecAD, init_args: {category: bottle}}',
            or an image or a folder of images.
        root: Base folder of the data module's relative root.
        output: Folder to write to. Folders of other images and foreign files do not change.
        pictures: Images of the data by folder and name, such as '[scratch/003, good/001]', or any other file or folder
            of images, such as line/x.png; by default some images are chosen.
        count: Number of images to choose, alternately with the highest score, nearest to the threshold, and typical
            normal.
        views: Names of the views; by default all that can be drawn. All models have evidence, and each has its own
            views, which the guide shows. The error message for an unknown name lists them.
        pixel: Pixel that a view explains, from the left and from the top of the model's input; by default the pixel
            with the highest score.
        formats: Formats of the figures.
        model: Class of the model; by default the class in the checkpoint. The error message for an unknown name lists
            the models.
        seed: Seed of random choices.
        false_alarm_rate: Promised rate of false alarms in (0, 1), such as 0.05; by default the checkpoint's.
        image_sensitivity: Sensitivity for images in [0, 1], for a model that was trained with anomalib's PostProcessor;
            by default the checkpoint's.
        pixel_sensitivity: Sensitivity for pixels, likewise.

    Returns:
        A line for each image, and the path of the page.
    """
    from anomalib_ot.explain.explanation import explain as write_explanation  # noqa: PLC0415
    from anomalib_ot.explain.explanation import summary  # noqa: PLC0415

    asked = {
        "false_alarm_rate": false_alarm_rate,
        "image_sensitivity": image_sensitivity,
        "pixel_sensitivity": pixel_sensitivity,
    }
    page, explained = write_explanation(
        *(ckpt_path, data, output, root, model, _several(pictures), count, views, pixel, formats, seed),
        post_processing={name: value for name, value in asked.items() if value is not None},
    )
    return "\n".join([*map(summary, explained), str(page)])


def fit(
    images: Path,
    output: Path | None = None,
    model: str | None = None,
    minutes: float = 0,
    backbone: list[str] | str | None = None,
    false_alarm_rate: float = 0.01,
    keep: list[str] | str | None = None,
    engine: Literal["processes", "ray"] = "processes",
    seed: int = 0,
    value_range: tuple[float, float] | None = None,
) -> str:
    """Make a checked model from a folder of good images, without a label: anomalib-ot fit IMAGES.

    The command looks at the images, leaves out those that may be bad, trains the recommended model, sets its threshold,
    and exports it. The output folder gets report.html, which shows all of this, the exported model.xml, model.ckpt and
    the config.yaml of the training. To continue an interrupted fit, repeat the command: it skips finished steps whose
    images and settings are the same.

    Args:
        images: Folder of good images; its subfolders count. The name of this option can be left out: anomalib-ot fit
            IMAGES.
        output: Folder to write to; by default results/fit and the name of the folder of the images. Foreign files do
            not change.
        model: Model to train instead of the recommended one, such as WtFlow. The error message for an unknown name
            lists the models.
        minutes: Minutes to try others on synthetic defects too. One that is clearly better than the recommended model,
            on the same backbone at the same size, is trained instead. The training and the export come on top.
        backbone: Backbone of the model; by default the one that anomalib-ot weights prints. Of a list, the model has
            the first one, and is compared with models on the others.
        false_alarm_rate: Promised rate of false alarms in (0, 1), such as 0.02.
        keep: Images that look bad and are good, by their paths below the folder, such as '[003.png, b/7.png]'; all
            keeps all of them.
        engine: Where other models are tried: one after another on this machine, or at the same time on Ray with the
            cluster in RAY_ADDRESS.
        seed: Seed of all random numbers.
        value_range: Values that map to black and white in images with more than 8 bits per channel, such as
            '[0, 4095]'; by default the range of the data type.

    Returns:
        A line with the result, and the path of the report.
    """
    from anomalib_ot.fitting.fit import REPORT, summary  # noqa: PLC0415
    from anomalib_ot.fitting.fit import fit as fitted  # noqa: PLC0415

    output = output or Path("results/fit") / images.resolve().name
    backbones, kept = (_several(given) or [] for given in (backbone, keep))
    handed = fitted(images, output, model, minutes, backbones, false_alarm_rate, kept, engine, seed, value_range)
    return f"{summary(handed)}\n{output / REPORT}"


def monitor(
    ckpt_path: Path,
    data: Path,
    output: Path | None = None,
    watch: float | None = None,
    reference: Path | None = None,
    false_alarm_rate: float = 0.01,
    seed: int = 0,
    appearance: bool = True,
    value_range: tuple[float, float] | None = None,
) -> str:
    """Say when good images drift: anomalib-ot monitor --ckpt_path model.ckpt --data line.

    Images are scored in the order of their paths. The output folder gets drift.csv, with a row for each image, and
    drift.html, a page with the course, the first image of the drift, and the places that changed.

    Args:
        ckpt_path: Checkpoint of a fitted model of this package.
        data: Folder of the images.
        output: Folder to write to; by default results/monitor and the name of the folder of the images. Foreign files
            do not change. Give each monitor its own.
        watch: Seconds between two looks at a growing folder, which is followed until Ctrl+C; by default, the folder is
            read once.
        reference: Folder of good images to compare with, which the model was not trained on; by default, the images
            are compared with the calibration scores of the checkpoint.
        false_alarm_rate: Promised probability of a false alarm over the whole stream, in (0, 1).
        seed: Seed of the smoothing of p-values.
        appearance: Whether to watch the brightness and the sharpness of the images too; false watches scores alone.
        value_range: Values that map to black and white in images with more than 8 bits per channel, such as
            '[0, 4095]'; by default, these are read as in the training.

    Returns:
        A line with the result, and the path of the page.
    """
    from anomalib_ot.monitor.watching import monitor as watched  # noqa: PLC0415
    from anomalib_ot.monitor.watching import summary  # noqa: PLC0415

    output = output or Path("results/monitor") / data.resolve().name
    page, course = watched(
        ckpt_path,
        data,
        output,
        watch,
        reference,
        false_alarm_rate,
        seed,
        appearance=appearance,
        value_range=value_range,
    )
    return f"{summary(course)}\n{page}"


def predict(
    model: Path,
    data: Path,
    output: Path = Path("results/predict"),
    false_alarm_rate: float | None = None,
    watch: float | None = None,
    overlays: Literal["none", "anomalous", "all"] = "anomalous",
    value_range: tuple[float, float] | None = None,
    device: str = "CPU",
) -> str:
    """Predict images with an exported model, without torch and anomalib: anomalib-ot predict MODEL IMAGES.

    The output folder gets predictions.csv, with a row for each image, predictions.json, with more details, and
    overlays of the heat map and the contour of the mask. Each image has a line on standard error as well.

    Args:
        model: Exported model.xml, or its folder, with the files of its export. The names of this option and of data
            can be left out: anomalib-ot predict MODEL IMAGES.
        data: Image or folder of images.
        output: Folder to write to. Results of an earlier run are moved to a folder earlier-1 in it, and so on.
        false_alarm_rate: Promised rate of false alarms in (0, 1), such as 0.02; by default that of the export.
        watch: Seconds between two looks at a growing folder, which is followed until Ctrl+C; by default, the folder is
            read once.
        overlays: Images that get an overlay.
        value_range: Values that map to black and white in images with more than 8 bits per channel, such as
            '[0, 4095]'; by default, that of the training, or the range of the data type.
        device: Device of OpenVINO, such as CPU, GPU or AUTO.

    Returns:
        A line with the path of the table and the number of anomalous images.
    """
    from anomalib_ot.edge.predicting import predict as predicted  # noqa: PLC0415

    return predicted(model, data, output, false_alarm_rate, watch, overlays, value_range, device)


_SUBCOMMANDS: dict[str, Callable[..., str]] = {
    "compare": compare,
    "configs": configs,
    "explain": explain,
    "fit": fit,
    "monitor": monitor,
    "predict": predict,
    "weights": weights,
}


def main(args: list[str] | None = None) -> None:
    """Run the command, see :func:`~anomalib_ot.command_line.run`.

    Args:
        args: Command-line arguments; by default those of the process.
    """
    run(_SUBCOMMANDS, _with_options(sys.argv[1:] if args is None else args))


def _with_options(args: list[str]) -> list[str]:
    """Insert the options that ``weights lite2``, ``fit IMAGES`` and ``predict MODEL IMAGES`` leave out."""
    match args:
        case ["weights", name, *others] if not name.startswith("-"):
            return ["weights", "--architecture", name, *others]
        case ["fit", images, *others] if not images.startswith("-"):
            return ["fit", "--images", images, *others]
        case ["predict", model, data, *others] if not model.startswith("-") and not data.startswith("-"):
            return ["predict", "--model", model, "--data", data, *others]
    return args
