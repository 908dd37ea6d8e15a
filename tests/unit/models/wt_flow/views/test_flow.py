import pytest
import torch

from anomalib_ot.drawing.pictures import stack
from anomalib_ot.models.wt_flow.views.flow import draw_flow, ways_of


@pytest.mark.parametrize("steps", [1, 3])
def test_density_is_that_of_the_score(fitted, pictures, steps):
    model = fitted("WtFlow", euler_steps=steps).model
    (picture,) = pictures(fitted("WtFlow"))
    scores = model.scores(model.extract(picture.prepared[None]))
    for way, score in zip(ways_of(model, picture, [picture]), scores, strict=True):
        torch.testing.assert_close(way.minus_log_density, score[0, 0])


def test_ways_start_at_the_features_and_follow_the_field(fitted, pictures):
    model = fitted("WtFlow").model
    shown = pictures(fitted("WtFlow"), 2)
    embeddings = model.embed(model.extract(stack(shown)))
    for way, maps, velocity in zip(
        model.trajectories(stack(shown), 4).values(), embeddings, model.velocities(), strict=True
    ):
        assert torch.equal(way[0], maps)
        expected = way[2] + velocity(way[2], torch.tensor([0.5])) / 4
        torch.testing.assert_close(way[3], expected)
        assert not torch.equal(way[0], way[4])


def test_ways_of_normal_pictures_are_those_of_their_cells(fitted, pictures):
    model = fitted("WtFlow").model
    shown = pictures(fitted("WtFlow"), 3)
    alone = ways_of(model, shown[2], shown[:1], 2)
    for way, other in zip(ways_of(model, shown[0], shown[2:], 2), alone, strict=True):
        torch.testing.assert_close(way.normal, other.picture.flatten(2).permute(0, 2, 1), rtol=1e-4, atol=1e-4)


def test_a_flow_without_normal_pictures_is_refused(fitted, pictures):
    model = fitted("WtFlow")
    with pytest.raises(ValueError, match="normal images, but there are none"):
        ways_of(model.model, *pictures(model), [])


def test_flow_has_a_row_for_each_layer(fitted, pictures):
    model = fitted("WtFlow")
    shown = pictures(model, 3)
    figure = draw_flow(ways_of(model.model, shown[0], shown[1:]), shown[0])
    titles = [panel.get_title() for panel in figure.axes]
    assert [each for each in titles if each.startswith("layer")] == [
        "layer2: cells of the trajectories",
        "layer3: cells of the trajectories",
    ]
