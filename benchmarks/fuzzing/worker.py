"""Cases in a separate process, and their outcomes."""

import io
import logging
import random
import resource
import traceback
import warnings
from argparse import ArgumentError
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from PIL import Image

from anomalib_ot.features.backbone_sources import BackboneError

from .files import backbone, checkpoint, defects, kept_run, mask, picture
from .folders import label, output
from .mutation import Changed
from .samples import make_samples
from .settings import Reached, arguments, fit, host_config, plan, settings

# Errors for users; anomalib's image reader raises those of Pillow.
PLAIN = (
    *(ArgumentError, BackboneError, Image.DecompressionBombError, MisconfigurationException),
    *(OSError, SyntaxError, ValueError),
)
SECONDS = 300
MEMORY = 16 * 2**30
TARGETS: dict[str, Callable[[random.Random, Changed], None]] = {
    each.__name__: each
    for each in (
        *(picture, mask, defects, checkpoint, backbone, plan, settings, fit, host_config, arguments, kept_run),
        *(label, output),
    )
}


class Worker:
    """Runs cases in a separate process, which it starts again after a case that ends it.

    Args:
        folder: Folder of the samples.
        seed: Random seed.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder = folder
        self._seed = seed
        self._context = get_context("spawn")

    def __enter__(self) -> "Worker":  # noqa: PYI034 - Self is Python 3.11's
        make_samples(self._folder)
        self._start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        self._process.join()

    def run(self, target: str, case: int) -> tuple[str, str]:
        """The outcome ``result``, ``refused`` or ``finding``, and a description of a finding."""
        self._connection.send((target, f"{self._seed} {target} {case}"))
        detail = f"- no answer within {SECONDS} s"
        try:
            if self._connection.poll(SECONDS):
                return self._connection.recv()
        except EOFError:
            self._process.join()
            detail = f"- the process ended with {self._process.exitcode}"
        self._process.kill()
        self._process.join()
        make_samples(self._folder)
        self._start()
        return "finding", detail

    def _start(self) -> None:
        self._connection, theirs = self._context.Pipe()
        self._process = self._context.Process(target=_serve, args=(theirs, self._folder), daemon=True)
        self._process.start()
        theirs.close()
        # The imports take long on a busy machine.
        self._connection.recv()


def _serve(connection: Connection, folder: Path) -> None:
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    connection.send("ready")
    while True:
        target, seed = connection.recv()
        with _silenced() as said:
            outcome = _try(target, random.Random(seed), folder, said)  # noqa: S311
        connection.send(outcome)


@contextmanager
def _silenced() -> Iterator[io.StringIO]:
    said = io.StringIO()
    with redirect_stderr(said), redirect_stdout(io.StringIO()):
        yield said


def _try(target: str, generator: random.Random, folder: Path, said: io.StringIO) -> tuple[str, str]:
    """The outcome of a case, ``result``, ``refused`` or ``finding``, and its message."""
    samples = Changed(folder, generator)
    try:
        TARGETS[target](generator, samples)
    except Reached:
        return "result", ""
    except (*PLAIN, SystemExit) as error:
        words = f"{error} {said.getvalue()}" if isinstance(error, SystemExit) else str(error)
        if words.strip() and (not samples.blamed or any(name in words for name in samples.blamed)):
            return "refused", words
        return "finding", _described(error, "names no file: ")
    except BaseException as error:  # noqa: BLE001 - any other exception is a finding
        return "finding", _described(error)
    finally:
        samples.restore()
    return "result", ""


def _described(error: BaseException, why: str = "") -> str:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "benchmarks" not in frame.filename]
    ours = [frame for frame in frames if "anomalib_ot" in frame.filename] or frames
    place = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "the check itself"
    last = "".join(traceback.format_exception(error))[-1500:]
    return f"- {why}{type(error).__name__} at {place}\n{last}"
