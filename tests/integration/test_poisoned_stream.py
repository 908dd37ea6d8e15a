"""Foct online, in a stream of mostly bad parts: what it learns from them must not spoil how it detects them."""

import pytest
import torch
from torchmetrics.functional.classification import binary_auroc

from anomalib_ot import Assembly, FewShot, Foct

pytestmark = pytest.mark.slow
SIZE = (224, 224)
QUERIES = 40


@pytest.fixture(scope="module")
def setting(backbone, tmp_path_factory):
    """The online model, and features and labels of the test pictures."""
    data = Assembly(tmp_path_factory.mktemp("data"), n_train=8, n_validation=1, n_test=20)
    few = FewShot(data, 4)
    few.prepare_data()
    few.setup()
    foct = Foct(backbone, ["blocks.2", "blocks.4"], image_size=SIZE, rotations=1, online=True, query_steps=5)
    network, transform = foct.model.eval(), foct.pre_processor.transform
    network.fit(torch.stack([transform(item.image) for item in few.train_data]), foreground=foct.foreground)
    with torch.inference_mode():
        features = [network.extract(transform(item.image)[None]) for item in few.test_data]
    return foct, features, torch.tensor([int(item.gt_label) for item in few.test_data])


@torch.inference_mode()
def score(foct, features):
    """Image score of features in place of a picture."""
    foct.model.extract = lambda images: features  # noqa: ARG005
    return float(foct.model(torch.empty(1, 3, *SIZE)).pred_score)


def detection(foct, features, labels):
    """Image AUROC of the test pictures in percent, which teach nothing, and their scores."""
    with foct.frozen():
        scores = torch.tensor([score(foct, each) for each in features])
    return 100 * float(binary_auroc(scores, labels)), scores


def stream(labels, scores, share, order):
    """Numbers of the pictures of a stream with a share of anomalies."""
    generator = torch.Generator().manual_seed(0)

    def some(pictures, count):
        return pictures[torch.randint(len(pictures), (count,), generator=generator)]

    bad = some((labels == 1).nonzero()[:, 0], round(share * QUERIES))
    good = some((labels == 0).nonzero()[:, 0], QUERIES - len(bad))
    if order == "repeated":
        bad = bad[scores[bad].argmin()].expand(len(bad))
    if order == "worst first":
        # What looks most like a good part is learned before any good part.
        return torch.cat([bad[scores[bad].argsort()], good]).tolist()
    mixed = torch.cat([bad, good])
    return mixed[torch.randperm(QUERIES, generator=generator)].tolist()


@pytest.mark.parametrize("order", ["mixed", "repeated", "worst first"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_poisoned_stream_leaves_detection_within_two_points_of_the_frozen_model(setting, share, order):
    foct, features, labels = setting
    foct.model.reset()
    frozen, scores = detection(foct, features, labels)
    assert frozen > 65
    for index in stream(labels, scores, share, order):
        score(foct, features[index])
    assert len(foct.model.episodic.features)
    after, _ = detection(foct, features, labels)
    assert after > frozen - 2
