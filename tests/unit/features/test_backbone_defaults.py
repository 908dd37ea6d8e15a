"""Layers and image size follow from the family of a backbone, and the network accepts them."""

import json

import pytest
import timm
import torch

from anomalib_ot import Duo, Foct, Pradot, WtFlow
from anomalib_ot.features.backbone_defaults import default_image_size, default_layers
from anomalib_ot.features.backbones import create_extractor, layers_of_backbone, prepare_extractor
from anomalib_ot.models.duo import DuoSettings
from anomalib_ot.models.foct import FoctSettings
from anomalib_ot.models.pradot import PradotSettings
from anomalib_ot.models.wt_flow import WtFlowSettings

BLOCKS = ("blocks.5", "blocks.9"), ("blocks.8",)
STAGES = ("stages.1", "stages.2"), ("stages.2",)
# Layers of Pradot and of WtFlow, and image sizes of Pradot, Foct and WtFlow. Duo's are those of Pradot.
FAMILIES = {
    "resnet18": (("layer2", "layer3"), ("layer3",), 224, 336, 256),
    "tf_efficientnet_lite0": (("blocks.2", "blocks.4"), ("blocks.4",), 224, 336, 256),
    "tf_efficientnet_lite2": (("blocks.2", "blocks.4"), ("blocks.4",), 224, 336, 256),
    "convnext_atto": (*STAGES, 224, 336, 256),
    "swin_tiny_patch4_window7_224": (("layers.1", "layers.2"), ("layers.2",), 224, 224, 224),
    "test_maxvit": (*STAGES, 160, 160, 160),
    "levit_128s": (("stages.0", "stages.1"), ("stages.0",), 224, 224, 224),
    "deit_tiny_patch16_224": (*BLOCKS, 224, 224, 224),
    "vit_tiny_patch16_224": (*BLOCKS, 224, 336, 256),
    "vit_large_patch14_clip_224": (("blocks.11", "blocks.19"), ("blocks.17",), 224, 336, 252),
    "vit_small_patch14_dinov2.lvd142m": (*BLOCKS, 448, 448, 448),
    "vit_small_patch14_reg4_dinov2.lvd142m": (*BLOCKS, 448, 448, 448),
    "vit_small_patch16_dinov3.lvd1689m": (*BLOCKS, 448, 448, 448),
    "test_vit": (("blocks.2", "blocks.4"), ("blocks.3",), 224, 336, 256),
}
# Built as another of the families, or larger.
SIBLINGS = (
    "tf_efficientnet_lite2",
    "deit_tiny_patch16_224",
    "vit_large_patch14_clip_224",
    "vit_small_patch14_reg4_dinov2.lvd142m",
)
MODELS = {Pradot: PradotSettings, Foct: FoctSettings, WtFlow: WtFlowSettings, Duo: DuoSettings}
USUAL = {PradotSettings: (224, 224), FoctSettings: (336, 336), WtFlowSettings: (256, 256), DuoSettings: (224, 224)}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_has_the_documented_layers_and_image_size(name):
    two, one, *sizes = FAMILIES[name]
    found = [kind(backbone=name) for kind in MODELS.values()]
    assert [each.layers for each in found] == [two, two, one, two]
    assert [each.image_size for each in found] == [(size, size) for size in (*sizes, sizes[0])]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SIBLINGS else ()) for name in FAMILIES]
)
def test_the_network_accepts_them(name):
    found = [kind(backbone=name) for kind in MODELS.values()]
    for layers, size in {(settings.layer_names, settings.image_size) for settings in found}:
        # Shapes suffice, and need neither time nor memory.
        with torch.device("meta"):
            extractor = prepare_extractor(name, layers, pre_trained=False)
            features = extractor(torch.zeros(1, 3, *size))
        assert {*features} == {*layers}
        if "dino" in name:
            cells = 448 // (14 if "patch14" in name else 16)
            assert all(maps.shape[-2:] == (cells, cells) for maps in features.values())


@pytest.mark.parametrize("kind", MODELS.values())
def test_the_default_backbones_keep_the_papers_settings(kind):
    strides = {8: "layer2", 16: "layer3"}
    assert kind().layers == tuple(strides[each] for each in kind.strides)
    assert kind().image_size == kind.usual_image_size == USUAL[kind]


def test_given_values_win_and_need_no_network():
    given = {"backbone": "nonesuch", "layers": ["a", "b"], "image_size": (50, 60)}
    for kind in MODELS.values():
        assert (kind(**given).layers, kind(**given).image_size) == (["a", "b"], (50, 60))


def test_random_numbers_do_not_change():
    before = torch.random.get_rng_state()
    PradotSettings(backbone="resnet18")
    assert torch.equal(torch.random.get_rng_state(), before)


def test_an_oblong_image_has_whole_patches():
    assert default_image_size("vit_large_patch14_clip_224", (100, 200)) == (98, 196)
    assert default_image_size("vit_base_patch32_224", (10, 100)) == (32, 96)


def test_a_network_of_few_layers_gives_each_once():
    layers = layers_of_backbone("crossvit_tiny_240")
    assert default_layers(layers, [8, 16]) == ("blocks.1",)
    assert default_layers(layers_of_backbone("resnet18")[:1], [8, 16]) == ("act1",)


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_records_the_resolved_values(kind):
    model = kind("test_vit", pre_trained=False, visualizer=False, evaluator=False)
    two, one, *_ = FAMILIES["test_vit"]
    assert model.hparams.layers == (one if kind is WtFlow else two)
    size = model.hparams.image_size
    assert size == model.settings.image_size
    assert tuple(model.pre_processor.transform.transforms[0].size) == size
    assert kind.configure_pre_processor(backbone="test_vit").transform.transforms[0].size == list(size)


def test_a_plain_transformer_in_a_folder_is_the_one_of_the_registry(tmp_path):
    """Whatever the folder's name: that of a checkpoint's backbone is temporary."""
    network = timm.create_model("test_vit")
    timm.models.save_for_hf(network, str(tmp_path / "weights"), safe_serialization=True)
    folder = create_extractor(f"local-dir:{tmp_path}/weights", ["blocks.2"])
    registry = create_extractor("test_vit", ["blocks.2"], pre_trained=False)
    registry.load_state_dict(folder.state_dict())
    images = torch.rand(1, 3, 96, 64)
    assert torch.equal(folder(images)["blocks.2"], registry(images)["blocks.2"])
    assert default_image_size(f"local-dir:{tmp_path}/weights", (224, 256)) == (224, 256)
    assert json.loads((tmp_path / "weights" / "config.json").read_text())["architecture"] == "test_vit"
