"""The benchmarks of Foct's queries: streams, their effect on the memory, and the paper's form of the transport."""

import math
from functools import partial

import pytest
import torch

from benchmarks import conditional, poisoned, stream
from benchmarks.few_images import Features, TestImages, draw_images, foct_plan
from benchmarks.stream import detection

SIZE = (64, 64)


@pytest.fixture
def small_plan(tmp_path):
    category = {"root": str(tmp_path), "n_train": 3, "n_validation": 1, "n_test": 1}
    return partial(foct_plan, image_size=SIZE, **category)


def test_detection_ranks_the_chosen_images_in_their_order(small_plan):
    plan = small_plan({"Foct": {}}, 1, [0])
    test = TestImages(draw_images(plan, plan.jobs()[0].key), Features(plan), every=1)
    assert test.labels.tolist().count(False) == 1
    good = test.labels.tolist().index(False)
    bad = (good + 1) % 3

    def scorer(features):
        (index,) = [index for index, each in enumerate(test.features) if each is features]
        return torch.tensor(float(index != good)), None

    auroc, scores = detection(scorer, test)
    assert auroc == 100
    assert (scores == test.labels).all()
    assert detection(scorer, test, [bad, good, bad])[1].tolist() == [1, 0, 1]
    assert math.isnan(detection(scorer, test, [bad, bad])[0])


def test_stream_teaches_the_online_model_only(small_plan, monkeypatch, capsys):
    monkeypatch.setattr(stream, "foct_plan", small_plan)
    stream.main(queries=5, shots=1, block=3, threads=torch.get_num_threads())
    first, second, last = [line for line in capsys.readouterr().out.splitlines() if "image AUROC" in line]
    assert first.startswith("queries 0 to 3")
    assert second.startswith("queries 3 to 5")
    assert " 0 episodic features" not in second
    assert last.startswith("50% anomalous, mixed")


@pytest.mark.slow
def test_poisoned_streams_are_measured_in_all_orders(capsys):
    threads = torch.get_num_threads()
    poisoned.main(queries=3, shares=(0.5,), shots=1, supports=1, images=1, image_size=SIZE, threads=threads)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| 0 | 50%")]
    assert [row.split(" | ")[2] for row in rows] == ["mixed", "repeated", "worst_first"]


@pytest.mark.slow
def test_literal_and_factored_transport_are_timed(small_plan, monkeypatch, capsys):
    monkeypatch.setattr(conditional, "foct_plan", small_plan)
    conditional.main(literal_queries=1, threads=torch.get_num_threads())
    lines = capsys.readouterr().out.splitlines()
    assert sum(" s per query" in line for line in lines) == 4
    assert "x faster: default" in lines[-1]
