import numpy as np
import pytest
import torch

from anomalib_ot.models.pradot import PradotModel, PradotSettings
from anomalib_ot.models.pradot.views.assignments import draw_all_assignments, draw_assignments


def drawn(panel):
    """Values of the map in a panel."""
    return torch.from_numpy(np.asarray(panel.images[0].get_array()))


@pytest.mark.parametrize("whitened", [0, 16])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_the_costs_are_the_models_scores_and_the_sum_of_their_parts(fitted, pictures, whitened, normalize, alpha):
    model = fitted(
        "Pradot", backbone="resnet18", alphas=(alpha,), whitened_channels=whitened, normalize_score=normalize
    )
    [picture] = pictures(model)
    _, _, cost, feature, space = draw_assignments(model.model, picture, "layer2", alpha).axes[:5]
    expected = model.model.prototypes_of("layer2", alpha)(model.model.embeddings(picture.prepared[None])["layer2"])
    torch.testing.assert_close(drawn(cost), expected[0, 0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(drawn(feature) + drawn(space), drawn(cost))
    assert drawn(feature).max() > 0 or alpha == 1
    assert drawn(space).max() > 0 or alpha in {0, 1}


@pytest.mark.parametrize("per_cell", [0.25, 2])
def test_arrows_end_where_the_prototype_of_least_cost_is(fitted, pictures, per_cell):
    model = fitted("Pradot", prototypes_per_cell=per_cell, normalize_score=False, whitened_channels=0)
    [picture] = pictures(model)
    prototypes = model.model.prototypes_of("layer2", 0.3)
    prototypes.keep(torch.arange(len(prototypes.features)) % 3 > 0)
    arrows = draw_assignments(model.model, picture, "layer2", 0.3).axes[1].collections[1]
    features = model.model.extract(picture.prepared[None])["layer2"][0].flatten(1).T
    found = {}
    for index, feature in enumerate(features):
        place = torch.tensor(divmod(index, 8)) / 7
        similarity = torch.cosine_similarity(feature[None], prototypes.features)
        cost = 0.7 * (1 - similarity) + 0.3 * (prototypes.coordinates - place).norm(dim=1)
        # Cells are eight pixels wide, and the first pixel's centre is at 0.
        found[tuple((place * 56 + 3.5).tolist())] = prototypes.coordinates[cost.argmin()] * 56 + 3.5
    assert len(found) == len(arrows.U) == 64
    for column, row, right, down in zip(*arrows.XY.T, arrows.U, arrows.V, strict=True):
        [end] = [end for start, end in found.items() if np.allclose(start, (row, column), atol=1e-3)]
        assert end.tolist() == pytest.approx([row + down, column + right], abs=1e-3)


def test_arrows_and_maps_share_one_scale_of_colours(fitted, pictures):
    model = fitted("Pradot")
    [picture] = pictures(model)
    for highest in (None, 0.9):
        panels = draw_assignments(model.model, picture, "layer3", 0.3, highest).axes[:5]
        top = highest or pytest.approx(float(drawn(panels[2]).max()))
        shown = [*panels[1].collections, *(panel.images[0] for panel in panels[2:])]
        assert len(shown) == 5
        assert all(each.get_clim() == (0, top) for each in shown)


def test_all_layers_and_alphas_have_a_row(fitted, pictures):
    model = fitted("Pradot", alphas=(0.0, 0.2, 0.5))
    [picture] = pictures(model)
    figure = draw_all_assignments(model.model, picture)
    titles = [panel.get_title() for panel in figure.axes if "layer" in panel.get_title()]
    assert titles == [
        rf"{picture.name}: {layer}, $\alpha$ = {alpha}"
        for layer in ("layer2", "layer3")
        for alpha in ("0", "0.2", "0.5")
    ]


@pytest.mark.parametrize(
    ("layer", "alpha", "message"),
    [
        ("layer4", 0.3, "layer must be 'layer2' or 'layer3', not 'layer4'"),
        ("layer2", 0.5, "alpha must be 0.0 or 0.3, not 0.5"),
    ],
)
def test_an_unknown_layer_or_alpha_is_refused_by_naming_those_there_are(fitted, pictures, layer, alpha, message):
    model = fitted("Pradot")
    with pytest.raises(ValueError, match=message):
        draw_assignments(model.model, *pictures(model), layer, alpha)


def test_a_model_that_is_not_fitted_is_refused(fitted, pictures):
    [picture] = pictures(fitted("Pradot"))
    model = PradotModel(PradotSettings(backbone="test_resnet", layers=["layer2"], pre_trained=False))
    for draw in (draw_all_assignments, lambda *arguments: draw_assignments(*arguments, "layer2", 0.3)):
        with pytest.raises(RuntimeError, match=r"no prototypes .* fit it, or load a checkpoint"):
            draw(model, picture)
