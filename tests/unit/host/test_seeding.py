"""A model's own seed, which the host's command does not set."""

import pytest
import torch
from anomalib.engine import Engine
from lightning.pytorch import seed_everything

from anomalib_ot import Assembly, WtFlow
from anomalib_ot.host.seeding import own_seed

SETTINGS = {
    "backbone": "test_resnet",
    "layers": ["layer2"],
    "pre_trained": False,
    "image_size": (64, 64),
    "training_steps": 3,
    "batch_size": 4,
    "whitened_channels": 8,
    "evaluator": False,
    "visualizer": False,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return Assembly(tmp_path_factory.mktemp("seeding"), n_train=10, n_validation=2, n_test=1, num_workers=0)


def trained(data, folder, chance, **settings):
    """A model that is trained after some random numbers were drawn."""
    seed_everything(chance, workers=True, verbose=False)
    model = WtFlow(**SETTINGS, **settings)
    Engine(default_root_dir=folder, accelerator="cpu", logger=False, enable_progress_bar=False).fit(
        model, datamodule=data
    )
    return model.state_dict()


def test_a_seed_gives_the_same_model_whatever_was_drawn_before(data, tmp_path):
    first, second = (trained(data, tmp_path, chance, seed=5) for chance in (1, 2))
    assert all(value.equal(second[name]) for name, value in first.items())
    other = trained(data, tmp_path, 1, seed=6)
    assert not all(value.equal(other[name]) for name, value in first.items())


def test_weights_draw_from_their_own_seed_and_leave_the_numbers_of_others():
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    with own_seed(7):
        first = torch.rand(1)
    assert torch.rand(2).equal(expected)
    with own_seed(7):
        assert torch.rand(1).equal(first)
    torch.manual_seed(1)
    with own_seed(None):
        assert torch.rand(2).equal(expected)


def test_a_negative_seed_is_refused():
    with pytest.raises(ValueError, match="seed must be"):
        WtFlow(**SETTINGS, seed=-1)
