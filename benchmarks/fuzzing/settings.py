"""Invalid and unusual settings, plans and command lines."""

import json
import math
import random
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import yaml
from anomalib.cli import AnomalibCLI
from anomalib.data import AnomalibDataModule
from anomalib.engine import Engine
from anomalib.models.components import AnomalibModule

from anomalib_ot import FewShot, comparison
from anomalib_ot.cli import main as command
from anomalib_ot.comparison import read_plan
from anomalib_ot.data import MVTecLOCOAD
from anomalib_ot.host.class_paths import create
from anomalib_ot.shipped import shipped_file, shipped_files

from .mutation import STRANGE, Changed, altered, changed_text, mutated
from .samples import MODEL, MODELS, SIZE

FILES = {"WtFlow": "wt_flow"}
# Overrides on a command line.
OVERRIDES: dict[str, tuple[Any, ...]] = {
    "models": (["Pradot"], ["Pradot", "Padim"], [], [{"class_path": "Padim"}], [{}], [{"class_path": None}], ["x"]),
    "data": (["Assembly"], ["tray"], [], [{"class_path": "MVTecAD", "init_args": None}], [{}], ["Pradot"], ["x"]),
    "root": (Path(), Path("/elsewhere"), Path("../up")),
    "backbone": ("resnet18", "local-dir:~/x", "", "local-dir:", "x"),
    "layers": (["layer1"], []),
    "image_size": ((32, 32), (0, 1)),
    "seeds": ([0, 1], [], [-1], [2**40], [1, 1]),
    "shots": ([1], [0], []),
    "baseline": ("Pradot", "x", ""),
    "ensembles": (["Pradot+Padim"], ["+"], ["Pradot"], [""], []),
}
# Settings that make a model large or slow but are valid.
COSTLY = {
    *("epochs", "training_steps", "support_steps", "query_steps", "euler_steps", "patience", "rotations", "depth"),
    *("sinkhorn_iterations", "mismatch_draws", "prototypes_per_cell", "navigator_hidden", "width", "batch_size"),
}
NUMBERS = (*(-1, 0, 1, 2, 0.5, -0.5, 0.0, 1e-9, 1e-300), *(1000, 2**31, 2**63, 1e9, 1e300, float("inf"), float("nan")))
MODERATE = 9


class Reached(Exception):  # noqa: N818 - no error
    """The command has accepted its arguments and would start its work."""


def plan(generator: random.Random, samples: Changed) -> None:
    """A plan of a comparison."""
    path = samples.root / "plan.yaml"
    original = generator.choice([*shipped_files("compare").values()])
    content = yaml.safe_load(original.read_text(encoding="utf-8"))
    if generator.random() < 0.5:  # noqa: PLR2004
        content = _another_form(generator, content)
    is_changed = generator.random() < 0.5  # noqa: PLR2004
    text = changed_text(generator, content, yaml.safe_dump) if is_changed else yaml.safe_dump(content).encode()
    samples.write(path, text)
    # The error may name a setting instead of the file.
    samples.blamed = ()
    chosen = generator.sample([*OVERRIDES], generator.choice((0, 1, 1, 2, 3)))
    # The first of each is valid.
    overrides: dict[str, Any] = {name: generator.choice(OVERRIDES[name][: generator.choice((1, 9))]) for name in chosen}
    read = read_plan(path, **overrides)
    read.published()
    assert read.jobs()  # noqa: S101
    json.dumps([job.to_dict() for job in read.jobs()])


def _another_form(generator: random.Random, content: dict[str, Any]) -> dict[str, Any]:
    """A plan with one key in another form, valid in YAML but possibly wrong."""
    key = generator.choice(("models", "data", generator.choice([*content]), "ensembles", "baseline", "reference"))
    value = content.get(key)
    forms: list[Any] = [None, [], {}, "Assembly", ["Assembly"], {"a": "Assembly"}, {"a": None}, {None: "a"}, [None]]
    if isinstance(value, dict) and value:
        name = generator.choice([*value])
        inner = value[name] if isinstance(value[name], dict) else {}
        forms += [
            *([*value], [*value.values()], {**value, name: None}, {**value, name: [value[name]]}),
            *({**value, name: {**inner, "init_args": each}} for each in (None, [], "x", [1], {"root": None}, {"": 1})),
            *({**value, name: {**inner, "categories": each}} for each in (None, "bottle", {}, [None], [[]], [1, "a"])),
            *({**value, each: inner} for each in ("../up", "/etc", "C:x", "con", 1, 2.5, True, "", "a+b")),
        ]
    return {**content, key: generator.choice(forms)}


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
    # Access to a hub is not part of the test.
    return {**wanted, "pre_trained": False} if isinstance(wanted, dict) else wanted


def _defaults(name: str) -> dict[str, Any]:
    path = shipped_file(FILES.get(name, name.lower()), "model")
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {**content["model"]["init_args"], **MODEL, "image_size": [SIZE, SIZE]}


def fit(generator: random.Random, samples: Changed) -> None:
    """A model with a number in or out of its range. A model that accepts it must be able to train and predict."""
    name = generator.choice([*MODELS])
    kind, own = MODELS[name]
    defaults = _defaults(name)
    numeric = [key for key, value in defaults.items() if type(value) in {int, float} and key not in own]
    key = generator.choice([*numeric, *own])
    value = generator.choice(NUMBERS[:MODERATE] if key in COSTLY else NUMBERS)
    shared = {key: each for key, each in defaults.items() if key in MODEL} | MODEL
    kept = {**shared, **own, key: type(defaults[key])(value) if defaults[key] is not None and _whole(value) else value}
    model = create(AnomalibModule, {"class_path": name, "init_args": {**kept, "visualizer": False}})
    assert isinstance(model, kind)  # noqa: S101
    data: AnomalibDataModule = MVTecLOCOAD(samples.root, "tray", num_workers=0, train_batch_size=4)
    engine = Engine(default_root_dir=samples.root / "fits", accelerator="cpu", logger=False)
    engine.fit(model, datamodule=FewShot(data, 2) if name == "Foct" else data)
    with torch.no_grad():
        found = model.eval()(torch.rand(2, 3, SIZE, SIZE))
    assert bool(found.anomaly_map.isfinite().all()), f"{key}={value!r} makes scores that are no numbers"  # noqa: S101


def _whole(value: float) -> bool:
    return math.isfinite(value) and value == int(value)


def host_config(generator: random.Random, samples: Changed) -> None:
    """A configuration for anomalib's command."""
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
    """An ``anomalib-ot`` command line, up to the start of its work."""
    line = {
        "compare": {
            "plan": "quick",
            "models": "[Pradot, Padim]",
            "root": str(samples.root / "data"),
            "backbone": "resnet18",
            "baseline": "Pradot",
            "data": "[Assembly]",
            "layers": "[blocks.2]",
            "image_size": "[32, 32]",
            "seeds": "[0, 1]",
            "shots": "[1, 2]",
            "ensemble": "Pradot+Padim",
            "workers": "2",
            "openvino": "true",
            "time_limit": "2.5",
            "total_time_limit": "60",
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
        patch("anomalib_ot.explain.explanation.write_views", side_effect=Reached),
        patch("anomalib_ot.offline.offline_backbone", side_effect=Reached),
    ):
        command([name, *options, *output])
