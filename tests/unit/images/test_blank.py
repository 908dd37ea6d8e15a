"""Images without content, and images that only resemble them."""

from pathlib import Path

import pytest
import torch
from anomalib.data.utils import read_image
from torchvision.transforms.v2.functional import resize

from anomalib_ot.images.blank import blank_images

DATA = Path(__file__).resolve().parents[4] / "shared" / "data"


def noise(lowest, highest):
    generator = torch.Generator().manual_seed(0)
    return lowest + (highest - lowest) * torch.rand(3, 64, 64, generator=generator)


def with_spot(image, spot, side):
    """An image with a square spot of a side in pixels."""
    image = image.clone()
    image[:, :side, :side] = spot
    return image


@pytest.mark.parametrize(
    ("image", "verdict"),
    [
        (torch.ones(3, 64, 64), "white all over"),
        (with_spot(torch.ones(3, 64, 64), 0.2, 4), "white all over"),
        (torch.full((3, 64, 64), 0.4), "of one colour"),
        (torch.tensor([0.9, 0.1, 0.1]).view(3, 1, 1).expand(3, 64, 64), "of one colour"),
        (torch.zeros(3, 64, 64), "of one colour"),
        (noise(0, 4095 / 65535), "darker than an eighth of white all over"),
    ],
)
def test_an_image_without_content_is_found(image, verdict):
    assert blank_images(torch.stack([noise(0, 1), image])) == {1: verdict}


@pytest.mark.parametrize(
    "image",
    [
        noise(0, 1),
        noise(0.4, 0.45),
        # A small part on a lit background, and a bright one in the dark.
        with_spot(torch.ones(3, 64, 64), noise(0, 1)[:, :8, :8], 8),
        with_spot(torch.zeros(3, 64, 64), 0.3, 8),
        # A few pixels do not suffice.
        with_spot(torch.full((3, 64, 64), 0.4), 0.6, 1),
        with_spot(torch.zeros(3, 64, 64), 1, 1).roll((1, 1), (1, 2)),
    ],
)
def test_an_image_with_little_content_is_not_blank(image):
    assert blank_images(image[None]) == {}


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the real images in ../shared/data")
@pytest.mark.parametrize("side", [None, 64])
def test_no_real_image_is_found(side):
    categories = sorted({path.parent for path in DATA.glob("**/train/good")} | {*DATA.glob("**/test/*")})
    files = [path for category in categories for path in sorted(category.glob("**/*.*"))[::40]]
    assert len(files) > 60
    for path in files:
        image = read_image(path, as_tensor=True)
        image = image if side is None else resize(image, [side, side], antialias=True)
        assert blank_images(image[None]) == {}, path
