"""Samples to mutate: data, checkpoints, a backbone and a saved run."""

from pathlib import Path
from typing import Any

import numpy as np
import timm
from anomalib.engine import Engine
from anomalib.models.components import AnomalibModule
from PIL import Image

from anomalib_ot import Assembly, Duo, FewShot, Foct, Pradot, WtFlow
from anomalib_ot.comparison import Key, Predictions, Record
from anomalib_ot.comparison.record import write_record

SIZE = 32
# One layer only, so that checkpoints are small.
MODEL = {"backbone": "resnet18", "layers": ["layer1"], "pre_trained": False, "image_size": (SIZE, SIZE)}
MODELS: dict[str, tuple[type[AnomalibModule], dict[str, Any]]] = {
    "Pradot": (Pradot, {"prototypes_per_cell": 1, "whitened_channels": 8, "epochs": 1, "batch_size": 4}),
    "Foct": (Foct, {"rotations": 1, "support_steps": 1}),
    "WtFlow": (WtFlow, {"width": 16, "whitened_channels": 8, "training_steps": 2, "batch_size": 4}),
    "Duo": (
        Duo,
        {
            "pradot": {"prototypes_per_cell": 1, "whitened_channels": 8, "epochs": 1},
            "wt_flow": {"width": 16, "whitened_channels": 8, "training_steps": 2},
            "batch_size": 4,
        },
    ),
}
PICTURES = ("PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP")
METRICS = {"image_AUROC": 99.0}


def make_samples(folder: Path) -> None:
    """Write the samples, or restore them if they exist."""
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
    write_record(folder / "runs", Record(Key("tray", "Pradot"), metrics=METRICS), kept_predictions())
    for path in [*folder.rglob("*")]:
        if path.is_file() and "results" not in path.parts:
            copy = folder / "kept" / path.relative_to(folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())


def kept_predictions() -> Predictions:
    """Predictions of a run for four images."""
    scores = np.linspace(0, 1, 4, dtype=np.float32)
    return Predictions(
        [f"{index}.png" for index in range(4)],
        ["good", "good", "bad", "bad"],
        np.array([0, 0, 1, 1]),
        scores,
        scores[:, None, None] * np.ones((1, 8, 8), np.float32),
        np.arange(4)[:, None, None] * np.ones((1, 8, 8)) > 1,
    )
