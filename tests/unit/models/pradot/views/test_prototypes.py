import gc

import numpy as np
import pytest
import torch

from anomalib_ot.models.pradot import PradotModel, PradotSettings
from anomalib_ot.models.pradot.views.prototypes import NearestPatches, assemble, cut, draw_prototypes, nearest_patches


def shown(panel):
    """The picture in a panel, (3, h, w)."""
    return torch.from_numpy(np.asarray(panel.images[0].get_array())).permute(2, 0, 1)


def patches(alpha, coordinates, usage, grid=(2, 3)):
    """Patches of 2 × 2 pixels, each of one grey."""
    count = len(usage)
    greys = (torch.arange(count, dtype=torch.float32) / 10).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    zeros = torch.zeros(count, dtype=torch.int64)
    return NearestPatches(
        "layer2",
        alpha,
        grid,
        grid,
        greys,
        zeros.float(),
        ("",) * count,
        zeros,
        torch.tensor(coordinates),
        torch.tensor(usage),
    )


@pytest.mark.parametrize(("spatial", "power"), [("squared", 2), ("euclidean", 1)])
@pytest.mark.parametrize("per_cell", [0.25, 2])
def test_patches_are_those_of_least_cost_among_all_cells_of_all_pictures(fitted, pictures, spatial, power, per_cell):
    model = fitted("Pradot", spatial=spatial, prototypes_per_cell=per_cell, alphas=(0.0, 0.4))
    training = pictures(model, 5)
    found = nearest_patches(model.model, iter(training))
    assert list(found) == [("layer2", 0.0), ("layer2", 0.4), ("layer3", 0.0), ("layer3", 0.4)]
    for (layer, alpha), nearest in found.items():
        prototypes = model.model.prototypes_of(layer, alpha)
        maps = torch.cat([model.model.embeddings(each.prepared[None])[layer] for each in training])
        side = maps.shape[-1]
        for index, (feature, place) in enumerate(zip(prototypes.features, prototypes.coordinates, strict=True)):
            similarity = torch.cosine_similarity(maps, feature[None, :, None, None], dim=1)
            rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
            distance = (torch.stack([rows, columns], -1) / (side - 1) - place).norm(dim=-1) ** power
            cost = (1 - alpha) * (1 - similarity) + alpha * distance
            picture, cell = divmod(int(cost.argmin()), side**2)
            row, column = divmod(cell, side)
            pixels = 64 // side
            assert nearest.pictures[index] == training[picture].name
            assert nearest.cells[index] == cell
            assert nearest.distances[index] == pytest.approx(float(cost.min()), abs=1e-5)
            expected = training[picture].image.unfold(1, pixels, pixels).unfold(2, pixels, pixels)[:, row, column]
            assert torch.equal(nearest.patches[index], expected)


def test_usage_counts_the_cells_that_choose_a_prototype(fitted, pictures):
    model = fitted("Pradot", prototypes_per_cell=2)
    training = pictures(model, 3)
    for (layer, alpha), nearest in nearest_patches(model.model, training).items():
        chosen = [
            model.model.prototypes_of(layer, alpha).assign(model.model.embeddings(each.prepared[None])[layer]).prototype
            for each in training
        ]
        expected = [int((torch.cat(chosen) == index).sum()) for index in range(len(nearest.usage))]
        assert nearest.usage.tolist() == expected
        assert sum(expected) == 3 * nearest.grid[0] * nearest.grid[1]


def test_memory_does_not_grow_with_the_number_of_pictures(fitted, pictures):
    model = fitted("Pradot")
    [template] = pictures(model)
    alive = []

    def stream():
        for number in range(12):
            if number in {3, 11}:
                gc.collect()
                # By its type, as a weak reference may be to what is gone.
                alive.append(sum(each.numel() for each in gc.get_objects() if issubclass(type(each), torch.Tensor)))
            yield template

    nearest_patches(model.model, stream())
    assert alive[0] == alive[1]


def test_patches_make_up_the_picture_they_were_cut_from():
    image = torch.rand(3, 12, 20)
    parts = cut(image, (3, 4))
    assert parts.shape == (12, 3, 4, 5)
    assert torch.equal(parts[5], image[:, 4:8, 5:10])
    assert torch.equal(assemble(parts, (3, 4)), image)


def test_a_picture_of_no_whole_patches_is_enlarged():
    assert cut(torch.rand(3, 13, 20), (3, 4)).shape == (12, 3, 5, 5)


def test_local_prototypes_are_drawn_at_their_places_the_most_used_first():
    places = [[0.0, 0.0], [0.0, 0.0], [1.0, 0.5], [0.0, 0.0], [0.9, 0.9]]
    panels = draw_prototypes(patches(0.3, places, [1, 7, 2, 7, 0])).axes
    counts, first, second, third = (panel for panel in panels if panel.images and panel.get_title())
    assert np.asarray(counts.images[0].get_array()).tolist() == [[3, 0, 0], [0, 1, 1]]
    tenths = [(10 * shown(panel)[0, ::2, ::2]).tolist() for panel in (first, second, third)]
    # The grey of an empty place is 8.5 tenths.
    assert tenths[0] == [pytest.approx([1, 8.5, 8.5]), pytest.approx([8.5, 2, 4])]
    assert tenths[1] == [pytest.approx([3, 8.5, 8.5]), pytest.approx([8.5, 8.5, 8.5])]
    assert tenths[2] == [pytest.approx([0, 8.5, 8.5]), pytest.approx([8.5, 8.5, 8.5])]


def test_global_prototypes_are_drawn_one_after_the_other_the_most_used_first():
    [panel] = draw_prototypes(patches(0.0, [[0.0, 0.0]] * 5, [1, 9, 3, 0, 4])).axes
    sheet = 10 * shown(panel)[0, ::3, ::3]
    assert sheet.tolist() == [pytest.approx([1, 4, 2]), pytest.approx([0, 3, 8.5])]


def test_a_coarser_grid_and_compressed_prototypes_can_be_drawn(fitted, pictures):
    model = fitted("Pradot", prototypes_per_cell=0.25)
    prototypes = model.model.prototypes_of("layer2", 0.3)
    prototypes.keep(torch.arange(16) == 5)
    nearest = nearest_patches(model.model, pictures(model))["layer2", 0.3]
    assert nearest.prototype_grid == (4, 4)
    mosaic = shown(draw_prototypes(nearest).axes[1])
    assert mosaic.shape == (3, 32, 32)
    assert torch.equal(mosaic[:, 8:16, 8:16], nearest.patches[0])
    assert (mosaic[:, :8] == mosaic[0, 0, 0]).all()


def test_no_pictures_and_no_prototypes_are_refused(fitted, pictures):
    model = fitted("Pradot")
    with pytest.raises(ValueError, match="no images to find patches in"):
        nearest_patches(model.model, [])
    with pytest.raises(RuntimeError, match=r"no prototypes .* fit it"):
        nearest_patches(
            PradotModel(PradotSettings(backbone="test_resnet", layers=["layer2"], pre_trained=False)), pictures(model)
        )
