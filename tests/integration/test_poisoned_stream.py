"""Foct online, in a stream of mostly bad parts: what it learns from them must not spoil how it detects them."""

from functools import cache
from types import SimpleNamespace

import pytest
import torch
from torchmetrics.functional.classification import binary_auroc

from anomalib_ot import Assembly, FewShot, Foct
from benchmarks.stream import draw

pytestmark = pytest.mark.slow
SIZE = (224, 224)
QUERIES = 40


@pytest.fixture(scope="module")
def setting(backbone, tmp_path_factory):
    """The online model; what makes features of a test picture in some light, and those of all; their labels."""
    # With fewer pictures whatever the memory learns, from good parts too, moves image AUROC by a point or two.
    data = Assembly(tmp_path_factory.mktemp("data"), n_train=8, n_validation=1, n_test=100)
    few = FewShot(data, 4)
    few.prepare_data()
    few.setup()
    foct = Foct(backbone, ["blocks.2", "blocks.4"], image_size=SIZE, rotations=1, online=True, query_steps=5)
    network, transform = foct.model.eval(), foct.pre_processor.transform
    network.fit(torch.stack([transform(item.image) for item in few.train_data]), foreground=foct.foreground)
    # Scoring puts features in the place of extraction.
    extract = network.extract_layers

    @torch.inference_mode()
    def seen(index, light=1.0):
        return extract(transform((few.test_data[index].image * light).clamp(max=1))[None])

    @cache
    def all_seen(light=1.0):
        return [seen(index, light) for index in range(len(few.test_data))]

    labels = torch.tensor([int(item.gt_label) for item in few.test_data])
    return SimpleNamespace(foct=foct, seen=seen, all_seen=all_seen, labels=labels)


@torch.inference_mode()
def score(foct, features):
    """Image score of features in place of a picture."""
    foct.model.extract_layers = lambda images: features  # noqa: ARG005
    return float(foct.model(torch.empty(1, 3, *SIZE)).pred_score)


def detection(setting, light=1.0):
    """Image AUROC of the test pictures in percent, which teach nothing, and their scores."""
    with setting.foct.frozen():
        scores = torch.tensor([score(setting.foct, each) for each in setting.all_seen(light)])
    return 100 * float(binary_auroc(scores, setting.labels)), scores


@pytest.fixture(scope="module")
def frozen(setting):
    """How the model detects in some light before any stream."""

    @cache
    def before(light=1.0):
        setting.foct.model.reset()
        return detection(setting, light)

    return before


def stream(setting, scores, share, order):
    """Numbers of the pictures of a stream with a share of anomalies."""
    return draw(setting.labels.bool(), scores, QUERIES, share, order, seed=0)


@pytest.mark.parametrize("order", ["mixed", "repeated", "worst_first"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_poisoned_stream_leaves_detection_within_two_points_of_the_frozen_model(setting, frozen, share, order):
    before, scores = frozen()
    assert before > 65
    setting.foct.model.reset()
    for index in stream(setting, scores, share, order):
        score(setting.foct, setting.all_seen()[index])
    assert len(setting.foct.model.episodic.features)
    assert detection(setting)[0] > before - 2


@pytest.mark.parametrize("last", [0.7, 1.2])
@pytest.mark.parametrize("share", [0.1, 0.9])
def test_drifting_light_leaves_detection_within_two_points_of_the_frozen_model(setting, frozen, share, last):
    (before, scores), (before_in_last, _) = frozen(), frozen(last)
    assert min(before, before_in_last) > 65
    setting.foct.model.reset()
    queries = stream(setting, scores, share, "mixed")
    for light, index in zip(torch.linspace(1, last, QUERIES), queries, strict=True):
        score(setting.foct, setting.seen(index, light))
    assert len(setting.foct.model.episodic.features)
    assert detection(setting)[0] > before - 2
    assert detection(setting, last)[0] > before_in_last - 2
