"""Models on plain vision transformers at a size other than that of the pre-training, from training to export."""

import json
from itertools import cycle

import pytest
import torch
from lightning.pytorch import seed_everything

from anomalib_ot import Duo, FewShot, Foct, Pradot, WtFlow

# Few channels and blocks; a DINOv2 still has the position embeddings of 518 pixels.
NARROW = {"embed_dim": 24, "depth": 4, "num_heads": 2}
ARCHITECTURES = ("vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3")
SETTINGS = {
    Pradot: {"prototypes_per_cell": 1, "epochs": 2},
    Foct: {"rotations": 2, "support_steps": 1},
    WtFlow: {"width": 16, "training_steps": 2},
    Duo: {"pradot": {"prototypes_per_cell": 1, "epochs": 2}, "wt_flow": {"width": 16, "training_steps": 2}},
}
# Each model, and each architecture.
PAIRS = [*zip(SETTINGS, cycle(ARCHITECTURES))]


def narrow(architecture, folder):
    folder.mkdir()
    config = {"architecture": architecture, "pretrained_cfg": {"input_size": [3, 518, 518]}, "model_args": NARROW}
    (folder / "config.json").write_text(json.dumps(config))
    return f"local-dir:{folder}"


def train(kind, backbone, data, engine):
    seed_everything(0, verbose=False)
    data = FewShot(data(), 2) if kind is Foct else data()
    size = (70, 84) if "patch14" in backbone else (64, 80)
    model = kind(backbone, pre_trained=False, image_size=size, **SETTINGS[kind], evaluator=False, visualizer=False)
    engine.fit(model, datamodule=data)
    return model.eval()


@pytest.mark.parametrize(
    ("kind", "architecture"),
    [
        pytest.param(kind, each, marks=() if (kind, each) in PAIRS else pytest.mark.slow)
        for kind in SETTINGS
        for each in ARCHITECTURES
    ],
)
def test_a_checkpoint_gives_the_same_scores(kind, architecture, data, engine, checkpoint, tmp_path):
    runner = engine()
    # The name of the folder says nothing of the network; that of a loaded checkpoint's backbone does neither.
    backbone = narrow(architecture, tmp_path / architecture.replace("vit_", ""))
    model = train(kind, backbone, data, runner)
    path = checkpoint(runner)
    expected = runner.predict(model, datamodule=data())
    loaded = kind.load_from_checkpoint(path, evaluator=False, visualizer=False)
    another = kind(pre_trained=False, evaluator=False, visualizer=False)
    for found in (
        engine().predict(loaded, datamodule=data()),
        engine().predict(another, datamodule=data(), ckpt_path=path),
    ):
        for theirs, ours in zip(expected, found, strict=True):
            assert theirs.anomaly_map.shape[-2:] == model.settings.image_size
            assert torch.equal(theirs.anomaly_map, ours.anomaly_map)
            assert torch.equal(theirs.pred_score, ours.pred_score)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "architecture"), PAIRS)
def test_an_export_computes_the_same_scores(kind, architecture, data, engine, tmp_path):
    pytest.importorskip("openvino")
    model = train(kind, narrow(architecture, tmp_path / architecture), data, engine())
    # Raises if the scores differ.
    assert model.to_openvino(tmp_path, datamodule=data()).is_file()
