"""Duo's map is the weighted sum of the maps of its parts."""

import pytest
import torch

from anomalib_ot.models.duo import DuoModel, DuoSettings

SETTINGS = DuoSettings(
    backbone="test_resnet",
    layers=("layer2", "layer3"),
    pre_trained=False,
    image_size=(64, 64),
    pradot={"prototypes_per_cell": 1, "whitened_channels": 8},
    wt_flow={"width": 16, "whitened_channels": 8},
)
SIZE = (64, 64)


def images(count, seed):
    return torch.rand(count, 3, *SIZE, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = DuoModel(SETTINGS).eval()
    features = model.extract(images(4, 0))
    model.pradot.fit_whitening([features])
    model.pradot.initialise(features)
    model.wt_flow.fit_normalization([features])
    return model


@torch.no_grad()
def test_the_score_is_the_maximum_of_the_weighted_sum(model):
    model.weights = torch.tensor([0.3, 0.7])
    found = model(images(2, 1))
    parts = [part(images(2, 1)).anomaly_map for part in (model.pradot, model.wt_flow)]
    torch.testing.assert_close(found.anomaly_map, 0.3 * parts[0] + 0.7 * parts[1])
    assert torch.equal(found.pred_score, found.anomaly_map.amax((1, 2, 3)))


@torch.no_grad()
def test_the_scores_of_images_that_weigh_the_parts_vary_alike_in_both(model):
    batches = [model.part_scores(model.extract(images(count, count))) for count in (3, 2)]
    model.weigh(iter(batches), SIZE)
    parts = [
        torch.cat([part(images(count, count)).pred_score for count in (3, 2)]) for part in (model.pradot, model.wt_flow)
    ]
    for part, weight in zip(parts, model.weights, strict=True):
        assert float(weight * part.std()) == pytest.approx(0.5)


def test_the_scores_of_a_single_image_weigh_the_parts(model):
    model.weigh([([torch.full((1, 1, 4, 4), 2.0)], [torch.full((1, 1, 4, 4), 4.0)])], SIZE)
    assert model.weights.tolist() == pytest.approx([0.25, 0.125])


def test_equal_scores_give_no_infinite_weight(model):
    equal, others = [torch.zeros(2, 1, 4, 4)], [torch.arange(2.0).expand(4, 4, 1, 2).permute(3, 2, 0, 1)]
    for scores in ((equal, others), (equal, equal)):
        model.weigh([scores], SIZE)
        assert model.weights.isfinite().all()


def test_the_parts_share_one_backbone_and_tiles(model):
    extractor = model.feature_extractor
    assert model.pradot.feature_extractor is model.wt_flow.feature_extractor is extractor
    assert DuoModel(SETTINGS, extractor).feature_extractor is extractor
    tiles = object()
    model.tiler = tiles
    assert model.pradot.tiler is model.wt_flow.tiler is model.tiler is tiles
    model.tiler = None


def test_an_image_passes_the_backbone_once(model):
    calls = []
    handle = model.feature_extractor.register_forward_hook(lambda *_: calls.append(1))
    model(images(2, 1))
    handle.remove()
    assert len(calls) == 1


def test_the_weights_stay_in_single_precision(model):
    assert DuoModel(SETTINGS, model.feature_extractor).to(torch.bfloat16).weights.dtype == torch.float32
    model.feature_extractor.float()


def test_a_model_that_is_not_fitted_says_so():
    with pytest.raises(RuntimeError, match="Duo is not fitted yet: fit it, or load a checkpoint with ckpt_path"):
        DuoModel(SETTINGS).eval()(images(1, 0))
