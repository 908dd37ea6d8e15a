"""Fast extraction of features with frozen networks, in full precision."""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.util import find_spec
from math import ceil
from typing import Literal

import torch
from anomalib.data.utils.tiler import ImageUpscaleMode, Tiler
from torch import Tensor, nn

from .process_switch import ProcessSwitch

logger = logging.getLogger(__name__)

FeatureMaps = dict[str, Tensor]
Extraction = Literal["auto", "torch", "openvino"]

# OpenVINO's setting for float32, which gives the same results as torch.
FLOAT32 = {"INFERENCE_PRECISION_HINT": "f32"}
# Number of images whose activations fit into the CPU's cache.
_PART = 8
# Smallest number of images for which building the OpenVINO graph, which takes a few seconds, saves time.
_MANY = 100
# Largest difference from torch's features, as a share of their range.
_SAME = 1e-3
# torch's settings for products of float32 matrices. It creates the second on import, which mypy does not see.
_PRODUCTS = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]


def is_traced() -> bool:
    """Whether the code is traced for export or compilation; it must not depend on the batch size then."""
    return is_exporting() or torch.compiler.is_compiling()


def is_exporting() -> bool:
    """Whether the code is traced for export; exported code computes scores only."""
    return torch.jit.is_tracing() or torch.compiler.is_exporting()


def extract_by_parts(extractor: nn.Module, images: Tensor) -> FeatureMaps:
    """Run a frozen extractor. On the CPU, run it on a few images at a time and in the fastest memory layout.

    Args:
        extractor: Maps images to the feature map of each layer.
        images: Pre-processed images (B, 3, h, w); they are converted to the dtype of the weights.

    Returns:
        Feature map (B, D, H, W) of each layer.
    """
    images = _as_weights(extractor, images)
    if images.device.type != "cpu" or is_traced():
        return extractor(images)
    parts = [extractor(part) for part in images.contiguous(memory_format=torch.channels_last).split(_PART)]
    return {layer: torch.cat([part[layer] for part in parts]) for layer in parts[0]}


def extract_by_tiles(extract: Callable[[Tensor], FeatureMaps], images: Tensor, tiler: Tiler | None) -> FeatureMaps:
    """Extract features tile by tile and join the maps, so that a large image needs the memory of a few tiles only.

    Each cell keeps its position in the image. Where tiles overlap, their features are averaged. The padding is removed;
    the tiler itself removes it from images only.

    Args:
        extract: Maps images to the feature map of each layer.
        images: Pre-processed images (B, 3, h, w).
        tiler: The tiler that anomalib's ``TilerConfigurationCallback`` sets; None extracts features of whole images.

    Returns:
        Feature map (B, D, H, W) of each layer.

    Raises:
        ValueError: If tiles do not start and end at cell borders, are larger than the images, or are resized instead of
            padded.
    """
    if tiler is None:
        return extract(images)
    if tiler.mode != ImageUpscaleMode.PADDING:
        msg = f"the tiler's mode must be padding, not {tiler.mode.value}, which would resize the features to pixels"
        raise ValueError(msg)
    tiles = tiler.tile(images)
    parts = [extract(part) for part in ([tiles] if is_traced() else tiles.split(_PART))]
    return {layer: _joined(torch.cat([part[layer] for part in parts]), layer, tiler) for layer in parts[0]}


def _joined(maps: Tensor, layer: str, tiler: Tiler) -> Tensor:
    """Feature maps (B, D, H, W) of a layer, joined from the maps of the tiles."""
    tile, stride = (tiler.tile_size_h, tiler.tile_size_w), (tiler.stride_h, tiler.stride_w)
    cells = maps.shape[-2:]
    steps = zip(stride, cells, tile, strict=True)
    # As the tiler computes it: it rounds down.
    if any(int(step * (each / size)) * size != step * each for step, each, size in steps):
        pixels = tuple(ceil(size / each) for size, each in zip(tile, cells, strict=True))
        msg = (
            f"tiles of {tile} pixels with stride {stride} do not start and end at the cells of layer {layer}, which "
            f"have about {pixels} pixels; set the tile size and the stride to multiples of the cells"
        )
        raise ValueError(msg)
    height, width = (
        ceil(size * each / whole) for size, each, whole in zip((tiler.input_h, tiler.input_w), cells, tile, strict=True)
    )
    return tiler.untile(maps)[..., :height, :width]


def full_precision(features: Tensor | FeatureMaps) -> AbstractContextManager:
    """Suspend autocast and all settings that make products of float32 matrices less precise.

    Distances are small differences of such products. ``torch.set_float32_matmul_precision("medium")`` allows bfloat16
    on a CPU with matrix units; this changed Foct's scores by 4 % of their range.

    Args:
        features: Operands of the computation, which define the device.

    Returns:
        The context for the computation. While the code is traced for export, it only suspends autocast.
    """
    first = features if isinstance(features, Tensor) else next(iter(features.values()))
    device = first.device.type
    # Without autocast there is nothing to suspend, and no context to trace for export.
    suspended = torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
    if is_exporting() or (torch.compiler.is_compiling() and not _are_products_less_precise()):
        return suspended
    return _with_exact_products(suspended)


# It cannot be traced. torch compiles the code again if the setting changes.
@torch.compiler.assume_constant_result
def _are_products_less_precise() -> bool:
    return not {"tf32", "bf16"}.isdisjoint(each.fp32_precision for each in _PRODUCTS)


@contextmanager
def _with_exact_products(context: AbstractContextManager) -> Iterator[None]:
    """Enter a context and compute products of float32 matrices in float32, whatever other threads set."""
    with _EXACT_PRODUCTS, context:
        yield


def _switch_to_exact_products() -> Callable[[], None] | None:
    if not _are_products_less_precise():
        return None
    before = [each.fp32_precision for each in _PRODUCTS]
    try:
        usual = torch.get_float32_matmul_precision()
    except RuntimeError:
        # torch has no name for the precision if the settings above were set one by one.
        usual = "highest"
    torch.set_float32_matmul_precision("highest")

    def undo() -> None:
        torch.set_float32_matmul_precision(usual)
        for each, precision in zip(_PRODUCTS, before, strict=True):
            each.fp32_precision = precision

    return undo


_EXACT_PRODUCTS = ProcessSwitch(_switch_to_exact_products)


class FastExtractor:
    """Runs a frozen extractor with OpenVINO if that is faster, or with torch.

    Args:
        extractor: Maps images to the feature map of each layer.
        choice: ``torch``, ``openvino`` or ``auto``. ``auto`` selects OpenVINO if it is installed, the images are
            float32 on the CPU, and there are at least 100 of them.
        count: Number of images to extract, or None if it is unknown.

    Raises:
        ModuleNotFoundError: If ``choice`` is ``openvino`` and OpenVINO is not installed.

    Attributes:
        name: ``openvino`` or ``torch``; None until the first images, unless ``choice`` is ``torch``.
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
        """Feature map (B, D, H, W) of each layer for pre-processed images (B, 3, h, w)."""
        images = _as_weights(self._extractor, images)
        if self.name is None:
            self.name = "torch"
            exact = images.dtype == torch.float32 and not torch.is_autocast_enabled(images.device.type)
            if self._wanted and images.device.type == "cpu" and exact:
                self._graph = self._compile(images[:2])
        return self._graph(images) if self._graph else extract_by_parts(self._extractor, images)

    def _compile(self, images: Tensor) -> Callable[[Tensor], FeatureMaps] | None:
        """The extractor as an OpenVINO graph, or None if its features differ from torch's."""
        import openvino  # noqa: PLC0415 - optional

        expected = extract_by_parts(self._extractor, images)
        try:
            model = openvino.convert_model(self._extractor, example_input=images)
            compiled = openvino.compile_model(model, "CPU", FLOAT32)
        except Exception as error:  # noqa: BLE001 - torch can run all that OpenVINO cannot convert
            logger.info("Extracting features with torch: OpenVINO does not support the backbone (%s).", error)
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
    """Images in the dtype of the extractor's weights, if it has any."""
    return images.to(next(extractor.parameters(), images).dtype)
