"""Turned views of support images, whatever their shape."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from anomalib_ot.models.foct import FoctModel, FoctSettings
from anomalib_ot.models.foct.rotations import turned_views

properties = settings(derandomize=True, deadline=None, database=None, max_examples=50)
sides = st.integers(1, 40)


@properties
@given(height=sides, width=sides, rotations=st.integers(1, 12))
@example(40, 40, 12)
@example(20, 40, 12)
@example(10, 40, 12)
@example(40, 10, 12)
@example(7, 7, 8)
@example(1, 40, 3)
def test_a_turned_view_shows_nothing_but_the_picture(height, width, rotations):
    picture = 1 + torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0))
    views = turned_views(picture, rotations)
    assert views.shape == (1, rotations, 3, height, width)
    assert torch.equal(views[:, 0], picture)
    assert float(picture.min()) - 1e-3 <= float(views.min()) <= float(views.max()) <= float(picture.max()) + 1e-3


def test_what_lies_beyond_an_edge_is_mirrored_as_often_as_it_takes():
    views = turned_views(torch.arange(27.0).view(1, 1, 3, 9), 4)
    # Its middle column, upright before, and four of its mirror images.
    expected = torch.tensor([13.0, 22, 13, 4, 13, 22, 13, 4, 13])
    torch.testing.assert_close(views[0, 1, 0, 1], expected)
    torch.testing.assert_close(views[0, 3, 0, 1], expected.flip(0))


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_half_precision_turns_pictures_as_single_precision_does(precision):
    picture = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)).to(precision)
    views = turned_views(picture, 12)
    assert views.dtype == precision
    torch.testing.assert_close(views, turned_views(picture.float(), 12).to(precision))


@pytest.mark.parametrize("size", [(64, 128), (32, 128), (128, 32)])
def test_a_wide_product_that_fills_the_picture_leaves_no_background_in_the_memory(size):
    torch.manual_seed(0)
    model = FoctModel(FoctSettings(backbone="test_resnet", layers=["layer2"], pre_trained=False)).eval()
    model.fit(torch.rand(1, 3, *size))
    assert model.semantic.is_foreground.all()
