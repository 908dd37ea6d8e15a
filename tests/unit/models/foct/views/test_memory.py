from contextlib import nullcontext

import pytest
import torch

from anomalib_ot.drawing.pictures import stack
from anomalib_ot.models.foct.foreground import Foreground, PrincipalComponent
from anomalib_ot.models.foct.views.memory import (
    draw_foreground,
    draw_growth,
    draw_transport,
    find_support,
    memory_growth,
)
from anomalib_ot.transport import euclidean_cost


@pytest.mark.parametrize("arguments", [{}, {"measure": "nearest"}, {"query_steps": 2}])
def test_each_cell_is_sent_whole_and_its_mean_cost_is_its_score(fitted, pictures, arguments):
    model = fitted("Foct", **arguments, smoothing=0.0, detail_weight=0.0).model
    (picture,) = pictures(fitted("Foct"))
    plan = model.plan(picture.prepared)
    torch.testing.assert_close(plan.forward.sum(-1), torch.ones(len(plan.forward)))
    query = model._embed(model.extract(picture.prepared[None]))
    memory = model.semantic.register_to(query)
    scores = (plan.forward * euclidean_cost(memory.features, query)[0]).sum(-1).unflatten(0, plan.grid)
    with torch.no_grad():
        expected = model.anomaly_map_generator([scores[None, None]], (64, 64))
        torch.testing.assert_close(model(picture.prepared[None]).anomaly_map, expected, rtol=1e-4, atol=1e-5)


def test_columns_of_the_plan_are_the_features_of_the_chosen_views(fitted, pictures):
    model = fitted("Foct").model
    (picture,) = pictures(fitted("Foct"))
    plan = model.plan(picture.prepared)
    memory = model.semantic.register_to(model._embed(model.extract(picture.prepared[None])))
    chosen = torch.cat([model.semantic.features[k, view] for k, view in enumerate(plan.views)])
    assert torch.equal(memory.features[0], chosen)
    assert plan.of_support * len(plan.views) == plan.forward.shape[1]


def test_support_set_is_found_among_the_training_pictures(fitted, pictures):
    model = fitted("Foct")
    support = pictures(model, 4, seed=0)
    others = pictures(model, 3, seed=1)
    found = find_support(model.model, [*others, *support[::-1]])
    assert [each.prepared.tolist() == own.prepared.tolist() for each, own in zip(found, support, strict=True)] == [
        True
    ] * 4
    assert find_support(model.model, [*others, support[2]])[:2] == [None, None]


@pytest.mark.parametrize("position_weight", [0.0, 4.0])
def test_features_are_located_in_the_picture_that_they_are_from(fitted, pictures, position_weight):
    model = fitted("Foct", position_weight=position_weight).model
    support = pictures(fitted("Foct"), 4, seed=0)
    for view in range(2):
        cells, distances = model.locate(support[1].prepared, view)
        embedded = model._embed(model.extract(model.views(support[1].prepared[None])[:, view]))[0]
        torch.testing.assert_close(embedded[cells[1]], model.semantic.features[1, view], rtol=1e-3, atol=1e-3)
        assert float(distances[1].mean()) < 0.01 < float(distances[0].mean())


def test_transport_is_drawn_with_and_without_the_support_pictures(fitted, pictures):
    model = fitted("Foct")
    support = pictures(model, 4, seed=0)
    (picture,) = pictures(model)
    figure = draw_transport(model.model, picture, support, (10.5, 20.5))
    shares = [panel.get_xlabel().partition(" % goes")[0].partition("%")[0] for panel in figure.axes[1:5]]
    assert sum(map(int, shares)) == pytest.approx(100, abs=3)
    assert len(draw_transport(model.model, picture, [None] * 4).axes) == 6


def test_a_pixel_outside_the_picture_is_refused(fitted, pictures):
    model = fitted("Foct")
    (picture,) = pictures(model)
    with pytest.raises(ValueError, match="pixel must be within 64 x 64"):
        draw_transport(model.model, picture, [None] * 4, (64.0, 3.0))


class UpperHalf(Foreground):
    def masks(self, images, features):
        del images
        masks = torch.zeros(features[:, 0].shape, dtype=torch.bool)
        masks[:, : masks.shape[1] // 2] = True
        return masks


def test_foreground_is_drawn(fitted, pictures):
    model = fitted("Foct", foreground_ratio=0.5, background_ratio=0.5).model
    support = pictures(fitted("Foct"), 4, seed=0)
    model.fit(stack(support), foreground=UpperHalf())
    figure = draw_foreground(model, support, UpperHalf())
    kept = model.semantic.features.shape[2]
    assert kept > 1
    assert {each.get_xlabel() for each in figure.axes} == {
        f"{kept // 2} of the product (orange),\n{kept // 2} of the background (blue)"
    }
    assert "the product is outlined" in figure.get_suptitle()


def test_neither_product_nor_background_is_named_without_a_foreground(fitted, pictures):
    model = fitted("Foct")
    support = pictures(model, 4, seed=0)
    figure = draw_foreground(model.model, support, model.foreground)
    assert not any(panel.get_xlabel() for panel in figure.axes)
    (picture,) = pictures(model)
    titles = figure.get_suptitle(), draw_transport(model.model, picture, support).get_suptitle()
    assert not any("product" in title or "background" in title for title in titles)


def test_the_title_of_a_narrow_figure_is_within_it(fitted, pictures):
    model = fitted("Foct")
    figure = draw_foreground(model.model, pictures(model, 1, seed=0), PrincipalComponent())
    figure.canvas.draw()
    title = figure.get_suptitle()
    (text,) = (each for each in figure.texts if each.get_text() == title)
    extent = text.get_window_extent()
    assert extent.x0 >= 0
    assert extent.x1 <= figure.bbox.x1


def test_growth_is_that_of_the_stream_and_is_forgotten(fitted, pictures):
    model = fitted("Foct", online=True, capacity=20, top_foreground=8, top_background=0)
    # What is normal enters: the support pictures themselves.
    stream = pictures(model, 4, seed=0) * 2
    growth = memory_growth(model.model, stream)
    assert model.model.episodic.features.numel() == 0
    sizes = []
    for picture in stream:
        with torch.no_grad():
            model.model(picture.prepared[None])
        sizes.append(len(model.model.episodic.features))
    assert growth.sizes == tuple(sizes)
    assert max(growth.sizes) > 0
    assert sum(growth.remaining) == growth.sizes[-1]
    assert all(left <= added for left, added in zip(growth.remaining, growth.added, strict=True))
    draw_growth(growth)


def _taught(model):
    return [
        *model.episodic.state_dict().values(),
        *model.navigator.state_dict().values(),
        *(part for taught in model.earlier for part in (*taught.memory, *taught.navigator.values())),
    ]


@pytest.mark.parametrize("is_broken_off", [False, True], ids=["to the end", "broken off"])
def test_growth_leaves_what_a_stream_had_taught_and_what_can_be_taken_back(fitted, pictures, is_broken_off):
    model = fitted("Foct", online=True, query_steps=1).model
    with torch.no_grad():
        model(torch.stack([picture.prepared for picture in pictures(fitted("Foct"), 3, seed=0)]))
    before = [part.clone() for part in _taught(model)]
    assert len(model.earlier) == 3

    def stream():
        yield from pictures(fitted("Foct"), 2)
        if is_broken_off:
            raise InterruptedError

    with pytest.raises(InterruptedError) if is_broken_off else nullcontext():
        memory_growth(model, stream())
    assert all(torch.equal(*pair) for pair in zip(_taught(model), before, strict=True))


def test_growth_of_a_model_that_is_not_online_is_refused(fitted, pictures):
    model = fitted("Foct")
    with pytest.raises(ValueError, match=r"train one with --model\.online true"):
        memory_growth(model.model, pictures(model))
