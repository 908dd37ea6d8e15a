"""The training, by the stock command of anomalib and a configuration file."""

import logging
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml
from anomalib.models.components import AnomalibModule
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from anomalib_ot.comparison.environment import installed_versions
from anomalib_ot.features.backbone_sources import weights_state
from anomalib_ot.files import write_text
from anomalib_ot.host.class_paths import class_of
from anomalib_ot.host.seeding import Seeded
from anomalib_ot.images.folder import state_of
from anomalib_ot.images.reading import EIGHT_BITS, Reading
from anomalib_ot.selection.candidates import Candidate

logger = logging.getLogger(__name__)

CONFIG = "config.yaml"
_RESULT = "checkpoint.txt"
_HEAD = "# The training of anomalib-ot fit, for: anomalib train --config {name}\n"
# Lines of the log in an error message.
_TAIL = 15


def configuration(
    candidate: Candidate,
    images: Path,
    left_out: Sequence[Path],
    false_alarm_rate: float,
    seed: int,
    reading: Reading = EIGHT_BITS,
) -> dict[str, Any]:
    """The configuration of a training, for the stock command ``anomalib``.

    Args:
        candidate: The model, its image size and its backbone.
        images: Folder of the good images, as an absolute path.
        left_out: Images of the folder that are not used.
        false_alarm_rate: Promised rate of false alarms.
        seed: Seed of all random numbers.
        reading: How images with more than 8 bits per channel are read.

    Returns:
        The configuration. A model that calibrates itself trains on all images; of others, a fifth of the images is
        held out to calibrate them.
    """
    model = candidate.config()
    kind = class_of(AnomalibModule, model)
    own: dict[str, Any] = {
        "post_processor": _class("anomalib_ot.decide.ConformalPostProcessor", false_alarm_rate=false_alarm_rate)
    }
    size = [*candidate.image_size]
    if issubclass(kind, Seeded):
        # The command ignores seed_everything, so that anomalib's own models are not seeded.
        own |= {"image_size": size, "seed": seed}
    else:
        own["pre_processor"] = _class(
            "anomalib_ot.features.preprocessing.resize_and_normalize", image_size=size, backbone=candidate.backbone
        )
    data: dict[str, Any] = {
        "name": images.name or "images",
        "root": str(images),
        "left_out": sorted(str(path.relative_to(images)) for path in left_out),
        "seed": seed,
        "num_workers": 0,
    }
    if issubclass(kind, Seeded):
        # These calibrate themselves.
        data["held_out"] = 0
    module = _class("anomalib_ot.data.GoodPictures", **data)
    if reading.is_full_range:
        module = _class("anomalib_ot.data.FullRange", datamodule=module, value_range=reading.value_range)
    return {"model": {**model, "init_args": {**model["init_args"], **own}}, "data": module}


def images_of(config: dict[str, Any]) -> str:
    """Folder of the images of a configuration.

    Raises:
        KeyError: If it is not one of :func:`configuration`.
        TypeError: If it is not.
    """
    settings = config["data"]["init_args"]
    return str(settings.get("datamodule", config["data"])["init_args"]["root"])


def _class(class_path: str, **init_args: Any) -> dict[str, Any]:
    return {"class_path": class_path, "init_args": init_args}


def train(config: dict[str, Any], name: str, images: Sequence[Path], parent: Path) -> tuple[Path, Path]:
    """Train a model, unless the same configuration has been trained on the same images with the same packages.

    Args:
        config: The configuration.
        name: Name of the model, for the log.
        images: The images that it trains on.
        parent: Folder that gets a folder for each configuration, with the log and the runs of anomalib.

    Returns:
        The configuration file and the checkpoint.

    Raises:
        RuntimeError: If the training failed.
    """
    # Escaped, as a name of a file may be no valid text.
    text = _HEAD.format(name=CONFIG) + yaml.safe_dump(config, sort_keys=False)
    states = [(str(path), *state_of(path)) for path in images]
    weights = weights_state(config["model"].get("init_args", {}).get("backbone", ""))
    folder = parent / sha256(repr((text, states, weights, installed_versions())).encode()).hexdigest()[:12]
    path, result = folder / CONFIG, folder / _RESULT
    # Written after the training, so that the checkpoint of an interrupted one does not count.
    if result.is_file() and (done := folder / result.read_text(encoding="utf-8")).is_file():
        logger.info("The training is skipped: it is finished, and nothing has changed since.")
        return path, done
    folder.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
    log = folder / "train.log"
    logger.info("Training %s on %d images; %s has its progress.", name, len(images), log)
    with _elapsed_time(f"Training {name}"):
        _run(["fit", "--config", str(path), "--default_root_dir", str(folder / "runs")], log)
    runs = sorted(folder.glob("runs/**/weights/lightning/model.ckpt"), key=lambda found: found.stat().st_mtime_ns)
    if not runs:
        msg = f"the training has left no checkpoint in {folder}; its log is {log}"
        raise RuntimeError(msg)
    write_text(result, str(runs[-1].relative_to(folder)))
    return path, runs[-1]


@contextmanager
def _elapsed_time(step: str) -> Iterator[None]:
    """Show the time that a step has taken, on a terminal alone. The step prints and logs nothing."""
    console = Console(stderr=True)
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        progress.add_task(step, total=None)
        yield


def _run(arguments: Sequence[str], log: Path) -> None:
    """Run the stock command, and show what it prints if it fails."""
    command = [sys.executable, "-c", "from anomalib.cli.cli import main; main()", *arguments]
    with log.open("w", encoding="utf-8") as file:
        done = subprocess.run(  # noqa: S603 - this Python, the host's command, files of ours
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, check=False
        )
    if done.returncode:
        with log.open(encoding="utf-8", errors="replace") as file:
            tail = "".join(deque(file, _TAIL))
        msg = f"the training failed with status {done.returncode}; its log is {log}, which ends with: {tail}"
        raise RuntimeError(msg)
