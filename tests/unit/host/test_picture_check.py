"""Pictures that show nothing, and those that only look like it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data.utils import read_image
from PIL import Image
from torchvision.transforms.v2.functional import resize

from anomalib_ot.data import read_picture
from anomalib_ot.host.picture_check import blank_pictures, cut_off_pictures

DATA = Path(__file__).resolve().parents[4] / "shared" / "data"


def noise(lowest, highest):
    generator = torch.Generator().manual_seed(0)
    return lowest + (highest - lowest) * torch.rand(3, 64, 64, generator=generator)


def with_spot(picture, spot, side):
    """A picture with a square spot, of so many pixels along each side."""
    picture = picture.clone()
    picture[:, :side, :side] = spot
    return picture


@pytest.mark.parametrize(
    ("picture", "verdict"),
    [
        (torch.ones(3, 64, 64), "white all over"),
        (with_spot(torch.ones(3, 64, 64), 0.2, 4), "white all over"),
        (torch.full((3, 64, 64), 0.4), "of one colour"),
        (torch.tensor([0.9, 0.1, 0.1]).view(3, 1, 1).expand(3, 64, 64), "of one colour"),
        (torch.zeros(3, 64, 64), "of one colour"),
        (noise(0, 4095 / 65535), "darker than an eighth of white all over"),
    ],
)
def test_a_picture_that_shows_nothing_is_found(picture, verdict):
    assert blank_pictures(torch.stack([noise(0, 1), picture])) == {1: verdict}


@pytest.mark.parametrize(
    "picture",
    [
        noise(0, 1),
        noise(0.4, 0.45),
        # A small part on a lit ground, and a bright one in the dark.
        with_spot(torch.ones(3, 64, 64), noise(0, 1)[:, :8, :8], 8),
        with_spot(torch.zeros(3, 64, 64), 0.3, 8),
        # Where a few pixels do not tell.
        with_spot(torch.full((3, 64, 64), 0.4), 0.6, 1),
        with_spot(torch.zeros(3, 64, 64), 1, 1).roll((1, 1), (1, 2)),
    ],
)
def test_a_picture_that_shows_little_is_not_taken_for_one(picture):
    assert blank_pictures(picture[None]) == {}


def test_grey_pictures_are_found_that_were_cut_off_at_255(tmp_path):
    # Half of the pixels are below 256 of 4095: what is left shows something.
    values = np.random.default_rng(0).integers(0, 512, (64, 64)).astype(np.uint16)
    files = {
        "deep": values,
        "bytes in words": values // 4,
        "byte": (values // 2).astype(np.uint8),
        "float": values.astype(np.float32),
    }
    paths = [str(tmp_path / f"{name}.tiff") for name in files]
    for path, content in zip(paths, files.values(), strict=True):
        Image.fromarray(content).save(path)
    images = torch.stack([read_image(path, as_tensor=True) for path in paths])
    assert blank_pictures(images) == {}
    smaller = resize(images, [24, 24], antialias=True)
    assert cut_off_pictures(images, paths) == cut_off_pictures(smaller, paths) == [0, 3]
    right = torch.stack([read_picture(path, (0, 511)) for path in paths])
    assert cut_off_pictures(right, paths) == []
    # Neither pictures that are of no file, nor files that are gone since.
    assert cut_off_pictures(images, [""] * 4) == []


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the real images in ../shared/data")
@pytest.mark.parametrize("side", [None, 64])
def test_no_real_picture_is_found(side):
    categories = sorted({path.parent for path in DATA.glob("**/train/good")} | {*DATA.glob("**/test/*")})
    files = [path for category in categories for path in sorted(category.glob("**/*.*"))[::40]]
    assert len(files) > 60
    for path in files:
        picture = read_image(path, as_tensor=True)
        picture = picture if side is None else resize(picture, [side, side], antialias=True)
        assert blank_pictures(picture[None]) == {}, path
