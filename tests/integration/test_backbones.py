"""Whole models on a network whose maps come in another order of axes."""

import pytest
from anomalib.engine import Engine
from lightning.pytorch import seed_everything

from anomalib_ot import Assembly, Duo, FewShot, Foct, Pradot, WtFlow

# MambaOut gives (B, H, W, D).
COMMON = {"backbone": "test_mambaout", "layers": ["stages.1"], "pre_trained": False, "image_size": (96, 128)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (Pradot, {"prototypes_per_cell": 2, "epochs": 3}),
        (Foct, {"rotations": 1, "support_steps": 2}),
        (WtFlow, {"width": 16, "training_steps": 30, "batch_size": 4}),
        (
            Duo,
            {
                "pradot": {"prototypes_per_cell": 2, "epochs": 3},
                "wt_flow": {"width": 16, "training_steps": 30},
                "batch_size": 4,
            },
        ),
    ],
)
def test_models_find_defects_with_maps_in_another_order_and_export(kind, settings, tmp_path):
    pytest.importorskip("openvino")
    seed_everything(0)
    model = kind(**COMMON, **settings, visualizer=False)
    engine = Engine(default_root_dir=tmp_path, accelerator="cpu", logger=False)
    data = FewShot(Assembly(tmp_path / "data"), 8, 0)
    engine.fit(model, datamodule=data)
    (metrics,) = engine.test(model, datamodule=data)
    assert metrics["pixel_AUROC"] > 0.8
    # The export refuses a graph whose maps are not torch's.
    assert engine.export(model, "openvino", export_root=tmp_path).is_file()
