from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.manifold import trustworthiness

from anomalib_ot.models.pradot import PradotModel, PradotSettings
from anomalib_ot.models.pradot.views import projection
from anomalib_ot.models.pradot.views.projection import draw_projection, project, sample_cells
from anomalib_ot.models.pradot.views.prototypes import plain_cost


@pytest.fixture
def normal(pictures):
    """Pictures that are known to be normal."""
    return lambda model, count=4: [replace(each, label=False) for each in pictures(model, count)]


@pytest.mark.parametrize("method", ["tsne", pytest.param("umap", marks=pytest.mark.slow)])
def test_neighbours_are_those_of_low_cost_and_a_seed_gives_the_same_points(fitted, normal, method):
    if method == "umap":
        pytest.importorskip("umap")
    model = fitted("Pradot")
    cells = sample_cells(model.model, normal(model), "layer2", 90)
    result, again = (project(model.model, cells, 0.3, method, 30, seed=1) for _ in range(2))
    assert np.array_equal(result.points, again.points)
    assert result.points.shape == (120, 2)
    assert result.prototypes.sum() == 30
    assert not np.array_equal(project(model.model, cells, 0.3, method, 30, seed=2).points, result.points)
    everything = project(model.model, cells, 0.3, method)
    prototypes = model.model.prototypes_of("layer2", 0.3)
    features = torch.cat([cells.features, prototypes.features])
    # All prototypes, in any order, have their coordinates.
    assert sorted(everything.coordinates[90:].tolist()) == sorted(prototypes.coordinates.tolist())
    order = [
        int((torch.from_numpy(place) - prototypes.coordinates).norm(dim=1).argmin())
        for place in everything.coordinates[90:]
    ]
    features = torch.cat([cells.features, prototypes.features[order]])
    places = torch.from_numpy(everything.coordinates)
    costs = plain_cost(features, places, features, places, 0.3, "euclidean").clamp(min=0).fill_diagonal_(0)
    assert trustworthiness(costs.numpy(), everything.points, n_neighbors=5, metric="precomputed") > 0.8


def test_the_plain_cost_is_that_of_equation_1():
    generator = torch.Generator().manual_seed(0)
    features, others = torch.randn(5, 8, generator=generator), torch.randn(7, 8, generator=generator)
    places, other_places = torch.rand(5, 2, generator=generator), torch.rand(7, 2, generator=generator)
    for kind, power in (("squared", 2), ("euclidean", 1)):
        costs = plain_cost(features, places, others, other_places, 0.3, kind)
        for i, j in ((0, 0), (4, 6), (2, 3)):
            similarity = torch.cosine_similarity(features[i], others[j], dim=0)
            expected = 0.7 * (1 - similarity) + 0.3 * (places[i] - other_places[j]).norm() ** power
            assert costs[i, j] == pytest.approx(float(expected), abs=1e-5)


def test_a_cell_is_abnormal_if_over_thirty_percent_of_its_pixels_are(fitted, pictures):
    model = fitted("Pradot")
    mask = torch.zeros(64, 64, dtype=torch.bool)
    # Cells are 8 pixels wide: 24 of 64 pixels, 16 of 64, and all.
    mask[:3, :8] = True
    mask[:2, 16:24] = True
    mask[56:, 56:] = True
    [picture] = [replace(each, label=True, mask=mask) for each in pictures(model)]
    cells = sample_cells(model.model, [picture], "layer2", 64)
    assert len(cells.features) == 64
    assert sorted(cells.coordinates[cells.abnormal].tolist()) == [[0, 0], [1, 1]]
    maps = model.model.embeddings(picture.prepared[None])["layer2"][0]
    for feature, place in zip(cells.features, cells.coordinates, strict=True):
        row, column = (place * 7).round().int().tolist()
        torch.testing.assert_close(feature, maps[:, row, column])


def test_no_more_cells_are_kept_than_asked_for_and_up_to_a_third_are_abnormal(fitted, pictures):
    model = fitted("Pradot")
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[:32] = True
    shown = [replace(each, label=True, mask=mask) for each in pictures(model, 5)]
    cells, again, other = (sample_cells(model.model, shown, "layer2", 60, seed) for seed in (0, 0, 1))
    assert cells.abnormal.tolist() == 40 * [False] + 20 * [True]
    assert torch.equal(cells.features, again.features)
    assert not torch.equal(cells.features, other.features)


def test_abnormal_pictures_without_a_mask_are_left_out(fitted, normal, pictures):
    model = fitted("Pradot")
    unknown = [replace(each, label=True) for each in pictures(model, 2)]
    assert len(sample_cells(model.model, [*unknown, *normal(model, 1)], "layer3", 100).features) == 16
    with pytest.raises(ValueError, match="no cell to draw: give normal images, or abnormal ones with masks"):
        sample_cells(model.model, unknown, "layer3")


def test_each_alpha_has_a_panel_and_colours_tell_places(fitted, normal):
    model = fitted("Pradot", alphas=(0.0, 0.2, 0.7))
    panels = draw_projection(model.model, normal(model, 1), "layer3", "tsne").axes
    assert [panel.get_title() for panel in panels[:3]] == [
        rf"layer3, $\alpha$ = {each}" for each in ("0", "0.2", "0.7")
    ]
    corners = np.asarray(panels[3].images[0].get_array())[[0, 0, -1, -1], [0, -1, 0, -1]]
    points = next(each for each in panels[0].collections if each.get_label() == "normal cell")
    for corner in corners:
        assert np.isclose(points.get_facecolors()[:, :3], corner).all(1).sum() == 1


def test_what_cannot_be_projected_is_refused(fitted, normal):
    model = fitted("Pradot")
    cells = sample_cells(model.model, normal(model, 1), "layer3")
    with pytest.raises(ValueError, match="method must be 'umap' or 'tsne', not 'pca'"):
        project(model.model, cells, 0.3, "pca")
    with pytest.raises(ValueError, match=r"alpha must be 0.0 or 0.3, not 0.9"):
        project(model.model, cells, 0.9, "tsne")
    with pytest.raises(ValueError, match="layer must be 'layer2' or 'layer3', not 'layer9'"):
        draw_projection(model.model, normal(model, 1), "layer9", "tsne")
    with pytest.raises(ValueError, match="count must be at least 3, not 2"):
        sample_cells(model.model, normal(model, 1), "layer3", 2)
    with pytest.raises(RuntimeError, match=r"no prototypes .* fit it"):
        sample_cells(
            PradotModel(PradotSettings(backbone="test_resnet", layers=["layer3"], pre_trained=False)),
            normal(model, 1),
            "layer3",
        )


def test_without_umap_the_extra_to_install_is_named(fitted, normal, monkeypatch):
    model = fitted("Pradot")
    monkeypatch.setattr(projection, "find_spec", lambda _: None)
    with pytest.raises(ImportError, match=r'pip install "anomalib-ot\[viz\]"'):
        draw_projection(model.model, normal(model, 1), "layer3")
