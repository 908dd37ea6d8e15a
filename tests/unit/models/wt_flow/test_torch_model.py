from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from anomalib_ot.models.wt_flow import WtFlowModel, WtFlowSettings

SMALL = {"backbone": "test_resnet", "layers": ["layer2", "layer3"], "pre_trained": False, "width": 16}


@pytest.fixture
def images():
    return torch.rand(6, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model(images):
    def make(**arguments):
        torch.manual_seed(0)
        made = WtFlowModel(WtFlowSettings(**{**SMALL, **arguments})).eval()
        for parameter in made.velocities().parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
        made.fit_normalization([made.extract(images[:4]), made.extract(images[4:])])
        return made

    return make


def velocity(model, index, maps, time):
    return model.velocities()[index](maps, torch.full((len(maps),), time))


@torch.no_grad()
def test_density_is_the_papers(model, images):
    flow = model(score="density", layers=["layer3"], normalization="layer", pooling=True, top_share=0.03)
    features = flow.extract(images)["layer3"]
    pooled = F.avg_pool2d(features, 3, 2, 1)
    mean = pooled.mean((1, 2, 3), keepdim=True)
    start = (pooled - mean) / (pooled.var((1, 2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt()
    end = start + velocity(flow, 0, start, 0.0)
    density = torch.exp(-0.5 * end.square().mean(1))
    expected = torch.stack([each.max() - each for each in density])[:, None]
    expected = F.interpolate(expected, size=(64, 64), mode="bilinear", align_corners=True)
    scored = flow(images)
    torch.testing.assert_close(scored.anomaly_map, expected)
    top = torch.stack([each.flatten().sort(descending=True).values[:123].mean() for each in expected])
    torch.testing.assert_close(scored.pred_score, top)
    flow.settings = replace(flow.settings, top_share=0.0)
    torch.testing.assert_close(flow(images).pred_score, expected.amax((1, 2, 3)))


@torch.no_grad()
@pytest.mark.parametrize("steps", [1, 3])
def test_log_density_follows_the_flow_by_euler_steps(model, images, steps):
    flow = model(score="log_density", euler_steps=steps)
    features = flow.extract(images)
    for index, (maps, score) in enumerate(zip(flow.embed(features), flow.scores(features), strict=True)):
        end = maps
        for step in range(steps):
            end = end + velocity(flow, index, end, step / steps) / steps
        torch.testing.assert_close(score, (end**2).mean(1, keepdim=True) / 2)


@torch.no_grad()
def test_mismatch_is_the_mean_over_times_and_draws(model, images):
    flow = model(score="mismatch", mismatch_times=[0.2, 0.7], mismatch_draws=3)
    features = flow.extract(images)
    for index, (maps, score) in enumerate(zip(flow.embed(features), flow.scores(features), strict=True)):
        noise = flow.heads[index].noise.permute(2, 3, 0, 1)
        assert len(noise) == 6
        terms = []
        for draw in range(3):
            for which, time in enumerate((0.2, 0.7)):
                z = noise[2 * draw + which]
                between = (1 - time) * maps + time * z
                terms.append((velocity(flow, index, between, time) - (z - maps)) ** 2)
        torch.testing.assert_close(score, torch.stack(terms).mean(0).mean(1, keepdim=True))


@torch.no_grad()
@pytest.mark.parametrize("score", ["density", "log_density", "mismatch"])
def test_maps_of_layers_are_averaged_and_images_do_not_depend_on_each_other(model, images, score):
    flow = model(score=score)
    parts = [flow.anomaly_map_generator([each], (64, 64)) for each in flow.scores(flow.extract(images))]
    whole = flow(images)
    torch.testing.assert_close(whole.anomaly_map, (parts[0] + parts[1]) / 2)
    torch.testing.assert_close(flow(images[2:3]).anomaly_map, whole.anomaly_map[2:3], atol=1e-4, rtol=1e-4)
    assert whole.anomaly_map.shape == (6, 1, 64, 64)
    assert (whole.anomaly_map >= 0).all()


@torch.no_grad()
def test_normal_features_are_whitened_about_their_mean(model):
    flow, generator = model(), torch.Generator().manual_seed(1)
    channels = flow.feature_extractor.out_dims
    sizes = zip(SMALL["layers"], channels, (8, 4), strict=True)
    maps = {layer: torch.rand(400, count, side, side, generator=generator) for layer, count, side in sizes}
    flow.fit_normalization([maps])
    white = flow.embed(maps)[0]
    torch.testing.assert_close(white.mean(0), torch.zeros(channels[0], 8, 8), atol=1e-4, rtol=0)
    assert 0.8 < float(white.var(0).mean()) < 1.1


def test_same_noise_for_the_same_shape(model):
    assert torch.equal(model().heads[0].noise, model().heads[0].noise)
    assert abs(float(model(mismatch_draws=8).heads[0].noise.std()) - 1) < 0.05


@torch.no_grad()
def test_pictures_of_another_size_are_scored(model, images):
    assert model()(F.interpolate(images, size=(96, 80))).anomaly_map.shape == (6, 1, 96, 80)


def test_features_while_training(model, images):
    flow = model().train()
    fine, coarse = flow.feature_extractor.out_dims
    assert {layer: tuple(maps.shape) for layer, maps in flow(images).items()} == {
        "layer2": (6, fine, 8, 8),
        "layer3": (6, coarse, 4, 4),
    }


def test_state_dict_round_trip(model, images):
    flow = model()
    fresh = WtFlowModel(WtFlowSettings(**SMALL)).eval()
    fresh.load_state_dict(flow.state_dict())
    torch.testing.assert_close(fresh(images).anomaly_map, flow(images).anomaly_map)


def test_use_before_fitting_is_refused(images):
    with pytest.raises(RuntimeError, match="WtFlow knows no normal features yet: fit it, or load a checkpoint"):
        WtFlowModel(WtFlowSettings(**SMALL)).eval()(images)
    with pytest.raises(RuntimeError, match="no features to normalise by"):
        WtFlowModel(WtFlowSettings(**SMALL)).fit_normalization([])


def test_maps_smaller_than_the_depth_are_refused(images):
    flow = WtFlowModel(WtFlowSettings(**{**SMALL, "depth": 3}))
    with pytest.raises(ValueError, match="feature maps of 4 x 4 cells cannot be halved 3 times"):
        flow.fit_normalization([flow.extract(images)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"euler_steps": 0}, "euler_steps must be at least 1, not 0"),
        ({"score": "entropy"}, "score must be 'density' or 'log_density' or 'mismatch', not 'entropy'"),
        ({"normalization": "batch"}, "normalization must be 'whitening' or 'layer', not 'batch'"),
        ({"mismatch_times": []}, "mismatch_times must be one or more times between 0 and 1"),
        ({"mismatch_times": [0.0]}, "mismatch_times must be one or more times between 0 and 1"),
        ({"mismatch_draws": 0}, "mismatch_draws must be at least 1"),
        ({"top_share": 1.1}, r"top_share must be in \[0, 1\]"),
        ({"whitened_channels": 0}, "whitened_channels must be at least 1"),
        ({"smoothing": -1.0}, "smoothing must be from 0 to 10000 pixels"),
        ({"smoothing": 1e308}, "smoothing must be from 0 to 10000 pixels"),
        ({"layers": ["layer9"]}, "layer9"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        WtFlowModel(WtFlowSettings(**{**SMALL, **arguments}))
