"""Foreground of synthetic features, and of SAM's own code with a tiny random checkpoint."""

import logging
import pickle
import sys

import pytest
import segment_anything
import torch
from segment_anything.build_sam import _build_sam

from anomalib_ot.models.foct import FoctSettings
from anomalib_ot.models.foct import foreground as module
from anomalib_ot.models.foct.foreground import Foreground, PrincipalComponent, SegmentAnything, create_foreground

IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def features():
    """Features (2, 4, 8, 8) of a product in the middle, another pattern than the background."""
    maps = 0.1 * torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    maps[:, 1, 2:6, 2:6] += 3
    return maps


def test_principal_component_finds_the_product(features):
    expected = torch.zeros(2, 8, 8, dtype=torch.bool)
    expected[:, 2:6, 2:6] = True
    assert torch.equal(PrincipalComponent()(IMAGES, features), expected)
    # A component has no sign of its own.
    assert torch.equal(PrincipalComponent()(IMAGES, -features), expected)


def test_no_foreground_falls_back_and_says_so(caplog):
    with caplog.at_level(logging.WARNING):
        masks = PrincipalComponent()(IMAGES, torch.ones(2, 4, 8, 8))
    assert masks.all()
    assert "No foreground found in 2 of 2 support images" in caplog.text


def test_none_takes_everything_silently(features, caplog):
    assert create_foreground(FoctSettings(foreground="none"))(IMAGES, features).all()
    assert not caplog.text


def test_masks_of_another_size_are_refused(features):
    class Wrong(Foreground):
        def masks(self, images, features):
            del features
            return torch.ones(len(images), 5, 5, dtype=torch.bool)

    with pytest.raises(ValueError, match=r"shape \(2, 5, 5\), but the features need \(2, 8, 8\)"):
        Wrong()(IMAGES, features)


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """A checkpoint of SAM's architecture with 16 channels, and its place in SAM's registry."""

    def build(checkpoint=None):
        del checkpoint
        return _build_sam(16, 1, 2, [0])

    monkeypatch.setitem(segment_anything.sam_model_registry, "vit_t", build)
    monkeypatch.setitem(module._EMBEDDINGS, 16, "vit_t")
    torch.manual_seed(0)
    path = tmp_path / "sam.pth"
    torch.save(build().state_dict(), path)
    return path


@pytest.mark.parametrize("prompt", ["box", "point"])
def test_sam_predicts_masks_of_the_grid(tiny, features, prompt):
    finder = SegmentAnything(tiny, prompt)
    masks = finder.masks(IMAGES, features)
    assert masks.shape == (2, 8, 8)
    assert masks.dtype == torch.bool
    assert torch.equal(masks, finder.masks(IMAGES, features))
    # Nothing of SAM is saved with a fitted model.
    assert len(pickle.dumps(finder)) < 1000


def test_sam_checkpoint_of_another_type(tiny, tmp_path):
    weights = torch.load(tiny, weights_only=True)
    weights["image_encoder.pos_embed"] = weights["image_encoder.pos_embed"][..., :10]
    torch.save(weights, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"10 channels, expected those of vit_b \(768\), vit_l"):
        SegmentAnything(tmp_path / "other.pth").load()
    weights = torch.load(tiny, weights_only=True)
    del weights["prompt_encoder.no_mask_embed.weight"]
    torch.save(weights, tmp_path / "part.pth")
    with pytest.raises(ValueError, match="does not fit SAM's vit_t"):
        SegmentAnything(tmp_path / "part.pth").load()


def test_file_that_is_no_checkpoint(tmp_path):
    (tmp_path / "sam.pth").write_text("no")
    with pytest.raises(ValueError, match="not a checkpoint of SAM"):
        SegmentAnything(tmp_path / "sam.pth").load()


@pytest.mark.parametrize("checkpoint", [None, "missing.pth"])
def test_missing_checkpoint_says_where_to_get_one(checkpoint):
    with pytest.raises(FileNotFoundError, match=r"download one: https://github\.com/facebookresearch"):
        SegmentAnything(checkpoint).load()


def test_missing_extra_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "segment_anything", None)
    monkeypatch.setattr(module, "find_spec", lambda _: None)
    with pytest.raises(ModuleNotFoundError, match=r"anomalib-ot\[sam\]"):
        SegmentAnything(tmp_path).load()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"foreground": "otsu"}, "foreground must be .*pca.*sam.*none"),
        ({"foreground": "pca", "sam_checkpoint": "sam.pth"}, "sam_checkpoint is given"),
        ({"foreground": "sam", "sam_prompt": "text"}, r"sam_prompt must be .*box.*point.*, not"),
    ],
)
def test_bad_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        FoctSettings(**arguments)
