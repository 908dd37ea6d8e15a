"""Mutated pictures, masks, configurations, plans, checkpoints, backbones and kept runs, fed to whatever reads them.

Run as ``python -m benchmarks.fuzz --minutes 60``, on Linux. Each case has a result or is refused in words: by an error
that a user is meant to read, which names the file where one is to blame. All else is a finding, among it what ends the
process, hangs, or takes too much memory; ``--target picture --case 1234`` with the same seed repeats one. Cases run in
another process, which is started anew after one that ended it.
"""

import io
import json
import logging
import os
import random
import resource
import sys
import tempfile
import time
import traceback
import warnings
from argparse import ArgumentError
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import timm
import torch
import yaml
from anomalib.cli import AnomalibCLI
from anomalib.data import AnomalibDataModule, PredictDataset
from anomalib.engine import Engine
from anomalib.models.components import AnomalibModule
from jsonargparse import auto_cli
from lightning.fabric.utilities.exceptions import MisconfigurationException
from PIL import Image
from torch import Tensor

from anomalib_ot import Assembly, FewShot, Foct, Pradot, WtFlow, comparison
from anomalib_ot.cli import main as command
from anomalib_ot.comparison import Key, Predictions, Record, read_plan
from anomalib_ot.comparison.record import read_records, write_record
from anomalib_ot.components.backbones import BackboneError, create_extractor, normalization
from anomalib_ot.components.class_paths import create
from anomalib_ot.data import LOCODataset, MVTecLOCOAD, image_defects, read_defects

CONFIGS = Path(__file__).parents[1] / "configs"
SIZE = 32
# Each has a layer alone, so that checkpoints are small.
MODEL = {"backbone": "resnet18", "layers": ["layer1"], "pre_trained": False, "image_size": (SIZE, SIZE)}
MODELS: dict[str, tuple[type[AnomalibModule], dict[str, Any]]] = {
    "Pradot": (Pradot, {"prototypes_per_cell": 1, "whitened_channels": 8, "epochs": 1, "batch_size": 4}),
    "Foct": (Foct, {"rotations": 1, "support_steps": 1}),
    "WtFlow": (WtFlow, {"width": 16, "whitened_channels": 8, "training_steps": 2, "batch_size": 4}),
}
FILES = {"WtFlow": "wt_flow"}
PICTURES = ("PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP")
# What no setting expects.
STRANGE = (
    *(None, True, False, 0, 1, -1, 2**70, 0.5, -0.0, 1e308, float("nan"), float("inf")),
    *("", "x", "é\0", "../..", "Padim", [], {}, [[]], [1, "b"], {"a": 1}, {"class_path": "Pradot"}),
)
# Errors for a user to read; the reader of pictures is the host's, with Pillow's errors.
PLAIN = (
    *(ArgumentError, BackboneError, Image.DecompressionBombError, MisconfigurationException),
    *(OSError, SyntaxError, ValueError),
)
SECONDS = 300
MEMORY = 16 * 2**30


class Reached(Exception):  # noqa: N818 - no error
    """The command would now do its work."""


class Changed:
    """The samples, one of which is not what it was.

    Attributes:
        root: Their folder.
        blamed: Names of which an error has to hold one.
    """

    def __init__(self, root: Path, generator: random.Random) -> None:
        self.root = root
        self.blamed: tuple[str, ...] = ()
        self._generator = generator
        self._originals: dict[Path, bytes] = {}

    def write(self, path: Path, content: bytes, *blamed: str) -> None:
        """Change a sample, until :meth:`restore`; an error has to name it, by its own name if not others."""
        self._originals[path] = path.read_bytes()
        path.write_bytes(content)
        self.blamed = blamed or (path.name,)

    def mutate(self, path: Path, *blamed: str) -> None:
        """Change some bytes of a sample."""
        self.write(path, mutated(self._generator, path.read_bytes()), *blamed)

    def restore(self) -> None:
        """Let all samples be what they were."""
        for path, content in self._originals.items():
            path.write_bytes(content)


def mutated(generator: random.Random, content: bytes) -> bytes:
    """Bytes with some of them changed, left out, put in or cut off, most often near one of the ends."""
    changed = bytearray(content)
    for _ in range(generator.choice((1, 1, 2, 4, 16))):
        place = int(generator.random() ** generator.choice((1, 3)) * len(changed))
        place = place if generator.random() < 0.7 else len(changed) - place  # noqa: PLR2004
        how = generator.choice(("change", "remove", "insert", "cut"))
        if how == "change" and place < len(changed):
            changed[place] = generator.randrange(256)
        elif how == "remove":
            del changed[place : place + generator.randrange(1, 64)]
        elif how == "insert":
            changed[place:place] = generator.randbytes(generator.randrange(1, 32))
        elif how == "cut":
            del changed[place:]
    return bytes(changed)


def altered(generator: random.Random, value: Any, times: int = 1) -> Any:
    """Nested lists and dictionaries in which a value, or a key, is another one or gone."""
    for _ in range(times):
        value = _altered(generator, value)
    return value


def _altered(generator: random.Random, value: Any) -> Any:
    if not isinstance(value, dict | list) or not value or generator.random() < 0.1:  # noqa: PLR2004
        return generator.choice(STRANGE)
    if isinstance(value, list):
        index = generator.randrange(len(value))
        kept = [*value[:index], *value[index + 1 :]]
        how = generator.choice(("within", "within", "remove", "repeat"))
        return {
            "within": lambda: [*value[:index], _altered(generator, value[index]), *value[index + 1 :]],
            "remove": lambda: kept,
            "repeat": lambda: [*value, value[index]],
        }[how]()
    key = generator.choice([*value])
    rest = {name: each for name, each in value.items() if name != key}
    how = generator.choice(("within", "within", "within", "remove", "rename"))
    return {
        "within": lambda: {**value, key: _altered(generator, value[key])},
        "remove": lambda: rest,
        "rename": lambda: {**rest, generator.choice(("x", "", 1, f"{key}s")): value[key]},
    }[how]()


def changed_text(generator: random.Random, content: Any, dump: Callable[[Any], str]) -> bytes:
    """A configuration in which values, or bytes, are others."""
    text = dump(altered(generator, content, generator.choice((0, 1, 1, 2)))).encode()
    return mutated(generator, text) if generator.random() < 0.3 else text  # noqa: PLR2004


def picture(generator: random.Random, samples: Changed) -> None:
    """A picture of any kind, as training, few-shot, test and new picture."""
    good = samples.root / "tray" / "train" / "good" / "000.png"
    kind = samples.root / f"plain.{generator.choice(PICTURES).lower()}"
    samples.write(good, mutated(generator, kind.read_bytes()))
    how = generator.randrange(4)
    if how == 0:
        LOCODataset(samples.root / "tray", "train")[0]
    elif how == 1:
        data = MVTecLOCOAD(samples.root, "tray", num_workers=0)
        FewShot(data, 8).setup()
    elif how == 2:  # noqa: PLR2004
        image_defects(good)
    else:
        # The host's reader, which does not always name the file.
        samples.blamed = ()
        item = PredictDataset(good)[0]
        assert item.image.shape[0] == 3, item.image.shape  # noqa: S101, PLR2004


def mask(generator: random.Random, samples: Changed) -> None:
    """A mask of a defect."""
    folder = samples.root / "tray" / "ground_truth" / "logical_anomalies" / "000"
    path = folder / "000.png"
    if generator.random() < 0.5:  # noqa: PLR2004
        samples.mutate(path, str(folder))
    else:
        file = io.BytesIO()
        pixels = generator.choices((0, 250, 255), (8, generator.random(), generator.random()), k=64 * 64)
        shape = generator.choice(((64, 64), (1, 4096), (64, 64)))
        Image.fromarray(np.array(pixels, np.uint8).reshape(shape)).save(file, generator.choice(("PNG", "BMP")))
        samples.write(path, file.getvalue(), str(folder))
    if generator.random() < 0.5:  # noqa: PLR2004
        read_defects(folder)
    else:
        data = LOCODataset(samples.root / "tray", "test")
        items = [data[index] for index in range(len(data))]
        assert all(item.gt_mask.shape == item.image.shape[-2:] for item in items)  # noqa: S101


def defects(generator: random.Random, samples: Changed) -> None:
    """What masks mean."""
    path = samples.root / "tray" / "defects_config.json"
    samples.write(path, changed_text(generator, json.loads(path.read_text()), json.dumps))
    # Cached by the time of the last change, which two cases may share.
    os.utime(path, ns=(generator.getrandbits(60), generator.getrandbits(60)))
    for folder in (samples.root / "tray" / "ground_truth").glob("*/*"):
        found = read_defects(folder)
        assert bool((found.saturation > 0).all()), found.saturation  # noqa: S101


def checkpoint(generator: random.Random, samples: Changed) -> None:
    """A checkpoint, whose bytes or content have changed."""
    name = generator.choice([*MODELS])
    path = samples.root / f"{name}.ckpt"
    if generator.random() < 0.4:  # noqa: PLR2004
        content = torch.load(path, weights_only=True)
        file = io.BytesIO()
        torch.save(_altered_checkpoint(generator, content), file)
        samples.write(path, file.getvalue())
        # A setting may be named instead. What was learned has no shape that could be known to be wrong.
        samples.blamed = ()
        MODELS[name][0].load_from_checkpoint(path)
        return
    samples.mutate(path)
    model = MODELS[name][0].load_from_checkpoint(path).eval()
    with torch.no_grad():
        assert model(torch.rand(2, 3, SIZE, SIZE)).anomaly_map.shape[0] == 2  # noqa: S101, PLR2004


def _altered_checkpoint(generator: random.Random, content: dict[str, Any]) -> dict[str, Any]:
    part = generator.choice(("all", "state_dict", "state_dict", "hyper_parameters", "own"))
    if part == "all":
        return altered(generator, content)
    if part == "own":
        part = generator.choice([key for key in content if key not in {"state_dict", "hyper_parameters"}])
        return {**content, part: altered(generator, content[part])}
    if part == "hyper_parameters":
        return {**content, part: altered(generator, dict(content[part]))}
    tensors = dict(content[part])
    name = generator.choice([*tensors])
    tensors[name] = generator.choice((_cut, _double, torch.Tensor.bool, _none, _empty))(tensors[name])
    return {**content, part: tensors}


def _cut(tensor: Tensor) -> Tensor:
    return tensor[..., :-1] if tensor.dim() else tensor


def _double(tensor: Tensor) -> Tensor:
    return torch.stack([tensor, tensor])


def _none(_: Tensor) -> None:
    return None


def _empty(tensor: Tensor) -> Tensor:
    return tensor.new_empty(0)


def backbone(generator: random.Random, samples: Changed) -> None:
    """The folder of a backbone."""
    folder = samples.root / "backbone"
    path = generator.choice(sorted(folder.iterdir()))
    if path.suffix == ".json" and generator.random() < 0.6:  # noqa: PLR2004
        samples.write(path, changed_text(generator, json.loads(path.read_text()), json.dumps), str(folder))
    else:
        samples.mutate(path, str(folder))
    normalization(f"local-dir:{folder}")
    create_extractor(f"local-dir:{folder}", ["layer1"], pre_trained=generator.random() < 0.7)  # noqa: PLR2004


def plan(generator: random.Random, samples: Changed) -> None:
    """A plan of a comparison."""
    path = samples.root / "plan.yaml"
    original = generator.choice(sorted((CONFIGS / "compare").glob("*.yaml")))
    content = yaml.safe_load(original.read_text(encoding="utf-8"))
    samples.write(path, changed_text(generator, content, yaml.safe_dump))
    # Settings are named as well as the file.
    samples.blamed = ()
    read = read_plan(path)
    read.published()
    assert read.jobs()  # noqa: S101
    json.dumps([job.to_dict() for job in read.jobs()])


def settings(generator: random.Random, samples: Changed) -> None:
    """The settings of a model or a data module."""
    del samples
    name = generator.choice([*MODELS, "Assembly", "FewShot", "MVTecLOCOAD"])
    if name not in MODELS:
        arguments: dict[str, dict[str, Any]] = {
            "Assembly": {"n_train": 8, "n_validation": 1, "n_test": 1, "seed": 0, "train_batch_size": 4},
            "FewShot": {"shots": 2, "seed": 0, "datamodule": {"class_path": "Assembly", "init_args": {"seed": 1}}},
            "MVTecLOCOAD": {"root": "x", "category": "tray", "val_split_mode": "from_dir", "val_split_ratio": 0.5},
        }
        create(AnomalibDataModule, {"class_path": name, "init_args": altered(generator, arguments[name])})
        return
    create(AnomalibModule, {"class_path": name, "init_args": _model_settings(generator, name)})


def _model_settings(generator: random.Random, name: str) -> Any:
    wanted = altered(generator, _defaults(name), generator.choice((1, 1, 1, 2)))
    # Whether a hub can be reached is not what is tried here.
    return {**wanted, "pre_trained": False} if isinstance(wanted, dict) else wanted


def _defaults(name: str) -> dict[str, Any]:
    path = CONFIGS / "model" / f"{FILES.get(name, name.lower())}.yaml"
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {**content["model"]["init_args"], **MODEL, "image_size": [SIZE, SIZE]}


def host_config(generator: random.Random, samples: Changed) -> None:
    """A configuration for the host's command."""
    name = generator.choice([*MODELS])
    path = samples.root / "config.yaml"
    content = {
        "model": {"class_path": f"anomalib.models.{name}", "init_args": _defaults(name)},
        "data": {"class_path": "anomalib_ot.Assembly", "init_args": {"root": str(samples.root / "data")}},
    }
    samples.write(path, changed_text(generator, content, yaml.safe_dump))
    samples.blamed = ()
    AnomalibCLI(["train", "--config", str(path), "--default_root_dir", str(samples.root / "results")], run=False)


def arguments(generator: random.Random, samples: Changed) -> None:
    """A command line of ours, up to where the work begins."""
    line = {
        "compare": {
            "plan": str(CONFIGS / "compare" / "quick.yaml"),
            "models": "[Pradot, Padim]",
            "data": "[Assembly]",
            "layers": "[blocks.2]",
            "image_size": "[32, 32]",
            "seeds": "[0, 1]",
            "shots": "[1, 2]",
            "ensemble": "Pradot+Padim",
            "workers": "2",
            "openvino": "true",
            "time_limit": "2.5",
        },
        "explain": {
            "ckpt_path": str(samples.root / "Pradot.ckpt"),
            "data": str(samples.root / "tray" / "train" / "good"),
            "pictures": "[000]",
            "count": "1",
            "views": "[assignments]",
            "pixel": "[3, 4]",
            "formats": "[png]",
            "model": "Pradot",
        },
        "weights": {"architecture": "tf_efficientnet_lite1"},
    }
    name = generator.choice([*line])
    kept = {key: value for key, value in line[name].items() if generator.random() < 0.6}  # noqa: PLR2004
    for key, value in kept.items():
        if generator.random() < 0.3:  # noqa: PLR2004
            text = generator.choice((json.dumps(generator.choice(STRANGE)), value)).encode()
            kept[key] = mutated(generator, text).decode(errors="replace")
    options = [part for key, value in kept.items() for part in (f"--{key}", value)]
    output = ["--output", str(samples.root / "output")] if name != "weights" else []
    with (
        patch.object(comparison, "compare", side_effect=Reached),
        patch("anomalib_ot.visualization.explanation.write_views", side_effect=Reached),
        patch("anomalib_ot.offline.offline_backbone", side_effect=Reached),
    ):
        command([name, *options, *output])


def kept_run(generator: random.Random, samples: Changed) -> None:
    """A run that a comparison has kept."""
    runs = samples.root / "runs"
    path = generator.choice(sorted(path for path in runs.rglob("*") if path.is_file()))
    folder = str(path.parent)
    if path.suffix == ".json" and generator.random() < 0.7:  # noqa: PLR2004
        samples.write(path, changed_text(generator, json.loads(path.read_text()), json.dumps), folder)
    else:
        samples.mutate(path, folder)
    (record,) = read_records(runs)
    found = record.predictions
    assert found.maps is None or len(found.maps) == len(found.scores)  # noqa: S101
    comparison.write_report([record], samples.root / "report", "Report", None, [])


TARGETS: dict[str, Callable[[random.Random, Changed], None]] = {
    each.__name__: each
    for each in (picture, mask, defects, checkpoint, backbone, plan, settings, host_config, arguments, kept_run)
}
# How often each is tried; a case of the slowest takes seconds.
WEIGHTS = {"picture": 30, "mask": 15, "defects": 20, "checkpoint": 10, "host_config": 1, "plan": 6}


def main(
    minutes: float = 60.0,
    seed: int = 0,
    target: str | None = None,
    case: int | None = None,
) -> None:
    """Print each kind of finding when it is first met, and all counts at the end; exit with 1 if there are any.

    Args:
        minutes: How long to try.
        seed: Seed of everything random.
        target: Try this alone.
        case: Try this case alone, and print its traceback.
    """
    counts: Counter[tuple[str, str]] = Counter()
    findings: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder, Worker(Path(folder), seed) as worker:
        if case is not None and target is not None:
            print(worker.run(target, case))
            return
        started = time.monotonic()
        number = 0
        while time.monotonic() - started < 60 * minutes:
            names = [*TARGETS]
            weights = [WEIGHTS.get(name, 3) for name in names]
            name = target or random.Random(f"{seed} {number}").choices(names, weights)[0]  # noqa: S311
            kind, detail = worker.run(name, number)
            counts[name, kind] += 1
            if kind == "finding":
                _, _, key = detail.partition("\n")[0].partition(" ")
                findings[f"{name}: {key}"] += 1
                if findings[f"{name}: {key}"] == 1:
                    print(f"--seed {seed} --target {name} --case {number}\n{detail}\n", flush=True)
            number += 1
    for (name, kind), count in sorted(counts.items()):
        print(f"{name}: {count} {kind}")
    for key, count in findings.most_common():
        print(f"{count} times {key}")
    print(f"{number} cases in {(time.monotonic() - started) / 60:.0f} min, {len(findings)} kinds of findings")
    sys.exit(bool(findings))


class Worker:
    """Runs cases in a process of its own, which it starts anew when one has ended it.

    Args:
        folder: Where its samples are.
        seed: Seed of everything random.
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
        """``result``, ``refused`` or ``finding``, and of the latter what it is."""
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
        # Its imports take long where the machine is busy.
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
    """The outcome of a case: ``result``, ``refused`` or ``finding``, with what it says."""
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
    except BaseException as error:  # noqa: BLE001 - whatever else there is, is a finding
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


def make_samples(folder: Path) -> None:
    """Write what is mutated, unless it is there, and make it whole if it is."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for kind in PICTURES:
        Image.fromarray(noise).save(folder / f"plain.{kind.lower()}", kind)
    for name in ("plan.yaml", "config.yaml"):
        (folder / name).write_text("")
    if (folder / "kept").exists():
        for path in (folder / "kept").rglob("*"):
            if path.is_file():
                (folder / path.relative_to(folder / "kept")).write_bytes(path.read_bytes())
        return
    data = Assembly(folder, n_train=8, n_validation=1, n_test=1, train_batch_size=4)
    data.prepare_data()
    for path in (folder / "tray").rglob("*.png"):
        with Image.open(path) as image:
            small = image.resize((64, 64), Image.Resampling.NEAREST)
        small.save(path)
    for name, (kind, own) in MODELS.items():
        model = kind(**{**MODEL, **own, "visualizer": False})
        engine = Engine(default_root_dir=folder / "results", accelerator="cpu", logger=False)
        engine.fit(model, datamodule=FewShot(data, 2) if name == "Foct" else data)
        engine.trainer.save_checkpoint(folder / f"{name}.ckpt")
    timm.models.save_for_hf(timm.create_model("test_resnet"), folder / "backbone")
    scores = np.linspace(0, 1, 4, dtype=np.float32)
    predictions = Predictions(
        [f"{index}.png" for index in range(4)],
        ["good", "good", "bad", "bad"],
        np.array([0, 0, 1, 1]),
        scores,
        scores[:, None, None] * np.ones((1, 8, 8), np.float32),
        np.arange(4)[:, None, None] * np.ones((1, 8, 8)) > 1,
    )
    write_record(folder / "runs", Record(Key("tray", "Pradot"), metrics={"image_AUROC": 99.0}), predictions)
    for path in [*folder.rglob("*")]:
        if path.is_file() and "results" not in path.parts:
            copy = folder / "kept" / path.relative_to(folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
