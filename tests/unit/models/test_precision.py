"""The models learn and score in each precision of the trainer, and whatever torch allows products of matrices."""

from contextlib import contextmanager

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision

from anomalib_ot import Duo, FewShot, Foct, Pradot, WtFlow

SMALL = {"layers": ["layer2"], "pre_trained": False, "image_size": (64, 64), "visualizer": False}
MODELS = {
    "Pradot": lambda: Pradot("test_resnet", **SMALL, prototypes_per_cell=1, epochs=1),
    "Foct": lambda: Foct("test_resnet", **SMALL, rotations=2, support_steps=3),
    "WtFlow": lambda: WtFlow("test_resnet", **SMALL, training_steps=2, width=16),
    "Duo": lambda: Duo(
        "test_resnet",
        **SMALL,
        pradot={"prototypes_per_cell": 1, "epochs": 1},
        wt_flow={"training_steps": 2, "width": 16},
    ),
}


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


@pytest.fixture
def train(name, data, engine):
    """Trains a model, always the same, on the same pictures."""

    def train(**arguments):
        torch.manual_seed(0)
        model = MODELS[name]()
        engine(**arguments).fit(model, datamodule=FewShot(data(), 2) if name == "Foct" else data())
        return model

    return train


def test_float16_of_a_graphics_card_has_its_scaler(train):
    # Lightning takes bfloat16 on a processor unless it is given the parts.
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))
    model = train(plugins=[plugin])
    assert all(value.isfinite().all() for value in model.state_dict().values() if value.is_floating_point())
    assert model.model.eval()(torch.rand(1, 3, 64, 64)).anomaly_map.isfinite().all()


@pytest.fixture
def less_precise():
    """Products of float32 matrices may be in bfloat16, and are where the processor has units for it."""

    @contextmanager
    def less_precise():
        torch.set_float32_matmul_precision("medium")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision("highest")

    return less_precise


def test_less_precise_products_change_no_score(train, less_precise):
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    model = train().model.eval()
    expected = model(images)
    with less_precise():
        found = model(images)
    assert torch.equal(found.anomaly_map, expected.anomaly_map)
    assert torch.equal(found.pred_score, expected.pred_score)


def test_less_precise_products_change_nothing_that_transport_learns(train, less_precise, name):
    expected = train().model.state_dict()
    with less_precise():
        found = train().model.state_dict()
    if name == "WtFlow":
        expected, found = ({key: state[key] for key in state if "normalization" in key} for state in (expected, found))
    assert expected
    assert [key for key in expected if not torch.equal(found[key], expected[key])] == []
