"""What torch.compile makes of the models says what they say, and learns what they learn."""

from copy import deepcopy
from itertools import product

import pytest
import torch

from anomalib_ot.models.foct import FoctModel, FoctSettings
from anomalib_ot.models.pradot import PradotModel, PradotSettings
from anomalib_ot.models.wt_flow import WtFlowModel, WtFlowSettings

SMALL = {"backbone": "test_resnet", "layers": ["layer3"], "pre_trained": False}
WAYS = {
    "fitted to each query": {"query_steps": 2},
    "online, fitted to each query": {"online": True, "query_steps": 2},
    "online, nearest": {"online": True, "measure": "nearest"},
}


def images(count, seed):
    return torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


def foct(**arguments):
    shares = {"foreground_ratio": 0.5, "background_ratio": 0.5}
    settings = FoctSettings(**SMALL, rotations=2, support_steps=3, tolerance=0, **shares, **arguments)
    model = FoctModel(settings).eval()
    model.fit(images(2, 0))
    return model


def pradot():
    model = PradotModel(PradotSettings(**SMALL, prototypes_per_cell=1, whitened_channels=8)).eval()
    features = model.extract(images(4, 0))
    model.fit_whitening([features])
    model.initialise(features)
    return model


def wt_flow():
    model = WtFlowModel(WtFlowSettings(**SMALL, width=16, whitened_channels=8)).eval()
    model.fit_normalization([model.extract(images(4, 0))])
    return model


@pytest.fixture
def compiled():
    """Compiles without a compiler: the graphs are run as they are, so that each number is the same."""
    torch._dynamo.reset()
    yield lambda model, backend="eager": torch.compile(model, backend=backend)
    torch._dynamo.reset()


@torch.inference_mode()
def scores(model, seeds=(1, 2)):
    return torch.cat([model(images(4 - seed, seed)).anomaly_map for seed in seeds])


@pytest.mark.parametrize(
    ("build", "precision"),
    [
        (wt_flow, "highest"),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in product((pradot, foct), ("medium", "highest"))),
    ],
)
def test_a_compiled_model_says_what_it_says_otherwise(build, precision, compiled):
    torch.manual_seed(0)
    model = build()
    torch.set_float32_matmul_precision(precision)
    try:
        assert torch.equal(scores(compiled(model)), scores(model))
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision("highest")


# The quick way has what the others have apart.
@pytest.mark.parametrize(
    "way", [pytest.param(each, marks=() if "online, fitted" in each else pytest.mark.slow) for each in WAYS]
)
def test_a_compiled_foct_learns_what_it_learns_otherwise(way, compiled):
    torch.manual_seed(0)
    model = foct(**WAYS[way])
    other = deepcopy(model)
    assert torch.equal(scores(compiled(model)), scores(other))
    # What the first queries taught changes what is said of them.
    assert torch.equal(scores(compiled(model)), scores(other))
    assert torch.equal(model.episodic.features, other.episodic.features)
    assert len(model.earlier) == len(other.earlier) == (10 if model.settings.online else 0)


@pytest.mark.slow
def test_a_compiled_online_foct_has_its_backbone_compiled_and_can_be_frozen(compiled):
    torch.manual_seed(0)
    model, found = foct(online=True), []

    def note(graph, _):
        found.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    fast = compiled(model, note)
    scores(fast)
    assert sum("conv2d" in name for name in found) >= 15
    learned = model.episodic.features.clone()
    model.is_frozen = True
    assert torch.equal(scores(fast, (3,)), scores(model, (3,)))
    assert torch.equal(model.episodic.features, learned)
    model.is_frozen = False
    scores(fast, (3,))
    assert len(model.episodic.features) > len(learned)


@pytest.mark.parametrize("build", [pradot, wt_flow, foct])
def test_a_model_that_is_compiled_in_place_is_written_to_a_file(build, tmp_path):
    model = build()
    for part in model.modules():
        part.compile(backend="eager")
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert loaded.state_dict().keys() == model.state_dict().keys()
