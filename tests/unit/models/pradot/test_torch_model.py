import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.models.components import GaussianBlur2d

from anomalib_ot.features.anomaly_map import AnomalyMapGenerator
from anomalib_ot.models.pradot import PradotModel, PradotSettings
from anomalib_ot.models.pradot.prototypes import Prototypes
from anomalib_ot.transport import NotConvergedWarning, feature_cost, grid_coordinates, spatial_cost

ORACLE = Path(__file__).parents[5] / "shared" / "oracles" / "pradot_reference.npz"
EXACT = {"sinkhorn_tolerance": 0.0, "sinkhorn_iterations": 100}


def small(**settings):
    return PradotModel(PradotSettings(**{"backbone": "test_resnet", "pre_trained": False, **settings}))


@pytest.mark.parametrize(("side", "count"), [(7, 16 * 49), (14, 3136), (28, 3136), (32, 3 * 1024), (80, 56 * 56)])
def test_the_default_number_of_prototypes_does_not_grow_with_the_map(side, count):
    assert len(make(torch.rand(2, 4, side, side), per_cell=None).features) == count


def test_prototypes_with_free_coordinates_have_one_for_each_cell_at_least():
    assert len(make(torch.rand(2, 4, 80, 80), per_cell=None, free_coordinates=True).features) == 80 * 80


def make(features, per_cell=2, alpha=0.3, **settings):
    prototypes = Prototypes(per_cell, alpha, PradotSettings(**settings))
    prototypes.initialise(features)
    return prototypes


@pytest.fixture
def features():
    return torch.rand(6, 8, 5, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.skipif(not ORACLE.exists(), reason=f"needs the reference values in {ORACLE}")
@pytest.mark.parametrize("case", ["local", "global"])
def test_reproduces_the_authors_code(case):
    reference = {
        name.split("/")[1]: torch.from_numpy(np.asarray(value))
        for name, value in np.load(ORACLE).items()
        if name.startswith(case)
    }
    features = reference["features"]
    prototypes = Prototypes(
        int(reference["prototypes_per_cell"]),
        float(reference["alpha"]),
        PradotSettings(
            spatial="euclidean",
            ema_rate=float(reference["ema"]),
            ema_warm_up=False,
            epsilon=float(reference["epsilon"]),
            normalize_score=True,
            **EXACT,
        ),
    )
    prototypes.initialise(features)
    close = {"atol": 1e-4, "rtol": 1e-4}
    torch.testing.assert_close(prototypes.coordinates, reference["prototype_coords"], **close)
    torch.testing.assert_close(grid_coordinates(6, 6), reference["grid_coords"], **close)
    prototypes.features = reference["prototypes_before"].clone()

    plan, embeddings, _ = prototypes.transport(features)
    torch.testing.assert_close(plan.barycentres(embeddings), reference["barycentres"], **close)
    cost = prototypes.update(features).transport_cost()
    assert cost == pytest.approx(float(reference["transport_cost"]), abs=1e-4)
    torch.testing.assert_close(prototypes.features, reference["prototypes_after"], **close)

    # The authors' code multiplies its map by the number of prototypes.
    image_size = tuple(reference["image_size"].tolist())
    anomaly_map = AnomalyMapGenerator(align_corners=True)([prototypes(features[:1])], image_size)[0, 0] * 72
    torch.testing.assert_close(anomaly_map, reference["anomaly_map"], **close)
    cells = features[0].flatten(1).T
    nearest = (
        (0.7 if case == "local" else 1) * _peak_one(feature_cost(cells, reference["prototypes_after"]))
        + (0.3 if case == "local" else 0)
        * _peak_one(spatial_cost(grid_coordinates(6, 6), reference["prototype_coords"], "euclidean"))
    ).argmin(1)
    assert torch.equal(nearest, reference["assignment"])


def _peak_one(cost):
    return cost / cost.max()


@pytest.mark.parametrize("spatial", ["squared", "euclidean"])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("free", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_score_is_the_least_cost_over_the_prototypes(features, spatial, alpha, free, normalize):
    prototypes = make(
        features, 3, alpha, spatial=spatial, free_coordinates=free, normalize_score=normalize, initialisation="normal"
    )
    prototypes.update(features)
    scores = prototypes(features)
    assert scores.shape == (6, 1, 5, 4)
    coords = prototypes.coordinates
    space = (grid_coordinates(5, 4)[:, None].double() - coords.double()).norm(dim=-1).float()
    space = space if spatial == "euclidean" else space.square()
    for image, score in zip(features, scores, strict=True):
        feature = feature_cost(image.flatten(1).T, prototypes.features)
        if normalize:
            feature, scaled_space = feature / feature.max(), space / space.max()
        else:
            scaled_space = space
        expected = ((1 - alpha) * feature + alpha * scaled_space).amin(1)
        torch.testing.assert_close(score.flatten(), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("spatial", ["squared", "euclidean"])
@pytest.mark.parametrize("normalize", [False, True])
def test_assignment_tells_the_parts_of_the_score(features, spatial, normalize):
    prototypes = make(features, 3, 0.3, spatial=spatial, normalize_score=normalize, initialisation="normal")
    close = {"atol": 1e-5, "rtol": 1e-4}
    torch.testing.assert_close(prototypes.assign(features).score(0.3)[:, None], prototypes(features), **close)
    for weight in (0.0, 0.7, 1.0):
        # The same prototypes, as if they had been learned with this weight.
        other = Prototypes(3, weight, prototypes.settings)
        other.load_state_dict(prototypes.state_dict())
        assignment = prototypes.assign(features, weight)
        torch.testing.assert_close(assignment.score(weight)[:, None], other(features), **close)
        chosen = assignment.prototype[2].flatten()
        similarity = torch.cosine_similarity(features[2].flatten(1).T, prototypes.features[chosen])
        unit = feature_cost(features[2].flatten(1).T, prototypes.features).max() if normalize else 1
        torch.testing.assert_close(assignment.feature[2].flatten(), (1 - similarity) / unit, **close)


def test_a_prototype_equal_to_a_feature_scores_zero(features):
    prototypes = make(features, 6, 0.5)
    assert prototypes(features).abs().max() < 1e-6


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_a_blank_picture_of_blank_prototypes_scores_about_zero(alpha):
    blank = torch.full((2, 8, 3, 3), 0.7)
    prototypes = make(blank, alpha=alpha)
    assert prototypes(blank).amax() <= 0.2
    assert prototypes.assign(blank).score(alpha).isfinite().all()


def test_a_known_feature_in_the_wrong_place_scores_only_with_alpha(features):
    swapped = features.clone()
    swapped[:, :, 0, 0], swapped[:, :, 4, 3] = features[:, :, 4, 3], features[:, :, 0, 0]
    assert make(features, 6, 0.0)(swapped).abs().max() < 1e-6
    local = make(features, 6, 0.5)(swapped)[:, 0]
    assert local[:, 0, 0].min() > 1e-3
    assert local[:, 1:4].abs().max() < 1e-6


def test_scores_follow_prototypes_that_move(features):
    prototypes, fresh = make(features), make(features)
    prototypes(features)
    for each in (prototypes, fresh):
        each.coordinates.mul_(0.5)
    assert torch.equal(prototypes(features), fresh(features))
    for each in (prototypes, fresh):
        each.coordinates = torch.rand(40, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(prototypes(features), fresh(features))


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_penalties_are_computed_once_for_a_size_and_coordinates(features, mode, monkeypatch):
    calls, compute = [], Prototypes._space
    monkeypatch.setattr(Prototypes, "_space", lambda *given: calls.append(given) or compute(*given))
    with mode():
        prototypes = make(features)
        calls.clear()
        first = prototypes(features)
        assert len(calls) == 1
        assert torch.equal(prototypes(features), first)
        assert len(calls) == 1
        prototypes(features[..., 1:])
        prototypes.coordinates.mul_(0.5)
        prototypes(features[..., 1:])
    assert len(calls) == 3


def test_update_ignores_the_order_of_the_images(features):
    one, other = make(features, **EXACT), make(features, **EXACT)
    other.features = one.features.clone()
    one.update(features)
    other.update(features[torch.tensor([3, 1, 5, 0, 4, 2])])
    torch.testing.assert_close(one.features, other.features, atol=1e-5, rtol=1e-4)


def test_update_lowers_the_transport_cost(features):
    prototypes = make(features, initialisation="normal", ema_rate=0.8)
    costs = [prototypes.update(features).transport_cost() for _ in range(20)]
    assert costs[-1] < 0.6 * costs[0]


def test_ema_rate_one_keeps_the_prototypes_and_zero_replaces_them(features):
    kept, replaced = make(features, ema_rate=1.0, ema_warm_up=False), make(features, ema_rate=0.0, **EXACT)
    before = kept.features.clone()
    kept.update(features)
    torch.testing.assert_close(kept.features, before)
    plan, embeddings, _ = replaced.transport(features)
    expected = plan.barycentres(embeddings)
    replaced.update(features)
    torch.testing.assert_close(replaced.features, expected, atol=1e-5, rtol=1e-4)


def test_warm_up_averages_the_start_and_the_first_barycentres(features):
    prototypes = make(features, ema_rate=0.7, **EXACT)
    points = [prototypes.features.clone()]
    for step in range(5):
        plan, embeddings, _ = prototypes.transport(features + 0.1 * step)
        points.append(plan.barycentres(embeddings))
        before = prototypes.features.clone()
        prototypes.update(features + 0.1 * step)
        # 0.7 is reached between the second and the third step.
        kept = 0.7 * before + 0.3 * points[-1]
        expected = torch.stack(points).mean(0) if step < 2 else kept
        torch.testing.assert_close(prototypes.features, expected, atol=1e-5, rtol=1e-4)


def test_free_coordinates_move_to_the_barycentres_and_fixed_ones_stay(features):
    fixed, free = make(features), make(features, free_coordinates=True, **EXACT)
    grid = grid_coordinates(5, 4)
    plan, _, coordinates = free.transport(features)
    expected = plan.barycentres(coordinates)
    fixed.update(features)
    free.update(features)
    assert torch.equal(fixed.coordinates, grid.repeat(2, 1))
    torch.testing.assert_close(free.coordinates, expected, atol=1e-5, rtol=1e-4)
    assert (free.coordinates - grid.repeat(2, 1)).abs().max() > 1e-3


def test_fewer_than_one_prototype_a_cell_gives_a_coarser_grid():
    features = torch.rand(3, 4, 8, 12)
    prototypes = make(features, 0.25)
    assert prototypes.features.shape == (4 * 6, 4)
    assert prototypes.update(features).transport_cost() > 0
    assert prototypes(features).shape == (3, 1, 8, 12)


def test_more_prototypes_than_images():
    features = torch.rand(2, 4, 3, 3)
    assert make(features, 5).features.shape == (5 * 9, 4)


def test_initialisations(features):
    assert make(features, 4, initialisation="normal").features.min() < 0
    uniform = make(features, 4, initialisation="uniform").features
    assert uniform.min() >= 0
    assert uniform.max() < 1
    cells = features.flatten(2).mT
    sampled = make(features, 4, initialisation="sample").features
    assert all(any(torch.equal(group, image) for image in cells) for group in sampled.unflatten(0, (4, -1)))


@pytest.mark.parametrize("alpha", [0.0, 0.3])
@pytest.mark.parametrize("normalize", [False, True])
def test_dropping_prototypes_raises_no_score_by_more_than_the_tolerance(alpha, normalize):
    # Two kinds of cells, so that many of the prototypes say much the same.
    generator = torch.Generator().manual_seed(0)
    kinds = torch.randn(2, 8, 1, 1, generator=generator).repeat(1, 1, 3, 6)
    images = torch.cat([kinds[:1], kinds[1:]], 2) + 0.3 * torch.randn(12, 8, 6, 6, generator=generator)
    prototypes = make(images, 4, alpha, normalize_score=normalize)
    for _ in range(5):
        prototypes.update(images)
    before = prototypes(images)
    needed = torch.zeros(144, dtype=torch.bool)
    highest = torch.cat([prototypes.add_needed(needed, part, 0.5) for part in images.split(5)])
    torch.testing.assert_close(highest, before.amax((1, 2, 3)))
    prototypes.keep(needed)
    assert len(prototypes.features) == len(prototypes.coordinates) == len(prototypes.potential) == int(needed.sum())
    assert len(prototypes.features) < 144
    rise = prototypes(images) - before
    allowed = 0.5 * before.amax((1, 2, 3), keepdim=True)
    assert (rise <= allowed + 1e-5).all()
    assert (rise >= -1e-5).all()
    assert rise.max() > 1e-3
    prototypes.update(images)


def test_dropping_nothing_that_is_ever_nearest_changes_no_score(features):
    prototypes = make(features, 3, normalize_score=False)
    prototypes.update(features)
    prototypes.features[7] = prototypes.features[8]
    prototypes.coordinates[7] = prototypes.coordinates[8]
    before = prototypes(features)
    needed = torch.zeros(60, dtype=torch.bool)
    prototypes.add_needed(needed, features, 0.0)
    prototypes.keep(needed)
    assert len(prototypes.features) < 60
    torch.testing.assert_close(prototypes(features), before)


def test_compression_tells_the_highest_scores_before_it():
    model = small(layers=["layer3", "layer4"], prototypes_per_cell=3, whitened_channels=0)
    maps = [{"layer3": torch.rand(5, 3, 4, 4), "layer4": torch.rand(5, 3, 2, 2)} for _ in range(2)]
    model.initialise(maps[0])
    # Else the images that the prototypes were taken from need each of them.
    model.update(maps[1])
    before, count = model.highest_scores(maps), model.count
    assert before.shape == (2, 2, 10)
    torch.testing.assert_close(model.compress(maps, 1.0), before)
    assert model.count < count


def test_state_dict_round_trip_into_a_fresh_model(features):
    trained = make(features)
    trained.update(features)
    fresh = Prototypes(2, 0.3, PradotSettings())
    assert not fresh.is_initialised
    fresh.load_state_dict(trained.state_dict())
    torch.testing.assert_close(fresh(features), trained(features))


def test_prototypes_loaded_in_inference_mode_score(features):
    trained = make(features)
    with torch.inference_mode():
        fresh = Prototypes(2, 0.3, PradotSettings())
        fresh.load_state_dict(trained.state_dict())
        scores = fresh(features)
    torch.testing.assert_close(scores, trained(features))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alphas": [0.0, 1.5]}, r"alphas must be in \[0, 1\], not 1.5"),
        ({"alphas": [-0.1]}, r"alphas must be in \[0, 1\], not -0.1"),
        ({"alphas": []}, "alphas must be one or more"),
        ({"alphas": [0.3, 0.3]}, "alphas must be one or more different"),
        ({"prototypes_per_cell": 0}, "prototypes_per_cell must be a whole number or between 0 and 1, not 0"),
        ({"prototypes_per_cell": 2.5}, "prototypes_per_cell must be a whole number"),
        ({"prototypes_per_cell": [1, 2, 3]}, "3 values for 2 layers"),
        ({"layers": ["layer2", "layer9"]}, "layer9"),
        ({"layers": []}, "layers must be distinct and at least one"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        small(**arguments)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"spatial": "manhattan"}, "spatial must be 'squared' or 'euclidean', not 'manhattan'"),
        ({"initialisation": "zeros"}, "initialisation must be"),
        ({"ema_rate": 1.1}, "ema_rate must be"),
        ({"epsilon": 0}, "epsilon must be positive"),
        ({"sinkhorn_iterations": 0}, "sinkhorn_iterations must be"),
        ({"sinkhorn_tolerance": -1}, "sinkhorn_tolerance must be"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PradotSettings(**settings)


def test_coarser_grid_with_free_coordinates_is_refused():
    with pytest.raises(ValueError, match="free_coordinates needs prototypes_per_cell of at least 1"):
        PradotSettings(prototypes_per_cell=0.5, free_coordinates=True)


def start(model, images):
    """Fit the whitening and create the prototypes; returns the features."""
    features = model.extract(images)
    model.fit_whitening([features])
    model.initialise(features)
    return features


def score_maps(model, features):
    """The score maps of each layer: those of its prototypes, and then its deviation."""
    for layer, maps in features.items():
        white = model.whitening[layer](maps)
        yield from (each(white) for name, each in model.by_layer() if name == layer)
        yield model.deviations[layer](white)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 1.5, 4.0])
def test_map_is_the_sum_of_upsampled_and_smoothed_scores(align_corners, smoothing):
    scores = [torch.rand(3, 1, 7, 9), torch.rand(3, 1, 4, 5)]
    expected = sum(
        torch.nn.functional.interpolate(score, size=(50, 70), mode="bilinear", align_corners=align_corners)
        for score in scores
    )
    if smoothing:
        expected = GaussianBlur2d(sigma=smoothing)(expected)
    ours = AnomalyMapGenerator(smoothing, align_corners)(scores, (50, 70))
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)


class TestModel:
    @pytest.fixture(scope="class")
    def model(self):
        torch.manual_seed(0)
        return small(prototypes_per_cell=[1, 2], whitened_channels=16)

    def test_returns_features_while_training(self, model):
        features = model.train()(torch.rand(2, 3, 64, 64))
        assert {layer: maps.shape[-1] for layer, maps in features.items()} == {"layer2": 8, "layer3": 4}

    def test_scores_need_prototypes(self):
        model = small(layers=["layer3"]).eval()
        with pytest.raises(RuntimeError, match="no prototypes yet"):
            model(torch.rand(1, 3, 64, 64))

    def test_embeddings_are_the_whitened_features_that_prototypes_score(self, model):
        images = torch.rand(3, 3, 64, 64)
        features = start(model.eval(), images)
        embeddings = model.embeddings(images)
        for layer, maps in embeddings.items():
            torch.testing.assert_close(maps, model.whitening[layer](features[layer]))
        model.weights = torch.tensor([[0.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
        score = model.prototypes_of("layer3", 0.3)(embeddings["layer3"])
        torch.testing.assert_close(model(images).anomaly_map, model.anomaly_map_generator([score], (64, 64)))

    def test_an_unknown_layer_or_alpha_is_refused(self, model):
        with pytest.raises(ValueError, match="layer must be 'layer2' or 'layer3', not 'layer1'"):
            model.prototypes_of("layer1", 0.0)
        with pytest.raises(ValueError, match=r"alpha must be 0\.0 or 0\.3, not 0\.1"):
            model.prototypes_of("layer2", 0.1)

    def test_embeddings_need_prototypes(self):
        model = small(layers=["layer3"])
        with pytest.raises(RuntimeError, match="no prototypes yet: fit it"):
            model.embeddings(torch.rand(1, 3, 64, 64))

    @pytest.mark.parametrize("size", [(64, 64), (50, 93), (224, 97)])
    def test_any_size_and_aspect_ratio(self, size):
        model = small(prototypes_per_cell=1)
        images = torch.rand(3, 3, *size)
        features = start(model, images)
        assert 0 < model.update(features) < 1
        output = model.eval()(images[:1])
        assert output.anomaly_map.shape == (1, 1, *size)
        assert output.pred_score.shape == (1,)
        assert output.pred_score == output.anomaly_map.max()

    def test_scores_do_not_depend_on_the_batch(self, model):
        images = torch.rand(4, 3, 64, 64)
        start(model.eval(), images)
        together = model(images).anomaly_map
        alone = torch.cat([model(image[None]).anomaly_map for image in images])
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
        assert not model(images).anomaly_map.requires_grad

    def test_prototypes_and_maps_stay_float32_in_a_bfloat16_model(self):
        model = small(layers=["layer3"], prototypes_per_cell=1).bfloat16().eval()
        images = torch.rand(2, 3, 64, 64)
        features = start(model, images)
        assert features["layer3"].dtype == torch.bfloat16
        model.bfloat16().update(features)
        assert all(each.features.dtype == torch.float32 for _, each in model.by_layer())
        assert model(images).anomaly_map.dtype == torch.float32

    def test_weights_are_the_inverse_of_the_mean_highest_score(self, model):
        features = start(model.eval(), torch.rand(4, 3, 64, 64))
        model.update(features)
        for deviation, share in zip(model.deviations.values(), (0.25, 0.5), strict=True):
            deviation.share.fill_(share)
        parts = [{layer: maps[part] for layer, maps in features.items()} for part in (slice(3), slice(3, 4))]
        model.calibrate(model.highest_scores(parts))
        highest = torch.stack([each.amax((2, 3)).mean() for each in score_maps(model, features)]).view(2, 3)
        # The two sets of prototypes of a layer have the remainder of its deviation.
        shares = torch.tensor([[0.375, 0.375, 0.25], [0.25, 0.25, 0.5]])
        torch.testing.assert_close(model.weights * highest / (model.weights * highest).sum(), shares / 2)
        assert float(model.weights.sum()) == pytest.approx(1)

    def test_a_share_of_zero_leaves_the_prototypes_alone(self, model):
        features = start(model.eval(), torch.rand(4, 3, 64, 64))
        for deviation in model.deviations.values():
            deviation.share.zero_()
        model.calibrate(model.highest_scores([features]))
        highest = torch.stack([each.amax((2, 3)).mean() for each in score_maps(model, features)]).view(2, 3)
        inverse = 1 / highest[:, :2]
        torch.testing.assert_close(model.weights[:, :2], inverse / inverse.sum())
        assert not model.weights[:, 2].any()
        assert not any("deviation" in name for name in model.contributions(torch.rand(1, 3, 64, 64)))

    @pytest.mark.parametrize("without", [{"whitened_channels": 0}, {"deviation": False}])
    def test_the_deviation_needs_whitening(self, without):
        model = small(prototypes_per_cell=1, **without)
        assert not model.deviations
        assert torch.equal(model.weights, torch.full((2, 2), 0.25))

    def test_the_deviation_has_no_weight_without_calibration(self):
        model = small(prototypes_per_cell=1, calibrate=False)
        assert torch.equal(model.weights, torch.tensor([[0.25, 0.25, 0.0]] * 2))

    def test_map_is_the_weighted_sum_of_the_layers_and_their_maps(self, model):
        images = torch.rand(2, 3, 64, 64)
        features = start(model.eval(), images)
        model.update(features)
        model.weights = torch.tensor([[0.1, 0.2, 0.05], [0.3, 0.3, 0.05]])
        expected = sum(
            weight * torch.nn.functional.interpolate(score, size=(64, 64), mode="bilinear")
            for weight, score in zip(model.weights.flatten(), score_maps(model, features), strict=True)
        )
        expected = GaussianBlur2d(sigma=4)(expected)
        torch.testing.assert_close(model(images).anomaly_map, expected, atol=1e-5, rtol=1e-4)
        parts = model.contributions(images)
        names = ("alpha 0", "alpha 0.3", "deviation")
        assert [*parts] == [f"{layer}, {name}" for layer in ("layer2", "layer3") for name in names]
        torch.testing.assert_close(sum(parts.values()), expected, atol=1e-5, rtol=1e-4)

    def test_warns_once_where_transport_does_not_converge(self):
        model = small(sinkhorn_iterations=1, sinkhorn_tolerance=1e-6)
        features = start(model.eval(), torch.rand(4, 3, 64, 64))
        with pytest.warns(NotConvergedWarning, match="after 1 iterations with the marginals off by"):
            model.update(features)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.update(features)

    def test_backbone_is_frozen(self, model):
        assert not any(parameter.requires_grad for parameter in model.parameters())
