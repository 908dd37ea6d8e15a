"""Who only scores needs no compiler: neither the time to import it nor a place for what it compiles."""

import subprocess
import sys

import pytest

from anomalib_ot import Duo, FewShot, Foct, Pradot, WtFlow

SHARED = {"backbone": "test_resnet", "layers": ["layer3"], "pre_trained": False, "image_size": (64, 64)}
MODELS = {
    "Pradot": lambda: Pradot(prototypes_per_cell=1, whitened_channels=16, epochs=1, batch_size=4, **SHARED),
    "Foct": lambda: Foct(rotations=1, support_steps=1, query_steps=1, online=True, **SHARED),
    "WtFlow": lambda: WtFlow(width=16, whitened_channels=16, training_steps=2, batch_size=4, **SHARED),
    "Duo": lambda: Duo(
        pradot={"prototypes_per_cell": 1, "whitened_channels": 16, "epochs": 1},
        wt_flow={"width": 16, "whitened_channels": 16, "training_steps": 2},
        batch_size=4,
        **SHARED,
    ),
}
SCORE_AND_EXPORT = """
import sys
from pathlib import Path
import torch
import anomalib_ot
from anomalib.deploy import TorchInferencer
from anomalib.engine import Engine

pictures, folder, *checkpoints = sys.argv[1:]
for each in checkpoints:
    name, _, checkpoint = each.partition("=")
    model = getattr(anomalib_ot, name).load_from_checkpoint(checkpoint)
    engine = Engine(default_root_dir=folder, accelerator="cpu", logger=False, enable_progress_bar=False)
    assert len(engine.predict(model, data_path=pictures))
    for kind in ("openvino", "torch"):
        engine.export(model, kind, export_root=Path(folder, name))
    print(name, sorted({module.partition(".")[0] for module in sys.modules} & {"numba", "llvmlite"}))
"""


@pytest.mark.slow
def test_a_process_that_predicts_and_exports_does_not_import_numba(data, engine, checkpoint, root, tmp_path):
    checkpoints = []
    for name, make in MODELS.items():
        runner = engine()
        runner.fit(make(), datamodule=FewShot(data(), 2) if name == "Foct" else data())
        checkpoints.append(f"{name}={checkpoint(runner)}")
    command = [sys.executable, "-W", "ignore", "-c", SCORE_AND_EXPORT, root / "good_test", tmp_path / "out"]
    result = subprocess.run([*command, *checkpoints], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert [line for line in result.stdout.splitlines() if line.startswith((*MODELS,))] == [
        f"{name} []" for name in MODELS
    ]
