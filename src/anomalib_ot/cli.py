"""The command ``anomalib-ot``. To add a subcommand, write a function and name it in ``_SUBCOMMANDS``.

What a subcommand returns is all that goes to standard output. Each imports what it needs itself, so that ``--help``
answers at once.
"""

import logging
import sys
from pathlib import Path
from typing import Any, Literal

from jsonargparse import CLI

from anomalib_ot import __version__

logger = logging.getLogger(__name__)


def weights(cache_dir: Path | None = None, architecture: str = "tf_efficientnet_lite0") -> str:
    """Make a backbone from the ImageNet weights of an installed package and print its name.

    Use it as ``anomalib train --model Pradot --model.backbone "$(anomalib-ot weights)" …``.

    Args:
        cache_dir: Where to keep the backbone; by default the user's cache directory.
        architecture: timm's name of the network, tf_efficientnet_lite0, …lite1 or …lite2.

    Returns:
        The backbone, ``local-dir:PATH``.
    """
    from anomalib_ot.offline import offline_backbone  # noqa: PLC0415

    return offline_backbone(cache_dir, architecture)


def compare(
    plan: Path | None = None,
    models: list[str | dict[str, Any]] | None = None,
    data: list[str | dict[str, Any]] | None = None,
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
) -> str:
    """Compare models on the same images, and write a report.

    Each run is kept as it ends; a comparison that was broken off goes on where it stopped.

    Args:
        plan: YAML file with models, data and settings, as configs/compare/quick.yaml; what else is given wins over it.
        models: Models of the plan to run, or others, by class as for anomalib.
        data: Data of the plan to take, or others, by class as for anomalib.
        root: Folder that the data's relative roots are meant from.
        backbone: Backbone of all models that take one.
        layers: Layers of all models that take several.
        image_size: Height and width of all models.
        seeds: Seeds of everything random.
        shots: Numbers of training images, instead of all of them.
        baseline: Model that the others are compared with.
        ensemble: Models whose mean is shown as one more model, as Pradot+Padim, or a list.
        output: Folder of the results and the report.
        workers: Number of runs at a time.
        engine: Local processes, or Ray, whose cluster RAY_ADDRESS names.
        accelerator: Where to run, as the trainer's.
        threads: Threads of each run, by default the cores shared among the workers.
        openvino: Time the models in OpenVINO too.
        time_limit: Minutes after which a run is given up.

    Returns:
        The report, in Markdown.

    Raises:
        RuntimeError: If all runs failed; the report is there all the same.
    """
    from anomalib_ot import comparison  # noqa: PLC0415

    read = comparison.read_plan(
        plan,
        models,
        data,
        root,
        backbone=backbone,
        layers=layers,
        image_size=image_size,
        seeds=seeds,
        shots=shots,
        baseline=baseline,
        ensembles=[ensemble] if isinstance(ensemble, str) else ensemble,
    )
    records = comparison.compare(read, output, workers, engine, accelerator, threads, openvino, time_limit)
    text, page = comparison.write_report(records, output, read.title, read.baseline, read.published())
    logger.info("report: %s", page)
    if all(record.failed for record in records):
        msg = f"all runs failed, {records[0].key} with {records[0].message}; see {page}"
        raise RuntimeError(msg)
    return text.read_text(encoding="utf-8")


_SUBCOMMANDS = {"compare": compare, "weights": weights}


def main(args: list[str] | None = None) -> None:
    """Run the command, and exit with status 1 and one line on standard error if it fails.

    Args:
        args: Command-line arguments; by default those of the process.
    """
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("anomalib_ot").setLevel(logging.INFO)
    try:
        output = CLI(
            _SUBCOMMANDS,
            args=args,
            prog="anomalib-ot",
            version=__version__,
            description="Tools of anomalib-ot; its models run from the command anomalib.",
        )
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        sys.exit(f"anomalib-ot: {' '.join(str(error).split())}")
    print(output)  # noqa: T201
