"""The torch model of FOCT, with a small random backbone."""

import weakref
from copy import deepcopy

import pytest
import torch
from anomalib.models.image.patchcore.torch_model import PatchcoreModel
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from anomalib_ot.models.foct import FoctModel, FoctSettings, torch_model
from anomalib_ot.models.foct.foreground import PrincipalComponent
from anomalib_ot.models.foct.memory import EpisodicMemory, SemanticMemory, fit_memories
from anomalib_ot.transport import conditional_plan


def images(count, seed=0):
    return torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def model():
    def make(shots=2, **arguments):
        torch.manual_seed(0)
        steps = {"support_steps": 3, "query_steps": 2, "tolerance": 0}
        small = {"rotations": 2, "foreground_ratio": 0.5, "background_ratio": 0.5, **steps, **arguments}
        made = FoctModel(FoctSettings(backbone="test_resnet", pre_trained=False, **small)).eval()
        if shots:
            made.fit(images(shots))
        return made

    return make


def score(model, batch):
    with torch.inference_mode():
        return model(batch)


class HeldMemory(TorchDispatchMode):
    """Counts the bytes of tensors that are made and held, and the most of them at any time."""

    def __init__(self):
        super().__init__()
        self.most = self.now = 0
        self.held = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            if isinstance(each, torch.Tensor) and each.untyped_storage()._cdata not in self.held:
                self.hold(each.untyped_storage())
        return result

    def hold(self, storage):
        key, size = storage._cdata, storage.nbytes()
        self.held.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self.release, key, size)

    def release(self, key, size):
        self.held.discard(key)
        self.now -= size


def test_more_support_pictures_need_less_memory_than_their_views(model):
    most = []
    for shots in (4, 12):
        ours = model(shots=0, measure="nearest", rotations=12, foreground_ratio=0.05)
        with HeldMemory() as memory:
            ours.fit(images(shots))
        most.append(memory.most)
    assert most[1] - most[0] < 8 * ours.views(images(1)).nbytes / 2


@pytest.mark.parametrize("start", ["metric", "random"])
def test_a_support_set_replaces_an_earlier_one_without_a_trace(model, start):
    again, once = (model(navigator_start=start, shots=shots) for shots in (3, 0))
    for each in (again, once):
        each.fit(images(2, 1))
    assert_equal_states(again.state_dict(), once.state_dict())


def test_a_fit_that_is_broken_off_leaves_the_model_as_it_was(model, monkeypatch):
    ours = model(online=True)
    score(ours, images(2, 1))
    before = deepcopy(ours.state_dict())
    fit, calls = torch_model.fit_to, []

    def break_off(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        fit(*arguments)

    monkeypatch.setattr(torch_model, "fit_to", break_off)
    with pytest.raises(KeyboardInterrupt):
        ours.fit(images(3, 4))
    assert_equal_states(ours.state_dict(), before)
    assert len(ours.earlier) == 2


def assert_equal_states(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_a_model_that_was_fitted_in_inference_mode_can_be_loaded_into(model):
    other, ours = model(), model(shots=0)
    with torch.inference_mode():
        ours.fit(images(2, 1))
    ours.load_state_dict(other.state_dict())
    assert_equal_states(ours.state_dict(), other.state_dict())


def test_shapes_and_image_score(model):
    result = score(model(), images(3, 1))
    assert result.anomaly_map.shape == (3, 1, 64, 64)
    torch.testing.assert_close(result.pred_score, result.anomaly_map.amax((1, 2, 3)))


def test_features_are_those_of_patchcore(model):
    ours = model(shots=0)
    theirs = PatchcoreModel(["layer2", "layer3"], "test_resnet", pre_trained=False).train()
    theirs.feature_extractor.load_state_dict(ours.feature_extractor.state_dict())
    theirs.feature_extractor.eval()
    expected = theirs(images(2))
    torch.testing.assert_close(
        ours.extract(images(2)).permute(0, 2, 3, 1).flatten(0, 2), expected, atol=1e-4, rtol=1e-3
    )


def test_nearest_is_the_distance_to_the_support_set(model):
    ours = model(
        measure="nearest", rotations=1, position_weight=0.0, detail_weight=0.0, foreground_ratio=1.0, smoothing=0
    )
    features, support = (ours.extract(each).permute(0, 2, 3, 1) for each in (images(1, 1), images(2)))
    expected = torch.cdist(features.flatten(0, 2), support.flatten(0, 2)).amin(1) / ours.scale
    score_map = ours._score_and_learn(ours._embed(ours.extract(images(1, 1))))
    torch.testing.assert_close(score_map[0], expected, atol=1e-3, rtol=1e-3)


def test_score_is_the_expected_cost_under_the_forward_navigator(model):
    ours = model(rotations=1, query_steps=0)
    query = ours._embed(ours.extract(images(1, 1)))
    memory = ours.semantic.features.flatten(0, 2)
    navigators = conditional_plan(ours.support_navigator(memory, query[0])).forward
    expected = (navigators * torch.cdist(query[0], memory)).sum(1)
    torch.testing.assert_close(ours._score_and_learn(query)[0], expected, atol=1e-4, rtol=1e-3)


def test_support_image_scores_nothing(model):
    ours = model(measure="nearest", foreground_ratio=1.0)
    seen, new = score(ours, images(2)), score(ours, images(2, 1))
    assert float(seen.pred_score.max()) < 0.1 * float(new.pred_score.min())


def test_view_nearest_to_the_query_counts(model):
    ours = model(measure="nearest", rotations=4, foreground_ratio=1.0)
    for turn in range(4):
        query = ours._embed(ours.extract(ours.views(images(1))[0, turn : turn + 1]))
        registered = ours.semantic.register_to(query).features[0, : ours.semantic.features.shape[2]]
        assert torch.equal(registered, ours.semantic.features[0, turn])


def test_views_are_turned_by_equal_angles(model):
    ours = model(rotations=4, shots=0)
    views = ours.views(images(2))
    assert views.shape == (2, 4, 3, 64, 64)
    torch.testing.assert_close(views[:, 0], images(2))
    torch.testing.assert_close(views[:, 1], images(2).rot90(1, (-2, -1)), atol=1e-3, rtol=1e-3)


def test_the_detail_of_a_cell_is_its_cosine_distance_from_the_nearest_of_all_views(model):
    both, plain = (model(detail_weight=weight, foreground_ratio=1.0, smoothing=0) for weight in (2.0, 0.0))

    @torch.inference_mode()
    def cells(batch):
        """Features without averaging, in the manner of a reader: one cell after another."""
        layers = [*both.feature_extractor(batch).values()]
        size = layers[0].shape[-2:]
        joined = torch.cat([functional.interpolate(each, size, mode="bilinear") for each in layers], 1)
        return joined.permute(0, 2, 3, 1).flatten(0, 2).double()

    known = torch.cat([cells(view[None]) for view in both.views(images(2)).flatten(0, 1)])
    query = images(1, 1)
    similarities = functional.cosine_similarity(cells(query)[:, None], known[None], dim=-1)
    expected = (1 - similarities.amax(1)).view(1, 1, 8, 8).float()
    added = score(both, query).anomaly_map - score(plain, query).anomaly_map
    enlarged = both.anomaly_map_generator([2.0 * expected], query.shape[-2:])
    torch.testing.assert_close(added, enlarged, atol=1e-4, rtol=1e-3)


def test_position_weight_tells_places_apart(model):
    weighted, plain = model(), model(position_weight=0.0)
    maps = torch.zeros(1, sum(plain.feature_extractor.out_dims), 8, 8)
    assert weighted._embed(maps).shape[-1] == plain._embed(maps).shape[-1] + 2
    points = weighted._embed(maps)[0]
    assert float((points[0] - points[-1]).norm()) == pytest.approx(4 * 2**0.5, rel=1e-4)
    assert float((plain._embed(maps)[0][0] - plain._embed(maps)[0][-1]).norm()) == 0


@pytest.mark.parametrize("arguments", [{}, {"online": True}, {"online": True, "measure": "nearest"}])
def test_batches_give_what_single_queries_give(model, arguments):
    together, single = model(**arguments), model(**arguments)
    batch = images(4, 1)
    one_by_one = torch.cat([score(single, image[None]).anomaly_map for image in batch])
    torch.testing.assert_close(score(together, batch).anomaly_map, one_by_one, atol=1e-4, rtol=1e-4)
    assert torch.equal(together.episodic.features, single.episodic.features)


def test_scores_are_independent_unless_online(model):
    offline = model()
    first = score(offline, images(1, 5)).anomaly_map
    score(offline, images(4, 1))
    assert torch.equal(score(offline, images(1, 5)).anomaly_map, first)
    assert not offline.episodic.features.numel()


def test_online_depends_on_what_came_before_until_reset(model):
    online = model(online=True)
    first = score(online, images(1, 5)).anomaly_map
    assert online.episodic.features.numel()
    assert not torch.equal(score(online, images(1, 5)).anomaly_map, first)
    online.reset()
    assert torch.equal(score(online, images(1, 5)).anomaly_map, first)


def test_stream_of_defects_does_not_teach_the_memory_defects(model):
    """The same defect in every query: nothing of it is ever remembered, and its score stays."""
    normal = torch.rand(1, 3, 192, 192, generator=torch.Generator().manual_seed(0))
    defect = normal.clone()
    defect[..., :24, :24] = 8.0
    online, offline = (
        model(measure="nearest", rotations=1, foreground_ratio=0.2, online=online, shots=0) for online in (True, False)
    )
    for each in (online, offline):
        each.fit(normal)
    scores = torch.stack([score(online, defect).pred_score[0] for _ in range(20)])
    query = offline._embed(offline.extract(defect))
    anomalous = query[0][offline._score_and_learn(query)[0] > offline.semantic.threshold]
    assert len(anomalous) > 5
    assert len(online.episodic.features) > 5
    assert float(torch.cdist(anomalous, online.episodic.features).min()) > 0
    assert float(scores[-1]) > 0.9 * float(scores[0]) > 2 * float(offline.semantic.threshold)


@pytest.mark.parametrize(("rate", "teaches"), [(0.1, False), (0.0, True)])
def test_an_unusual_image_teaches_only_if_all_may(rate, teaches, model):
    ours = model(online=True, online_rate=rate, rotations=6)
    unusual = images(1, 1)
    unusual[..., 40:, 40:] = 8.0
    before = deepcopy(ours.navigator.state_dict())
    score(ours, unusual)
    assert bool(len(ours.episodic.features)) == teaches
    assert all(torch.equal(value, before[name]) for name, value in ours.navigator.state_dict().items()) != teaches
    score(ours, images(1))
    assert len(ours.episodic.features)


@pytest.mark.parametrize(("largest", "teaches"), [(18.5, False), (18.0, True), (17.5, True), (99.0, False)])
def test_the_p_value_of_an_image_that_teaches_is_above_the_rate(largest, teaches, model):
    ours = model(online=True, online_rate=0.1, shots=0)
    ours.view_distances = torch.arange(1.0, 20.0)
    assert ours._may_teach(torch.tensor([0.5, largest])) == teaches


@pytest.mark.parametrize("shots", [1, 3])
def test_views_are_compared_with_other_images_or_else_with_other_views(shots, model):
    ours = model(online=True, online_rate=0.5, shots=shots, rotations=3)
    expected = []
    for index, image in enumerate(images(shots)):
        for number, view in enumerate(ours.views(image[None])[0]):
            query = ours._embed(ours.extract(view[None]))[0]
            if shots == 1:
                groups = [[each for other, each in enumerate(ours.semantic.features[0]) if other != number]]
            else:
                groups = [[*views] for other, views in enumerate(ours.semantic.features) if other != index]
            # Of each group, the view that is nearest on average.
            nearest = [min(group, key=lambda each: float(torch.cdist(query, each).amin(1).mean())) for group in groups]
            expected.append(float(torch.cdist(query, torch.cat(nearest)).amin(1).amax()))
    torch.testing.assert_close(ours.view_distances, torch.tensor(expected).sort().values, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(("shots", "rotations", "views"), [(1, 1, 0), (2, 3, 6)])
def test_too_few_views_to_refuse_an_image_are_warned_of(shots, rotations, views, model, caplog):
    ours = model(online=True, online_rate=0.1, shots=shots, rotations=rotations)
    assert f"online_rate=0.1 takes 9 left-out views to refuse one, and the support images have {views}" in caplog.text
    assert ours._may_teach(torch.tensor([1e9]))
    caplog.clear()
    model(online=True, online_rate=0.5, shots=1, rotations=2)
    model(online=True, online_rate=0.0, shots=1, rotations=1)
    assert not caplog.text


def test_what_may_teach_is_exact_under_autocast_and_is_stored(model):
    ours, fast, stored = (model(online=True, online_rate=0.2, rotations=4, shots=0) for _ in range(3))
    ours.fit(images(2))
    with torch.autocast("cpu", torch.bfloat16):
        # The features are the same, so that only the distances could differ.
        fast.extract_layers = ours.extract_layers
        fast.fit(images(2))
    stored.load_state_dict(ours.state_dict())
    assert fast.view_distances.dtype == torch.float32
    assert torch.equal(stored.view_distances, ours.view_distances)
    assert not stored._may_teach(2 * ours.view_distances[-1:])


def test_memory_does_not_walk_away_from_the_support_set(model):
    """What is near to something remembered, but not to the support set, is not remembered."""
    ours = model(measure="nearest", online=True, rotations=1)
    start = ours.semantic.features[0, 0, 0]
    ours.semantic.features = start.view(1, 1, 1, -1).clone()
    ours.semantic.is_foreground = torch.ones(1, 1, 1, dtype=torch.bool)
    ours.semantic.threshold = torch.ones(())
    step = torch.zeros_like(start)
    step[0] = 0.9
    ours._score_and_learn((start + step)[None, None])
    scores = ours._score_and_learn((start + 2 * step)[None, None])
    assert float(scores) == pytest.approx(0.9, abs=1e-3)
    assert len(ours.episodic.features) == 1


def fill(memory, features, is_foreground):
    fit_memories([memory], [[views] for views in features], is_foreground)


def test_threshold_is_the_mean_distance_within_the_support_set():
    memory = SemanticMemory(0.5, 0.5)
    features = torch.rand(2, 3, 20, 4, generator=torch.Generator().manual_seed(0))
    fill(memory, features, torch.ones(2, 3, 20, dtype=torch.bool))
    reach = torch.cdist(features, memory.features).amin(-1).mean()
    torch.testing.assert_close(memory.threshold, reach, atol=1e-4, rtol=1e-4)


def test_memory_keeps_shares_of_foreground_and_background():
    memory = SemanticMemory(0.5, 0.25)
    mask = torch.zeros(1, 2, 40, dtype=torch.bool)
    mask[..., :8] = True
    fill(memory, torch.rand(1, 2, 40, 3), mask)
    assert memory.features.shape == (1, 2, 4 + 8, 3)
    assert memory.is_foreground.sum(-1).tolist() == [[4, 4]]


def test_view_without_foreground_is_filled_from_its_background():
    memory = SemanticMemory(0.5, 0.25)
    mask = torch.zeros(1, 2, 40, dtype=torch.bool)
    mask[:, 0, :16] = True
    fill(memory, torch.rand(1, 2, 40, 3), mask)
    assert memory.is_foreground.sum(-1).tolist() == [[4, 0]]


def test_masks_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="do not fit"):
        fill(SemanticMemory(0.1, 0.1), torch.rand(1, 2, 40, 3), torch.ones(1, 2, 39, dtype=torch.bool))


def test_episodic_memory_stays_within_its_capacity():
    memory = EpisodicMemory(20, 0.25)
    sizes = []
    for step in range(30):
        memory.add(torch.rand(6, 3), torch.arange(6) < step % 6)
        sizes.append(len(memory.features))
        assert len(memory.is_foreground) == sizes[-1]
    assert sizes[:4] == [6, 12, 18, 5]
    assert max(sizes) < 20


def test_foreground_splits_what_is_remembered(model):
    ours = model(rotations=1, shots=0, top_foreground=3, top_background=5, capacity=100, measure="nearest", online=True)
    picture = 0.05 * images(1)
    picture[..., 16:48, 16:48] += 2
    ours.fit(picture, foreground=PrincipalComponent())
    assert ours.semantic.is_foreground.any()
    assert not ours.semantic.is_foreground.all()
    score(ours, picture)
    assert int(ours.episodic.is_foreground.sum()) == 3
    assert len(ours.episodic.features) == 8


@pytest.mark.parametrize("size", [(64, 96), (70, 50)])
def test_any_size(model, size):
    ours = model(shots=0)
    ours.fit(torch.rand(1, 3, *size))
    assert score(ours, torch.rand(2, 3, *size)).anomaly_map.shape == (2, 1, *size)


def test_bfloat16_backbone(model):
    ours = model().to(torch.bfloat16)
    assert ours.semantic.features.dtype == torch.float32
    assert score(ours, images(1, 1).bfloat16()).anomaly_map.isfinite().all()


def test_state_dict_restores_memory_and_navigator(model):
    ours = model(online=True)
    score(ours, images(3, 1))
    other = model(shots=0, online=True)
    other.load_state_dict(ours.state_dict())
    torch.testing.assert_close(score(other, images(1, 2)).anomaly_map, score(ours, images(1, 2)).anomaly_map)


def test_unfitted_model_says_what_to_do(model):
    with pytest.raises(RuntimeError, match="no support set yet: fit it, or load"):
        score(model(shots=0), images(1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"measure": "cosine"}, "measure must be"),
        ({"rotations": 0}, "rotations must be at least 1"),
        ({"position_weight": -1.0}, "position_weight must be at least 0"),
        ({"foreground_ratio": 0.0}, r"foreground_ratio must be in \(0, 1\]"),
        ({"background_ratio": 1.5}, r"background_ratio must be in \(0, 1\]"),
        ({"capacity": 49}, r"capacity must be at least top_foreground \+ top_background, 50, not 49"),
        ({"compression": 1.0}, r"compression must be in \(0, 1\)"),
        ({"top_foreground": -1}, "top_foreground must be at least 0"),
    ],
)
def test_bad_settings(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model(shots=0, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rho": -0.1}, r"rho must be in \[0, 1\]"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"query_steps": -1}, "query_steps must be at least 0"),
        ({"support_steps": -1}, "support_steps must be at least 0"),
        ({"navigator_hidden": 0}, "navigator_hidden must be from 1 to 16384, not 0"),
        ({"navigator_start": "zero"}, "navigator_start must be"),
        ({"fit_features": -1}, "fit_features must be at least 0"),
        ({"tolerance": -1.0}, "tolerance must be at least 0"),
    ],
)
def test_bad_settings_of_the_navigator(arguments, message):
    with pytest.raises(ValueError, match=message):
        FoctSettings(**arguments)


def state(model):
    return model.episodic.features.clone(), [value.clone() for value in model.navigator.state_dict().values()]


def same(ours, theirs):
    return torch.equal(ours[0], theirs[0]) and all(map(torch.equal, ours[1], theirs[1]))


@pytest.mark.parametrize("queries", [1, 3, 5])
def test_rollback_takes_back_what_the_last_queries_taught(model, queries):
    ours = model(online=True, capacity=60)
    states = []
    for query in images(5, 1):
        states.append(state(ours))
        score(ours, query[None])
    assert not any(same(state(ours), earlier) for earlier in states)
    ours.rollback(queries)
    assert same(state(ours), states[-queries])
    # What comes next is learned and scored as if what was taken back had never been.
    other = model(online=True, capacity=60)
    if queries < 5:
        score(other, images(5, 1)[: 5 - queries])
    torch.testing.assert_close(score(ours, images(2, 3)).anomaly_map, score(other, images(2, 3)).anomaly_map)
    ours.rollback(5 - queries + 2)
    assert same(state(ours), states[0])


def test_rollback_counts_the_images_of_a_batch(model):
    ours = model(online=True)
    score(ours, images(2, 1))
    expected = state(ours)
    score(ours, images(3, 2))
    ours.rollback(3)
    assert same(state(ours), expected)


def test_rollback_goes_as_far_back_as_is_kept(model, monkeypatch):
    monkeypatch.setattr("anomalib_ot.models.foct.state._HISTORY", 3)
    ours = model(online=True)
    score(ours, images(5, 1))
    with pytest.raises(ValueError, match=r"queries must be from 1 to 3, the queries that can be undone .*, not 4"):
        ours.rollback(4)
    ours.rollback(3)
    for queries in (0, 1):
        with pytest.raises(ValueError, match="queries must be from 1 to 0"):
            ours.rollback(queries)


@pytest.mark.parametrize("forget", ["reset", "not online"])
def test_there_is_nothing_to_roll_back_where_nothing_was_taught(model, forget):
    ours = model(online=forget == "reset")
    score(ours, images(2, 1))
    ours.reset()
    with pytest.raises(ValueError, match="reset discards all"):
        ours.rollback(1)


def test_copies_do_not_carry_what_could_be_taken_back(model):
    ours = model(online=True)
    score(ours, images(2, 1))
    copy = deepcopy(ours)
    assert len(ours.earlier) == 2
    assert not copy.earlier
    assert same(state(copy), state(ours))


@pytest.mark.parametrize("measure", ["transport", "nearest"])
def test_a_support_image_that_is_left_out_is_scored_by_the_memory_of_the_others(model, measure):
    foct = model(3, measure=measure, query_steps=0)
    found = foct.score_left_out(images(3))
    for index in range(3):
        others = deepcopy(foct)
        kept = [each for each in range(3) if each != index]
        others.semantic.features = foct.semantic.features[kept]
        others.detail.features = foct.detail.features[kept]
        others.semantic.is_foreground = foct.semantic.is_foreground[kept]
        expected = score(others, images(3)[index : index + 1])
        torch.testing.assert_close(found.anomaly_map[index], expected.anomaly_map[0])
        torch.testing.assert_close(found.pred_score[index], expected.pred_score[0])
    assert (found.pred_score > score(foct, images(3)).pred_score).all()
