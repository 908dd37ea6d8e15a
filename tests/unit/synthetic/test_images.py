"""Sets of synthetic images."""

from collections import Counter

import numpy as np
import pytest
from PIL import Image

from anomalib_ot.synthetic import AREAS, CONTRASTS, KINDS, possible_areas, synthetic_images
from anomalib_ot.synthetic.images import read_reduced


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    random = np.random.default_rng(0)
    for index in range(3):
        Image.fromarray(random.integers(0, 256, (72, 80, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    return sorted(folder.iterdir())


def test_a_set_has_each_combination_and_each_image_equally_often(paths):
    every = len(KINDS) * len(AREAS) * len(CONTRASTS)
    images = [*synthetic_images(paths, every, seed=0)]
    assert len({(each.kind, each.area, each.contrast) for each in images}) == every
    assert set(Counter(each.path for each in images).values()) == {every // len(paths)}


def test_a_set_depends_on_its_seed_only(paths):
    first, again, other = (
        [(each.path, each.kind, each.image.tobytes()) for each in synthetic_images(paths, 6, seed)]
        for seed in (0, 0, 1)
    )
    assert first == again
    assert not {*first} & {*other}


def test_a_longer_set_begins_with_the_shorter_one(paths):
    short, long = ([*synthetic_images(paths, count, 0)] for count in (3, 5))
    assert all(np.array_equal(one.image, other.image) for one, other in zip(short, long, strict=False))


def test_a_large_image_is_reduced_and_keeps_its_shape(tmp_path):
    path = tmp_path / "large.png"
    Image.fromarray(np.full((300, 1024, 3), 128, dtype=np.uint8)).save(path)
    image = read_reduced(path)
    assert image.shape == (150, 512, 3)
    assert np.allclose(image, 128 / 255)


def test_an_image_too_small_for_an_area_is_named(tmp_path):
    path = tmp_path / "tiny.png"
    Image.fromarray(np.zeros((16, 16, 3), dtype=np.uint8)).save(path)
    with pytest.raises(ValueError, match=r"in .*tiny\.png: an area of 0\.001 is 0 pixels"):
        next(synthetic_images([path], 1, 0, areas=[0.001]))


@pytest.mark.parametrize(
    ("sizes", "possible"),
    [
        ([(72, 80)], list(AREAS)),
        ([(72, 80), (56, 40)], [0.004, 0.016, 0.064]),
        ([(1024, 8), (8, 2000)], [0.004, 0.016, 0.064]),
        ([(16, 16)], [0.016, 0.064]),
        ([(7, 7)], []),
    ],
)
def test_the_possible_areas_are_those_of_the_smallest_image(tmp_path, sizes, possible):
    random = np.random.default_rng(0)
    paths = []
    for index, (width, height) in enumerate(sizes):
        paths.append(tmp_path / f"{index}.png")
        Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(paths[-1])
    assert possible_areas(paths) == possible
    every = len(KINDS) * len(possible) * len(CONTRASTS) * len(paths)
    made = [*synthetic_images(paths, every, 0, areas=possible)] if possible else []
    assert {each.area for each in made} == {*possible}
    assert all(each.mask.any() and np.isfinite(each.image).all() for each in made)


def test_no_paths_are_refused():
    with pytest.raises(ValueError, match="paths must be at least one good image"):
        next(synthetic_images([], 1, 0))
