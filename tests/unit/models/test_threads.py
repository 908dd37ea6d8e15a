"""An inspection server scores in threads."""

from threading import Barrier, Event, Thread

import pytest
import torch

from anomalib_ot.components.extraction import full_precision
from anomalib_ot.components.whitening import _one_thread
from anomalib_ot.models.foct import FoctModel
from anomalib_ot.models.pradot import PradotModel
from anomalib_ot.models.wt_flow import WtFlowModel

SHARED = {"backbone": "resnet18", "layers": ["layer2", "layer3"], "pre_trained": False}


@pytest.fixture
def quick_products():
    """What Lightning advises on graphics cards, and processors with matrix units obey too."""
    usual = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(usual)


def pradot(pictures):
    model = PradotModel(**SHARED, prototypes_per_cell=1, whitened_channels=16)
    features = model.extract(pictures)
    model.fit_whitening([features])
    model.initialise(features)
    return model


def foct(pictures):
    model = FoctModel(**SHARED, rotations=2)
    model.fit(pictures[:2])
    return model


def wt_flow(pictures):
    model = WtFlowModel(**SHARED, width=16, whitened_channels=16)
    model.fit_normalization([model.extract(pictures)])
    return model


@pytest.mark.usefixtures("quick_products")
@pytest.mark.parametrize("make", [pradot, foct, wt_flow])
def test_two_threads_score_as_one(make):
    torch.manual_seed(0)
    pictures = torch.rand(6, 3, 64, 64)
    model = make(pictures).eval()
    shown = torch.rand(8, 1, 3, 64, 64)
    with torch.inference_mode():
        expected = [model(image).anomaly_map for image in shown]
    found = [None] * len(shown)
    together = Barrier(2)

    def score(numbers):
        together.wait()
        with torch.inference_mode():
            for number in numbers:
                found[number] = model(shown[number]).anomaly_map

    threads = [Thread(target=score, args=(range(start, len(shown), 2),)) for start in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    assert torch.get_float32_matmul_precision() == "medium"


@pytest.mark.usefixtures("quick_products")
def test_a_thread_that_leaves_first_takes_no_precision_from_the_other():
    steps = []

    def note():
        steps.append(torch.get_float32_matmul_precision())

    image = torch.zeros(1, 1)
    first, second = full_precision(image), full_precision(image)
    first.__enter__()
    second.__enter__()
    note()
    first.__exit__(None, None, None)
    note()
    second.__exit__(None, None, None)
    note()
    assert steps == ["highest", "highest", "medium"]


def test_two_trainings_leave_the_number_of_threads_as_it_was():
    def threads_of_a_new_thread():
        found = []
        asking = Thread(target=lambda: found.append(torch.get_num_threads()))
        asking.start()
        asking.join()
        return found[0]

    def train():
        with _one_thread():
            inside.set()
            leave.wait()

    usual = torch.get_num_threads()
    torch.set_num_threads(2)
    inside, leave = Event(), Event()
    try:
        first, second = Thread(target=train), Thread(target=train)
        first.start()
        inside.wait()
        second.start()
        second.join(0.2)
        leave.set()
        first.join()
        second.join()
        assert threads_of_a_new_thread() == 2
    finally:
        torch.set_num_threads(usual)
