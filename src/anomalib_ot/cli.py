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


_SUBCOMMANDS = {"weights": weights}


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
