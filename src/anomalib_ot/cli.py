"""The command ``anomalib-ot``. To add a subcommand, write a function and name it in ``_SUBCOMMANDS``.

What a subcommand returns is all that goes to standard output. Each imports what it needs itself, so that ``--help``
answers at once.
"""

import logging
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any, Literal

from jsonargparse import CLI

from anomalib_ot import __version__
from anomalib_ot.files import require_ours
from anomalib_ot.shipped import shipped_file, shipped_files

logger = logging.getLogger(__name__)


def weights(cache_dir: Path | None = None, architecture: str = "tf_efficientnet_lite0") -> str:
    """Print a backbone with ImageNet weights of a package, as in: --model.backbone "$(anomalib-ot weights)".

    Args:
        cache_dir: Where to keep the backbone; by default the user's cache directory.
        architecture: timm's name of the network, tf_efficientnet_lite0, …lite1 or …lite2.

    Returns:
        The backbone, ``local-dir:PATH``.
    """
    from anomalib_ot.offline import offline_backbone  # noqa: PLC0415

    return offline_backbone(cache_dir, architecture)


def configs(name: str | None = None) -> str:
    """List the shipped plans and configurations, or print a path, as in: anomalib-ot configs --name model/pradot.

    Args:
        name: Name as in the list; compare/quick is a plan, which anomalib-ot compare --plan quick runs, and those under
            model and data are for --config of anomalib.

    Returns:
        A line for each name, with its path; of one name the path alone.
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
    """Compare models on the same images, as in: anomalib-ot compare --plan quick.

    Each run is kept as it ends; a comparison that was broken off goes on where it stopped.

    Args:
        plan: YAML file with models, data and settings, or the name of a shipped one, quick, real, few_shot, mvtec_ad,
            mvtec_loco or mpdd_few_shot; what else is given wins over it. anomalib-ot configs says where they lie.
        models: Models of the plan to run, or others, by class as for anomalib, one or a list.
        data: Data of the plan to take, or others, by class as for anomalib, one or a list.
        root: Folder that the data's relative roots are meant from.
        backbone: Backbone of all models that take one; local-dir:~/x is a folder x of the home directory.
        layers: Layers of all models that take several; by default each model's own, or where the backbone has none of
            these names its last ones of the same strides, as blocks.2 and blocks.4 for layer2 and layer3.
        image_size: Height and width of all models.
        seeds: Seeds of everything random.
        shots: Numbers of training images, instead of all of them.
        baseline: Model that the others are compared with.
        ensemble: Models whose mean is shown as one more model, as Pradot+Padim, or a list.
        output: Folder of the results and the report.
        workers: Number of runs at a time.
        engine: Local processes, or Ray, whose cluster RAY_ADDRESS names.
        accelerator: Where to run, as the trainer's.
        threads: Threads of each run, by default OMP_NUM_THREADS or else the cores, shared among the workers.
        openvino: Time the models in OpenVINO too.
        time_limit: Minutes after which a single run is given up; the next ones go on.
        total_time_limit: Minutes after which the comparison stops and reports what is done; the same command goes on.

    Returns:
        The report, in Markdown.

    Raises:
        RuntimeError: If all runs failed; the report is there all the same.
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
    # Read, and a place found, before hours of runs.
    published = read.published()
    require_ours(output, *comparison.REPORT_FILES)
    records = comparison.compare(
        read, output, workers, engine, accelerator, threads, openvino, time_limit, total_time_limit
    )
    text, page = comparison.write_report(records, output, read.title, read.baseline, published)
    logger.info("report: %s", page)
    if all(record.failed for record in records):
        msg = f"all runs failed, {records[0].key} with {records[0].message}; see {page}"
        raise RuntimeError(msg)
    return text.read_text(encoding="utf-8")


def _several(given: Any) -> Any:
    """A list of what may be given without one."""
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
    formats: list[Literal["png", "svg", "pdf"]] = ["png", "svg"],  # noqa: B006 - it is not changed
    model: str | None = None,
    seed: int = 0,
    image_sensitivity: float | None = None,
    pixel_sensitivity: float | None = None,
) -> str:
    """Explain scores in pictures and numbers, as in: anomalib-ot explain --ckpt_path model.ckpt --data Assembly.

    Each picture has a folder with its views and numbers, the model has one, and index.html lists them.

    Args:
        ckpt_path: Checkpoint of a fitted model of ours.
        data: Data module as for anomalib, such as Assembly or '{class_path: MVTecAD, init_args: {category: bottle}}',
            or a picture or a folder of pictures.
        root: Folder that the data module's relative root is meant from.
        output: Folder to write to; what is there of other pictures, or was written by others, stays.
        pictures: Pictures of the data by folder and name, as '[scratch/003, good/001]', or any other file or folder
            of pictures, as line/x.png; by default some are chosen.
        count: Number of pictures to choose, by turns of the highest score, nearest to the threshold, and usual normal.
        views: Names of the views; by default all that can be drawn. All models have evidence and views of their own,
            which the guide shows; an unknown name lists those of the model.
        pixel: Pixel that a view explains, from the left and from the top, in the picture as the model sees it; by
            default the one with the highest score.
        formats: Formats of the figures.
        model: Class of the model, by default the one that the checkpoint is of; an unknown name lists the models.
        seed: Seed of what is drawn at random.
        image_sensitivity: Sensitivity for pictures in [0, 1], as for anomalib predict; by default the checkpoint's.
        pixel_sensitivity: Sensitivity for pixels, likewise.

    Returns:
        A line for each picture, and the page.
    """
    from anomalib_ot.explain.explanation import explain as write_explanation  # noqa: PLC0415
    from anomalib_ot.explain.explanation import summary  # noqa: PLC0415

    names = [pictures] if isinstance(pictures, str) else pictures
    asked = {"image_sensitivity": image_sensitivity, "pixel_sensitivity": pixel_sensitivity}
    page, explained = write_explanation(
        *(ckpt_path, data, output, root, model, names, count, views, pixel, formats, seed),
        sensitivities={name: value for name, value in asked.items() if value is not None},
    )
    return "\n".join([*map(summary, explained), str(page)])


# Packages whose ValueErrors and RuntimeErrors say what is wrong with the input; those of others are bugs.
_SPEAKING = {"anomalib", "anomalib_ot", "jsonargparse"}
_SUBCOMMANDS = {"compare": compare, "configs": configs, "explain": explain, "weights": weights}


def main(args: list[str] | None = None) -> None:
    """Run the command, and exit with status 1 and one line on standard error if it fails.

    An error of torch, say, that nobody has foreseen has its traceback before that line.

    Args:
        args: Command-line arguments; by default those of the process.
    """
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("anomalib_ot").setLevel(logging.INFO)
    with warnings.catch_warnings():
        _leave_out_warnings_of_others()
        try:
            output = CLI(
                _SUBCOMMANDS,
                args=args,
                as_positional=False,
                prog="anomalib-ot",
                version=__version__,
                description="Tools of anomalib-ot; its models run from the command anomalib.",
            )
        except KeyboardInterrupt:
            logger.info("anomalib-ot: interrupted")
            # As a shell says of a command that SIGINT has ended.
            sys.exit(130)
        except (ImportError, OSError, RuntimeError, ValueError) as error:
            if not _is_foreseen(error):
                traceback.print_exc()
            sys.exit(f"anomalib-ot: {' '.join(str(error).split())}")
    print(output)  # noqa: T201


def _leave_out_warnings_of_others() -> None:
    """Ignore what other packages tell their developers, at their import above all, unless Python was told otherwise."""
    if sys.warnoptions:
        return
    for category in (DeprecationWarning, FutureWarning, UserWarning):
        warnings.filterwarnings("ignore", category=category)
    warnings.filterwarnings("default", module=r"anomalib_ot(\.|$)")


def _is_foreseen(error: BaseException) -> bool:
    """Whether the message alone says what is wrong, by the kind of the error or who raised it."""
    if isinstance(error, ImportError | OSError):
        return True
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals.get("__name__", "").partition(".")[0] in _SPEAKING
