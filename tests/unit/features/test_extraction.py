import logging
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from anomalib_ot.features import extraction
from anomalib_ot.features.backbones import create_extractor
from anomalib_ot.features.extraction import FastExtractor, extract_by_parts, full_precision


@pytest.fixture(scope="module")
def extractor():
    return create_extractor("test_resnet", ["layer1", "layer2"], pre_trained=False)


@pytest.fixture
def images():
    return torch.rand(19, 3, 32, 48)


class TwoLayers(nn.Module):
    def forward(self, images):
        return {"a": images + self.shift(images), "b": images[..., ::2, ::2]}

    def shift(self, images):
        return torch.zeros_like(images)


def test_parts_give_what_the_whole_gives(extractor, images):
    ours, expected = extract_by_parts(extractor, images), extractor(images)
    assert list(ours) == list(expected)
    for layer, maps in expected.items():
        torch.testing.assert_close(ours[layer], maps, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("counts", [(1, 3, 19), (3, 1, 19), (19, 3, 1)])
def test_openvino_gives_what_torch_gives(extractor, images, counts, caplog):
    pytest.importorskip("openvino")
    # The first batch makes the graph, which later ones of any size use.
    fast = FastExtractor(extractor, "openvino", None)
    with caplog.at_level(logging.INFO):
        fast(images[: counts[0]])
    assert fast.name == "openvino"
    assert "differ from torch's by" in caplog.text
    for count in counts:
        ours = fast(images[:count])
        for layer, maps in extract_by_parts(extractor, images[:count]).items():
            torch.testing.assert_close(ours[layer], maps, atol=1e-4, rtol=1e-4)
        # Later batches do not overwrite earlier ones.
        first = {layer: maps.clone() for layer, maps in ours.items()}
        fast(images[-count:])
        assert all(torch.equal(ours[layer], maps) for layer, maps in first.items())


@pytest.mark.parametrize(("count", "name"), [(None, "torch"), (99, "torch"), (100, "openvino")])
def test_auto_takes_openvino_for_many_images(extractor, images, count, name):
    pytest.importorskip("openvino")
    fast = FastExtractor(extractor, "auto", count)
    fast(images[:1])
    assert fast.name == name


def test_auto_does_without_openvino(extractor, images, monkeypatch):
    monkeypatch.setattr(extraction, "find_spec", lambda _: None)
    fast = FastExtractor(extractor, "auto", 1000)
    fast(images[:1])
    assert fast.name == "torch"
    with pytest.raises(ModuleNotFoundError, match=r"pip install .*openvino"):
        FastExtractor(extractor, "openvino", 1000)


def test_a_graph_with_other_features_is_not_used(images, caplog):
    pytest.importorskip("openvino")

    class Moody(TwoLayers):
        def shift(self, images):
            return torch.full_like(images, float(torch.jit.is_tracing()))

    fast = FastExtractor(Moody(), "openvino", None)
    maps = fast(images)
    assert fast.name == "torch"
    assert "OpenVINO's differ by" in caplog.text
    assert torch.equal(maps["a"], images)


def test_mixed_precision_stays_with_torch(extractor, images):
    fast = FastExtractor(extractor, "openvino", None)
    with torch.autocast("cpu", torch.bfloat16):
        assert fast(images)["layer1"].dtype == torch.bfloat16
    assert fast.name == "torch"


def matmul_precisions():
    return [each.fp32_precision for each in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)]


@pytest.mark.parametrize("usual", ["highest", "high", "medium"])
def test_products_are_in_full_precision_whatever_torch_allows(usual):
    torch.set_float32_matmul_precision(usual)
    try:
        with full_precision(torch.ones(1)):
            assert torch.get_float32_matmul_precision() == "highest"
            assert not {"tf32", "bf16"}.intersection(matmul_precisions())
        assert torch.get_float32_matmul_precision() == usual
    finally:
        torch.set_float32_matmul_precision("highest")


def test_precision_by_torchs_newer_names_is_restored_too():
    torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision = "tf32", "bf16"
    try:
        with full_precision(torch.ones(1)):
            assert not {"tf32", "bf16"}.intersection(matmul_precisions())
        assert matmul_precisions() == ["tf32", "bf16"]
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("leaves_first", [0, 1])
def test_products_are_in_full_precision_until_the_last_thread_has_left(leaves_first):
    torch.set_float32_matmul_precision("medium")
    try:
        contexts = [full_precision(torch.ones(1)) for _ in range(2)]
        with ThreadPoolExecutor(1) as another:
            run = [lambda function: function(), lambda function: another.submit(function).result()]
            for index, context in enumerate(contexts):
                run[index](context.__enter__)
            for index in (leaves_first, 1 - leaves_first):
                assert matmul_precisions() == ["ieee", "ieee"]
                run[index](lambda: contexts[index].__exit__(None, None, None))  # noqa: B023 - it is called at once
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_autocast_is_suspended():
    with torch.autocast("cpu", torch.bfloat16), full_precision(torch.ones(1)):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
