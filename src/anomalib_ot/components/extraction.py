"""Frozen features at the machine's speed."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

FeatureMaps = dict[str, Tensor]
Extraction = Literal["auto", "torch", "openvino"]

# OpenVINO's setting with which it gives what torch gives.
FLOAT32 = {"INFERENCE_PRECISION_HINT": "f32"}
# Images whose activations stay in a processor's cache.
_PART = 8
# Images from which on building the OpenVINO graph, a few seconds, pays.
_MANY = 100
_SAME = 1e-3


def is_exporting() -> bool:
    """Whether the code is being traced for export, so that it must not depend on the size of the batch."""
    return torch.jit.is_tracing() or torch.compiler.is_compiling() or torch.compiler.is_exporting()


def extract_by_parts(extractor: nn.Module, images: Tensor) -> FeatureMaps:
    """Run a frozen extractor; on the CPU a few images at a time and in the memory layout that its kernels prefer.

    Args:
        extractor: Maps images to the feature map of each layer.
        images: (B, 3, h, w), pre-processed; they are brought to the type of the weights.

    Returns:
        Feature map (B, D, H, W) of each layer.
    """
    images = _as_weights(extractor, images)
    if images.device.type != "cpu" or is_exporting():
        return extractor(images)
    parts = [extractor(part) for part in images.contiguous(memory_format=torch.channels_last).split(_PART)]
    return {layer: torch.cat([part[layer] for part in parts]) for layer in parts[0]}


def full_precision(features: FeatureMaps) -> AbstractContextManager:
    """Suspend autocast. Where there is none there is nothing to suspend, nor to trace for export."""
    device = next(iter(features.values())).device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


class FastExtractor:
    """A frozen extractor in the fastest form there is: an OpenVINO graph where that pays, else torch.

    Args:
        extractor: Maps images to the feature map of each layer.
        choice: ``torch``; ``openvino``; or ``auto`` for OpenVINO where it is installed, the images are float32 on the
            CPU and there are a hundred or more of them.
        count: Number of images to come, or None where it is not known.

    Raises:
        ModuleNotFoundError: If OpenVINO is asked for and not installed.

    Attributes:
        name: ``openvino`` or ``torch``, known with the first images.
    """

    def __init__(self, extractor: nn.Module, choice: Extraction, count: int | None) -> None:
        if choice == "openvino" and find_spec("openvino") is None:
            msg = 'OpenVINO is not installed; run: pip install "anomalib-ot[openvino]"'
            raise ModuleNotFoundError(msg)
        self.name: str | None = "torch" if choice == "torch" else None
        self._extractor = extractor
        self._wanted = choice == "openvino" or (
            find_spec("openvino") is not None and count is not None and count >= _MANY
        )
        self._graph: Callable[[Tensor], FeatureMaps] | None = None

    @torch.no_grad()
    def __call__(self, images: Tensor) -> FeatureMaps:
        """Feature map (B, D, H, W) of each layer for images (B, 3, h, w), pre-processed."""
        images = _as_weights(self._extractor, images)
        if self.name is None:
            self.name = "torch"
            exact = images.dtype == torch.float32 and not torch.is_autocast_enabled(images.device.type)
            if self._wanted and images.device.type == "cpu" and exact:
                self._graph = self._compile(images[:2])
        return self._graph(images) if self._graph else extract_by_parts(self._extractor, images)

    def _compile(self, images: Tensor) -> Callable[[Tensor], FeatureMaps] | None:
        """The extractor as an OpenVINO graph, if that gives the same features."""
        import openvino  # noqa: PLC0415 - optional

        expected = extract_by_parts(self._extractor, images)
        try:
            model = openvino.convert_model(self._extractor, example_input=images)
            compiled = openvino.compile_model(model, "CPU", FLOAT32)
        except Exception as error:  # noqa: BLE001 - whatever OpenVINO cannot convert, torch can still run
            logger.info("Extracting features with torch: OpenVINO cannot take the backbone (%s).", error)
            return None

        def extract(images: Tensor) -> FeatureMaps:
            maps = compiled(images.numpy()).values()
            return {layer: torch.from_numpy(each).clone() for layer, each in zip(expected, maps, strict=True)}

        difference = max(
            float((maps - expected[layer]).abs().max() / expected[layer].abs().max().clamp(min=1e-12))
            for layer, maps in extract(images).items()
        )
        if not difference <= _SAME:
            logger.warning("Extracting features with torch: OpenVINO's differ by %.1e of their range.", difference)
            return None
        logger.info("Extracting features with OpenVINO; they differ from torch's by %.1e of their range.", difference)
        self.name = "openvino"
        return extract


def _as_weights(extractor: nn.Module, images: Tensor) -> Tensor:
    """Images in the type of the weights, where there are any."""
    return images.to(next(extractor.parameters(), images).dtype)
