"""Synthetic defects: their area, their mask, their place, and what they change."""

import numpy as np
import pytest

from anomalib_ot.synthetic import KINDS, synthetic_defect
from anomalib_ot.synthetic.shapes import find_object

SIDE = 96


@pytest.fixture(scope="module")
def surface():
    """An image without a background: coloured squares of different sizes."""
    random = np.random.default_rng(0)
    return np.kron(random.random((SIDE // 4, SIDE // 4, 3)), np.ones((4, 4, 1)))


@pytest.fixture(scope="module")
def part():
    """A patterned disc on white ground."""
    random = np.random.default_rng(1)
    image = np.full((SIDE, SIDE, 3), 0.95)
    rows, columns = np.indices((SIDE, SIDE)) - SIDE // 2
    disc = rows**2 + columns**2 < 30**2
    image[disc] = np.kron(random.uniform(0, 0.7, (SIDE // 4, SIDE // 4, 3)), np.ones((4, 4, 1)))[disc]
    return image, disc


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("area", [0.004, 0.03])
def test_the_mask_has_the_area_and_covers_what_changes(surface, kind, area):
    image, mask = synthetic_defect(surface, kind, area, 1.0, np.random.default_rng(2))
    assert (image.shape, image.dtype, mask.shape, mask.dtype) == (surface.shape, np.float32, (SIDE, SIDE), bool)
    assert image.min() >= 0
    assert image.max() <= 1
    # Two places of a part may overlap, and half of an odd number of pixels is rounded.
    assert mask.mean() == pytest.approx(area, rel=0.25)
    difference = np.abs(image - surface).max(2)
    assert (difference[mask] > 0.01).mean() > 0.6
    # The soft edge is narrower than two pixels.
    near = sum(np.roll(mask, (down, right), (0, 1)) for down in (-2, -1, 0, 1, 2) for right in (-2, -1, 0, 1, 2)) > 0
    assert difference[~near].max() < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_makes_the_same_defect_and_another_seed_another(surface, kind):
    first, again, other = (
        synthetic_defect(surface, kind, 0.01, 1.0, np.random.default_rng(seed))[0] for seed in (3, 3, 4)
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("kind", KINDS)
def test_a_lower_contrast_makes_the_same_change_weaker(surface, kind):
    strong, weak = (
        synthetic_defect(surface, kind, 0.01, contrast, np.random.default_rng(5))[0] for contrast in (1.0, 0.25)
    )
    # No clipping, which is at the full contrast only.
    inside = (strong > 0) & (strong < 1)
    assert np.allclose((weak - surface)[inside], 0.25 * (strong - surface)[inside], atol=1e-6)


@pytest.mark.parametrize("kind", ["cut_paste", "scratch", "stain", "blur", "missing"])
def test_a_defect_lies_on_the_object(part, kind):
    image, disc = part
    for seed in range(5):
        _, mask = synthetic_defect(image, kind, 0.01, 1.0, np.random.default_rng(seed))
        assert disc[mask].mean() > 0.85


def test_a_missing_part_shows_the_background(part):
    image, disc = part
    shown = [synthetic_defect(image, "missing", 0.02, 1.0, np.random.default_rng(seed)) for seed in range(12)]
    white = [np.abs(spoiled[mask & disc] - 0.95).max() < 0.01 for spoiled, mask in shown]
    assert 0 < sum(white) < len(white)


def test_exchanged_parts_swap_places(surface):
    spoiled, mask = synthetic_defect(surface, "exchanged", 0.02, 1.0, np.random.default_rng(6))
    assert np.allclose(np.sort(spoiled[mask], axis=0), np.sort(surface[mask], axis=0), atol=1e-6)


def test_a_stain_on_a_grey_image_is_grey(surface):
    grey = np.repeat(surface[..., :1], 3, axis=2)
    spoiled, _ = synthetic_defect(grey, "stain", 0.05, 1.0, np.random.default_rng(7))
    assert np.ptp(spoiled, axis=2).max() < 1e-6


def test_the_object_is_found_only_before_a_uniform_background(part, surface):
    image, disc = part
    found, colour = find_object(image)
    assert (found == disc).mean() > 0.97
    assert np.allclose(colour, 0.95)
    found, colour = find_object(surface)
    assert found.all()
    assert colour is None


def test_an_image_of_one_colour_gets_a_defect_too():
    flat = np.full((SIDE, SIDE, 3), 0.5)
    for kind in KINDS:
        _, mask = synthetic_defect(flat, kind, 0.01, 1.0, np.random.default_rng(8))
        assert mask.any()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"kind": "crack"}, "kind must be 'cut_paste' or .* not 'crack'"),
        ({"area": 0.0}, "area must be above 0 and at most 0.5, not 0.0"),
        ({"area": 0.6}, "area must be above 0"),
        ({"contrast": 0.0}, "contrast must be above 0 and at most 1, not 0.0"),
        ({"image": np.zeros((8, 8))}, r"image must be an array \(H, W, 3\), not \(8, 8\)"),
        (
            {"image": np.zeros((8, 8, 3)), "area": 0.01},
            "1 pixels of an image of 8 x 8, .* larger area or larger images",
        ),
    ],
)
def test_a_wrong_argument_is_refused(surface, changed, message):
    arguments = {"image": surface, "kind": "stain", "area": 0.01, "contrast": 1.0, **changed}
    with pytest.raises(ValueError, match=message):
        synthetic_defect(**arguments, random=np.random.default_rng(0))
