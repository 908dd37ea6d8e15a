"""Every network of timm gives maps (B, D, H, W), in which a defect is where it is in the picture."""

import json

import pytest
import timm
import torch
from anomalib.models.components import TimmFeatureExtractor
from timm.models import get_pretrained_cfg, model_entrypoint

from anomalib_ot.features.backbones import create_extractor
from anomalib_ot.features.extraction import FastExtractor, extract_by_parts
from anomalib_ot.features.map_extractor import layers_of

# Of each family the network with the fewest parameters.
SMALLEST = (
    "beit_base_patch16_224",
    "halonet_h1",
    "test_byobnet",
    "cait_xxs24_224",
    "coat_tiny",
    "convit_tiny",
    "convmixer_768_32",
    "test_convnext",
    "cpubone_nano",
    "crossvit_tiny_240",
    "csatv2",
    "cs3darknet_focus_s",
    "cspnext_tiny",
    "davit_tiny",
    "deepseek_vit_412m",
    "deit_tiny_patch16_224",
    "densenet121",
    "dla46x_c",
    "dpn48b",
    "edgenext_xx_small",
    "efficientformer_l1",
    "efficientformerv2_s0",
    "test_efficientnet",
    "efficientvim_m1",
    "efficientvit_b0",
    "efficientvit_m0",
    "vit_tiny_patch16_dinov3_qkvb",
    "fasternet_t0",
    "fastvit_t8",
    "focalnet_tiny_srf",
    "gcvit_xxtiny",
    "gemma4_vit_167m",
    "ghostnet_050",
    "hardcorenas_b",
    "hgnetv2_b0",
    "hiera_tiny_224",
    "sam2_hiera_tiny",
    "hrnet_w18_small",
    "iformer_t",
    "inception_next_atto",
    "inception_resnet_v2",
    "inception_v3",
    "inception_v4",
    "lcnetv2_small",
    "levit_128s",
    "lowformer_b0",
    "test_mambaout",
    "test_coatnet",
    "poolformerv2_s12",
    "gmlp_ti16_224",
    "mobilenetv3_small_050",
    "mobilenetv5_base",
    "mobilevit_xxs",
    "mvitv2_tiny",
    "naflexvit_base_patch16_parfac_gap",
    "nasnetalarge",
    "nest_tiny",
    "nextvit_small",
    "test_nfnet",
    "pit_ti_224",
    "pnasnet5large",
    "pvt_v2_b0",
    "qwen3_vit_88m",
    "rdnet_tiny",
    "regnetx_002",
    "repghostnet_050",
    "repvit_m1",
    "res2next50",
    "resnest14d",
    "test_resnet",
    "resnetv2_18",
    "rexnet_100",
    "selecsls42",
    "legacy_seresnet18",
    "sequencer2d_s",
    "shvit_s1",
    "skresnet18",
    "starnet_s050",
    "swiftformer_xs",
    "swin_tiny_patch4_window7_224",
    "swinv2_tiny_window16_256",
    "swinv2_cr_tiny_224",
    "tiny_vit_5m_224",
    "tnt_s_legacy_patch16_224",
    "tresnet_m",
    "twins_svt_small",
    "vgg11",
    "visformer_tiny",
    "test_vit",
    "vit_tiny_r_s16_p8_224",
    "test_vit_relpos",
    "samvit_base_patch16_224",
    "vitamin_small_224",
    "volo_d1_224",
    "ese_vovnet19b_slim_dw",
    "legacy_xception",
    "xception41p",
    "xcit_nano_12_p8_224",
)
OBLONG = (192, 256)
SIZES = {"halonet_h1": (256, 256), "deepseek_vit_412m": (196, 252)}
# Layers whose features come from near by, even with random weights; deeper ones see the whole picture.
EARLY = 2


def family_of(name):
    return model_entrypoint(name).__module__.rpartition(".")[2]


def image_size_of(name):
    config = get_pretrained_cfg(name)
    return config.input_size[1:] if config.fixed_input_size else SIZES.get(name, OBLONG)


def layers_named(name):
    """The layers that can be asked for, once each."""
    with torch.device("meta"):
        network = timm.create_model(name, features_only=True)
    return [layer for layer in dict.fromkeys(layers_of(network)) if layer]


def images_of(image_size):
    """A smooth picture without and with a bright square off the diagonal, and the square's top, left and side."""
    height, width = image_size
    across, down = torch.linspace(0, 0.5, width).expand(height, -1), torch.linspace(0, 0.5, height)[:, None]
    normal = torch.stack([across, down.expand(-1, width), (across + down) / 2])
    top, left, side = height // 4, 5 * width // 8, height // 6
    defective = normal.clone()
    defective[:, top : top + side, left : left + side] = 2
    return torch.stack([normal, defective]), (top, left, side)


def lies_at(maps, image_size, square):
    """Whether the cell in which the two pictures' maps differ most is on the square or beside it."""
    cells = maps.shape[-2:]
    row, column = divmod(int((maps[1] - maps[0]).norm(dim=0).argmax()), cells[1])
    *corner, side = square
    return all(
        start - size / count <= (index + 1) * size / count and index * size / count <= start + side + size / count
        for index, count, size, start in zip((row, column), cells, image_size, corner, strict=True)
    )


def test_no_family_of_timm_is_missing():
    assert {*map(family_of, SMALLEST)} == {*timm.list_modules()}


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALLEST, ids=family_of)
def test_each_family_gives_maps_with_the_defect_in_its_place(name):
    torch.manual_seed(0)
    image_size = image_size_of(name)
    layers = layers_named(name)
    extractor = create_extractor(name, layers, pre_trained=False)
    images, square = images_of(image_size)
    features = extractor(images)
    assert list(features) == layers
    for maps, channels in zip(features.values(), extractor.out_dims, strict=True):
        assert (maps.ndim, maps.shape[:2]) == (4, (2, channels))
    for layer in layers[:EARLY]:
        assert lies_at(features[layer], image_size, square), layer


@pytest.mark.parametrize(
    ("name", "layer", "shape"),
    [
        ("test_mambaout", "stages.1", (1, 32, 24, 32)),
        ("test_maxvit", "stages.0", (1, 32, 40, 40)),
        ("mobilevit_xxs", "stages.1", (1, 24, 48, 64)),
        ("convit_tiny", "blocks.3", (1, 192, 14, 14)),
        ("levit_128s", "stages.1", (1, 256, 7, 7)),
        ("efficientvit_m0", "stages.0", (1, 64, 14, 14)),
    ],
)
def test_networks_are_taken_for_what_they_are(name, layer, shape):
    extractor = create_extractor(name, [layer], pre_trained=False)
    assert extractor(torch.rand(1, 3, *image_size_of(name)))[layer].shape == shape


@pytest.mark.parametrize("layers", [["blocks.1", "blocks.3"], ["blocks.2"]], ids=str)
def test_plain_vision_transformers_are_as_anomalib_makes_them(layers):
    ours = create_extractor("test_vit", layers, pre_trained=False)
    anomalibs = TimmFeatureExtractor("test_vit", layers, pre_trained=False)
    anomalibs.load_state_dict(ours.state_dict())
    # Another memory layout may round otherwise.
    anomalibs.to(memory_format=torch.channels_last)
    images = torch.rand(2, 3, 96, 64)
    expected = anomalibs(images)
    assert all(torch.equal(maps, expected[layer]) for layer, maps in ours(images).items())


def test_blocks_after_the_last_layer_are_not_run():
    extractor = create_extractor("test_vit", ["blocks.1"], pre_trained=False)
    run = []
    for number, block in enumerate(extractor.feature_extractor.blocks):
        block.register_forward_hook(lambda *_, number=number: run.append(number))
    extractor(torch.rand(1, 3, 96, 64))
    assert run == [0, 1]


def narrow_swin(folder):
    """A Swin with shifted windows, but few blocks and channels: the export of a whole one takes long."""
    arguments = {"img_size": 56, "embed_dim": 12, "depths": [2, 2, 1, 1], "num_heads": [1, 2, 2, 2]}
    config = {"pretrained_cfg": {"input_size": [3, 56, 56]}, "model_args": arguments}
    (folder / "config.json").write_text(json.dumps({"architecture": "swin_tiny_patch4_window7_224", **config}))
    return f"local-dir:{folder}"


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("test_mambaout", ["stages.0", "stages.1"]),
        pytest.param("test_maxvit", ["stages.0"], marks=pytest.mark.slow),
        pytest.param("swin_tiny_patch4_window7_224", ["layers.1"], marks=pytest.mark.slow),
    ],
)
def test_exported_maps_are_in_the_same_order(name, layers, tmp_path):
    pytest.importorskip("openvino")
    extractor = create_extractor(narrow_swin(tmp_path) if "swin" in name else name, layers, pre_trained=False)
    images = torch.rand(2, 3, *extractor.feature_extractor.pretrained_cfg["input_size"][1:])
    expected = extract_by_parts(extractor, images)
    graph = FastExtractor(extractor, "openvino", None)
    exported = {
        "torch": torch.export.export(extractor, (images,)).module()(images),
        "openvino": graph(images),
    }
    assert graph.name == "openvino"
    for features in exported.values():
        for (layer, maps), channels in zip(expected.items(), extractor.out_dims, strict=True):
            assert features[layer].shape[1] == channels
            torch.testing.assert_close(features[layer], maps, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "layer", "size", "takes"),
    [
        # Made for one size, windows that must divide the picture, and patches that must.
        ("test_coatnet", "stages.2", (192, 192), "(160, 160)"),
        ("deit_tiny_patch16_224", "blocks.3", (224, 256), "(224, 224)"),
        ("test_maxvit", "stages.0", (192, 160), "(160, 160)"),
        ("test_vit", "blocks.2", (160, 170), "(160, 160)"),
    ],
)
def test_an_image_size_that_a_network_cannot_take_is_named(name, layer, size, takes):
    extractor = create_extractor(name, [layer], pre_trained=False)
    with pytest.raises(
        ValueError, match=rf"{name} does not accept images of \({size[0]}, {size[1]}\).*image_size"
    ) as caught:
        extractor(torch.rand(2, 3, *size))
    assert f"but accepts {takes}" in str(caught.value)


def test_other_failures_are_not_laid_to_the_size():
    extractor = create_extractor("test_coatnet", ["stages.2"], pre_trained=False)
    for size in (160, 192):
        with pytest.raises(RuntimeError, match="Double"):
            extractor(torch.rand(1, 3, size, size, dtype=torch.float64))


def test_too_little_memory_is_not_laid_to_the_size(monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError

    extractor = create_extractor("test_resnet", ["layer1"], pre_trained=False)
    monkeypatch.setattr(extractor.feature_extractor, "forward", fail)
    with pytest.raises(torch.OutOfMemoryError):
        extractor(torch.rand(1, 3, 64, 64))


@pytest.mark.parametrize("wrong", [torch.zeros(1, 64), torch.zeros(1, 196, 64), torch.zeros(1, 7, 8, 64)])
def test_what_is_no_map_is_refused_by_name(monkeypatch, wrong):
    extractor = create_extractor("test_resnet", ["layer2"], pre_trained=False)
    monkeypatch.setattr(extractor.feature_extractor, "forward", lambda _: [wrong])
    with pytest.raises(ValueError, match=r"layer layer2 of test_resnet returns .* instead of maps \(B, \d+, H, W\)"):
        extractor(torch.rand(1, 3, 64, 64))


def test_pictures_of_one_channel_are_refused_before_training(tmp_path):
    timm.models.save_for_hf(timm.create_model("test_resnet", in_chans=1), tmp_path)
    with pytest.raises(ValueError, match="expects images with 1 channels, not 3"):
        create_extractor(f"local-dir:{tmp_path}", ["layer1"])


def test_a_layer_without_a_name_is_not_offered():
    with pytest.raises(ValueError, match=r"no layers \[''\]; choose from \['body.layer1'"):
        create_extractor("tresnet_m", [""], pre_trained=False)
