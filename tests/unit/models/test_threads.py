"""An inspection server scores in several threads of one process, with one model."""

import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.overrides import TorchFunctionMode

from anomalib_ot import Duo, FewShot, Foct, Pradot, WtFlow
from anomalib_ot.features.backbones import create_extractor
from anomalib_ot.models.foct import FoctModel, FoctSettings

SMALL = {
    "backbone": "test_resnet",
    "layers": ["layer3"],
    "pre_trained": False,
    "image_size": (64, 64),
    "visualizer": False,
}
MODELS = {
    "Pradot": lambda: Pradot(**SMALL, prototypes_per_cell=1, epochs=1),
    "Foct": lambda: Foct(**SMALL, rotations=1, support_steps=1, query_steps=2),
    "WtFlow": lambda: WtFlow(**SMALL, training_steps=1, width=16),
    "Duo": lambda: Duo(
        **SMALL, pradot={"prototypes_per_cell": 1, "epochs": 1}, wt_flow={"training_steps": 1, "width": 16}
    ),
}
THREADS, ROUNDS = 2, 8


class Watched(TorchFunctionMode):
    """Notes how products may be formed whenever a thread forms one, and gives way to the other threads."""

    def __init__(self):
        super().__init__()
        self.allowed = set()

    def __torch_function__(self, function, types, arguments=(), options=None):
        if function.__name__ in {"__matmul__", "matmul", "linear"}:
            self.allowed.add(torch.backends.mkldnn.matmul.fp32_precision)
            time.sleep(1e-3)
        return function(*arguments, **(options or {}))


def watched_scores(model, images):
    with torch.inference_mode(), Watched() as watched:
        result = model(images)
    return result.anomaly_map, result.pred_score, watched.allowed


@pytest.fixture
def threads():
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    with ThreadPoolExecutor(THREADS) as pool:
        yield pool
    sys.setswitchinterval(interval)


@pytest.fixture
def medium():
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.usefixtures("medium")
def test_threads_score_as_one_alone_and_leave_the_process_as_it_was(name, data, engine, threads):
    model = MODELS[name]()
    engine().fit(model, datamodule=FewShot(data(), 2) if name == "Foct" else data())
    batches = torch.rand(THREADS, 2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    scores, state = model.model.eval(), torch.get_rng_state()
    alone = [watched_scores(scores, batch) for batch in batches]
    together = list(threads.map(lambda batch: watched_scores(scores, batch), batches.repeat(ROUNDS, 1, 1, 1, 1)))
    for found, expected in zip(together, alone * ROUNDS, strict=True):
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])
        assert not {"bf16", "tf32"} & found[2]
    assert torch.get_float32_matmul_precision() == "medium"
    assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    assert torch.equal(torch.get_rng_state(), state)


@pytest.fixture
def online():
    torch.manual_seed(0)
    settings = FoctSettings(backbone="test_resnet", layers=["layer3"], pre_trained=False, online=True, rotations=1)
    model = FoctModel(settings).eval()
    model.fit(torch.rand(2, 3, 64, 64))
    return model


def test_what_one_thread_teaches_online_no_other_loses(online, threads):
    batches = torch.rand(THREADS, 2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    # So that each query is normal.
    online.semantic.threshold.fill_(torch.inf)
    for batch in batches:
        watched_scores(online, batch)
    expected = remembered(online)
    online.reset()
    list(threads.map(lambda batch: watched_scores(online, batch), batches))
    assert remembered(online) == expected


def remembered(model):
    """Number of features before each query, and now."""
    return [len(taught.memory.features[0]) for taught in (*model.earlier, model.taught())]


def test_hooks_of_a_network_give_each_thread_its_own_maps(threads):
    # timm takes its maps by hooks, which leave them with the network.
    extractor = create_extractor("legacy_xception", ["act2"], pre_trained=False)
    batches = torch.rand(8, 1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        alone = [extractor(batch)["act2"] for batch in batches]
    together = list(threads.map(torch.inference_mode()(lambda batch: extractor(batch)["act2"]), batches))
    assert all(torch.equal(found, expected) for found, expected in zip(together, alone, strict=True))
