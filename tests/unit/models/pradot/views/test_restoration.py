from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from anomalib_ot.models.pradot.views.prototypes import nearest_patches
from anomalib_ot.models.pradot.views.restoration import difference, draw_restoration, restoration_map, restore


@pytest.fixture
def remembering(fitted):
    """A model with all features of its four training pictures for prototypes."""
    return fitted("Pradot", prototypes_per_cell=4)


def test_a_picture_all_of_whose_cells_are_prototypes_is_restored_as_it_is(remembering, pictures):
    training = pictures(remembering, 4, seed=0)
    nearest = nearest_patches(remembering.model, training)
    for picture in training:
        restored = restore(remembering.model, picture, nearest)
        assert restored.keys() == nearest.keys()
        assert all(torch.equal(each, picture.image) for each in restored.values())
        assert restoration_map(remembering.model, picture, nearest).max() == 0


def test_a_part_that_was_never_seen_is_replaced_and_raises_the_map_there(remembering, pictures):
    training = pictures(remembering, 4, seed=0)
    nearest = nearest_patches(remembering.model, training)
    image = training[0].image.clone()
    image[:, :16, :16] = 0
    prepared = training[0].prepared.clone()
    prepared[:, :16, :16] = prepared.min()
    changed = replace(training[0], image=image, prepared=prepared)
    for restored in restore(remembering.model, changed, nearest).values():
        assert restored[:, :16, :16].mean() > 0.3
    scores = restoration_map(remembering.model, changed, nearest)
    row, column = divmod(int(scores.argmax()), 64)
    assert row < 24
    assert column < 24


def test_each_cell_of_a_restored_picture_is_the_patch_of_its_prototype(fitted, pictures):
    model = fitted("Pradot", whitened_channels=0, normalize_score=False)
    nearest = nearest_patches(model.model, pictures(model, 3))
    [picture] = pictures(model, seed=5)
    key = ("layer3", 0.3)
    restored = restore(model.model, picture, {key: nearest[key]})[key]
    chosen = (
        model.model.prototypes_of(*key).assign(model.model.embeddings(picture.prepared[None])["layer3"]).prototype[0]
    )
    for row in range(4):
        for column in range(4):
            patch = restored[:, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
            assert torch.equal(patch, nearest[key].patches[chosen[row, column]])


def test_the_map_is_the_mean_of_all_layers_and_alphas_differences(fitted, pictures):
    model = fitted("Pradot", smoothing=0.0)
    nearest = nearest_patches(model.model, pictures(model, 3))
    [picture] = pictures(model, seed=5)
    maps = []
    for (layer, _), image in restore(model.model, picture, nearest).items():
        cells = {"layer2": 8, "layer3": 4}[layer]
        means = F.avg_pool2d((image - picture.image).abs().mean(0)[None, None], 64 // cells)
        torch.testing.assert_close(difference(picture.image, image, (cells, cells)), means[0, 0])
        maps.append(F.interpolate(means, (64, 64), mode="bilinear"))
    torch.testing.assert_close(restoration_map(model.model, picture, nearest), torch.cat(maps).mean((0, 1)))


def test_a_picture_of_another_size_is_restored_in_its_own(fitted, pictures):
    model = fitted("Pradot")
    nearest = nearest_patches(model.model, pictures(model, 2))
    [picture] = pictures(model)
    larger = replace(picture, image=torch.rand(3, 90, 70), prepared=torch.rand(3, 90, 70))
    assert all(each.shape == (3, 90, 70) for each in restore(model.model, larger, nearest).values())
    assert restoration_map(model.model, larger, nearest).shape == (90, 70)


def test_picture_restored_picture_and_difference_are_drawn_for_each_layer_and_alpha(fitted, pictures):
    model = fitted("Pradot")
    nearest = nearest_patches(model.model, pictures(model, 2))
    [picture] = pictures(model, seed=5)
    panels = [panel for panel in draw_restoration(model.model, picture, nearest).axes if panel.get_title()]
    assert len(panels) == 12
    restored = restore(model.model, picture, nearest)
    for row, image in zip(range(4), restored.values(), strict=True):
        drawn = np.asarray(panels[3 * row + 1].images[0].get_array())
        assert np.array_equal(drawn, image.permute(1, 2, 0).numpy())
    assert len({panels[3 * row + 2].images[0].get_clim() for row in range(4)}) == 1


def test_patches_of_another_model_are_refused(fitted, pictures):
    model, other = fitted("Pradot"), fitted("Pradot", prototypes_per_cell=2)
    nearest = nearest_patches(other.model, pictures(model))
    with pytest.raises(ValueError, match=r"patches of layer2 and alpha 0 are not those of this model"):
        restore(model.model, *pictures(model), nearest)
    with pytest.raises(ValueError, match=r"alpha must be 0.0 or 0.3, not 0.9"):
        restore(model.model, *pictures(model), {("layer2", 0.9): nearest["layer2", 0.3]})
