"""The command ``anomalib-ot``. To add a subcommand, write a function and name it in ``_SUBCOMMANDS``.

What a subcommand returns is all that goes to standard output. Each imports what it needs itself, so that ``--help``
answers at once.
"""

import logging
import sys
from pathlib import Path

from jsonargparse import CLI

from anomalib_ot import __version__


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


def few_shot(
    plan: Path,
    backbone: str | None = None,
    shots: list[int] = [1, 2, 4],  # noqa: B006 - jsonargparse shows the default, nothing changes it
    seeds: int = 5,
    output: Path = Path("results/few_shot.csv"),
    accelerator: str = "auto",
) -> str:
    """Compare models that are given a few training images, and print mean and standard deviation over draws.

    A comparison that was broken off goes on where it stopped.

    Args:
        plan: YAML file with the data module and the models, as configs/compare/few_shot.yaml.
        backbone: Backbone to give to all models instead of the file's.
        shots: Numbers of training images.
        seeds: Number of draws of each.
        output: CSV file to which each result is added.
        accelerator: Where to run, as the trainer's.

    Returns:
        The table, in Markdown.
    """
    from anomalib_ot.comparison import FewShotPlan, compare_few_shot, summarise  # noqa: PLC0415

    read = FewShotPlan(plan, backbone)
    return summarise(compare_few_shot(read.data, read.models(), shots, seeds, output, accelerator))


_SUBCOMMANDS = {"few-shot": few_shot, "weights": weights}


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
