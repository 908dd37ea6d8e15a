"""Runs a command of several subcommands: its arguments, what it prints, and its errors."""

import logging
import sys
import traceback
import warnings
from collections.abc import Callable

from jsonargparse import CLI

from anomalib_ot import __version__
from anomalib_ot.first_use import missing_package

logger = logging.getLogger(__name__)

# Packages whose ValueErrors and RuntimeErrors describe invalid input. Those of other packages are bugs.
_EXPLAINING = {"anomalib", "anomalib_ot", "jsonargparse"}


def run(subcommands: dict[str, Callable[..., str]], args: list[str]) -> None:
    """Run a subcommand, and print what it returns. On failure, exit with status 1 and one line on standard error.

    Unexpected errors, such as those of torch, print their traceback before this line.

    Args:
        subcommands: The subcommands by name.
        args: Command-line arguments.
    """
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("anomalib_ot").setLevel(logging.INFO)
    with warnings.catch_warnings():
        _ignore_foreign_warnings()
        try:
            output = CLI(
                subcommands,
                args=args,
                as_positional=False,
                prog="anomalib-ot",
                version=__version__,
                description="Tools of anomalib-ot. Use the command anomalib to train and run its models.",
            )
        except KeyboardInterrupt:
            logger.info("anomalib-ot: interrupted")
            # The exit status of a shell for a command that SIGINT has ended.
            sys.exit(130)
        except (ImportError, OSError, RuntimeError, ValueError) as error:
            if not _is_expected(error):
                traceback.print_exc()
            text = missing_package(error) if isinstance(error, ModuleNotFoundError) else str(error)
            sys.exit(f"anomalib-ot: {' '.join(text.split())}")
    print(output)  # noqa: T201


def _ignore_foreign_warnings() -> None:
    """Ignore warnings of other packages, most of which come from imports, unless the user has set Python's filters."""
    if sys.warnoptions:
        return
    for category in (DeprecationWarning, FutureWarning, UserWarning):
        warnings.filterwarnings("ignore", category=category)
    warnings.filterwarnings("default", module=r"anomalib_ot(\.|$)")


def _is_expected(error: BaseException) -> bool:
    """Whether the message suffices without a traceback, by the type of the error or the package that raised it."""
    if isinstance(error, ImportError | OSError):
        return True
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals.get("__name__", "").partition(".")[0] in _EXPLAINING
