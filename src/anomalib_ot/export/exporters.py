"""Functions that export a module and return the path of a checked file.

Each of them writes the files into a staging folder, runs them, compares them with the module in torch, and then
publishes them together with a report. A file that differs from torch is an error.

=================  =========================================================================================
file               limit
=================  =========================================================================================
torch              maps and scores differ by at most 1e-5 of the maps' range
ONNX, FP32         at most 1e-3 of the range
FP16               at most 1e-2 of the range
all INT8 types     neither image nor pixel AUROC falls by more than 0.2 points; if neither can be computed,
                   the rank correlation of the maps' pixels is at least 0.99
=================  =========================================================================================

Labels and masks may differ from torch's only within the limit of the threshold; in INT8, as far as the differences of
maps and scores explain.

An export that exceeds its limit raises :class:`~anomalib_ot.export.tolerance.ExportError` and leaves no file. The files
of an earlier export stay unchanged. :mod:`~anomalib_ot.export.staging` says what happens to other files of the same
names. :mod:`~anomalib_ot.export.report` describes the report.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from anomalib.data import AnomalibDataModule
from anomalib.deploy import CompressionType, ExportType
from anomalib.models.components import AnomalibModule
from anomalib.models.components.base.export_mixin import ExportMixin
from anomalib.pre_processing import PreProcessor
from torch import nn
from torchmetrics import Metric

from anomalib_ot.settings import require

from .graphs import compress
from .parity import run_exported_module
from .report import check, check_graph, log_result
from .staging import published, staged, weights_folder
from .tolerance import SameOrder, SameValues
from .trial_images import synthetic_images, validation_images

logger = logging.getLogger(__name__)

# The same code on the same numbers.
_EXACT = SameValues(1e-5)
# Other kernels add in another order: at most 2e-6 in our measurements, more where features cancel.
_FLOAT32 = SameValues(1e-3)
# Half precision has eleven significant bits: at most 4e-3 in our measurements.
_FLOAT16 = SameValues(1e-2)
# Eight bits move every value, but rarely the order.
_INT8 = SameOrder()
_TOLERANCES = {None: _FLOAT32, CompressionType.FP16: _FLOAT16}
_CALIBRATED = (CompressionType.INT8_PTQ, CompressionType.INT8_ACQ)
# The highest opset that the exporter writes without a conversion. The conversion fails at a padding.
_OPSET = 18


def export_torch(module: AnomalibModule, root: Path | str, name: str = "model") -> Path:
    """Export a module to torch, and check the file on noise.

    Args:
        module: The module.
        root: Folder of the export; the file goes to ``weights/torch`` in it.
        name: Name of the file.

    Returns:
        Path of the ``.pt`` file. It is a pickle: load it only if you trust its source.

    Raises:
        ExportError: If the file differs from the module.
    """
    images = synthetic_images(_size_of(module) or (256, 256))
    with staged(root, ExportType.TORCH) as folder:
        # The host's own function: the module's method would call this one again.
        with _resizing_as_trained(module.pre_processor):
            path = ExportMixin.to_torch(module, folder, name)
        # This process has just written it, so it is safe to unpickle.
        loaded = torch.load(path, weights_only=False)["model"].eval()
        check(module, path, {"float32": run_exported_module(loaded)}, _EXACT, images, {"format": "torch"})
    return _finished(root, path)


def export_onnx(
    module: AnomalibModule,
    root: Path | str,
    name: str = "model",
    input_size: tuple[int, int] | None = None,
    **kwargs: Any,
) -> Path:
    """Export a module to ONNX, and check the file in OpenVINO on noise.

    Args:
        module: The module.
        root: Folder of the export; the file goes to ``weights/onnx`` in it.
        name: Name of the file.
        input_size: Height and width of the images. The default is the size that the pre-processor resizes to.
        **kwargs: Arguments of anomalib's ``to_onnx``. ``dynamic_axes={}`` fixes the batch size at one image.

    Returns:
        Path of the ``.onnx`` file.

    Raises:
        ValueError: If ``input_size`` is missing and the pre-processor does not resize.
        ModuleNotFoundError: If OpenVINO is not installed.
        ExportError: If the file differs from the module.
    """
    images = synthetic_images(graph_size(module, input_size))
    require_openvino()
    with staged(root, ExportType.ONNX) as folder:
        path = write_onnx(module, folder, name, images.size, **kwargs)
        check_graph(module, path, _FLOAT32, images, {"format": "onnx"})
    return _finished(root, path)


def export_openvino(
    module: AnomalibModule,
    root: Path | str,
    name: str = "model",
    input_size: tuple[int, int] | None = None,
    *,
    compression: CompressionType | None = None,
    datamodule: AnomalibDataModule | None = None,
    metric: Metric | None = None,
    max_drop: float = 0.01,
    ov_kwargs: dict[str, Any] | None = None,
    onnx_kwargs: dict[str, Any] | None = None,
    onnx: Path | None = None,
) -> Path:
    """Export a module to OpenVINO, and check the file.

    Args:
        module: The module.
        root: Folder of the export; the files go to ``weights/openvino`` in it.
        name: Name of the files.
        input_size: Height and width of the images. The default is the size that the pre-processor resizes to.
        compression: ``FP16``, ``INT8``, ``INT8_PTQ`` or ``INT8_ACQ``, see :func:`~anomalib_ot.export.graphs.compress`.
            The default is FP32.
        datamodule: Data module whose validation images the file is checked on. PTQ and ACQ calibrate on them. Without a
            data module, the file is checked on noise.
        metric: Metric that ACQ measures. The default is anomalib's image F1 score.
        max_drop: Largest fall of the metric that ACQ allows, in [0, 1].
        ov_kwargs: Arguments of ``openvino.convert_model``.
        onnx_kwargs: Arguments of anomalib's ``to_onnx``, as in :func:`export_onnx`.
        onnx: An ONNX file from :func:`write_onnx` for several exports. By default, one is written, which takes most of
            the time.

    Returns:
        Path of the ``.xml`` file.

    Raises:
        ValueError: If ``input_size`` is missing and the pre-processor does not resize, if PTQ or ACQ gets no data
            module, or if ``max_drop`` is out of its range.
        ModuleNotFoundError: If OpenVINO is not installed.
        ExportError: If the file differs from the module.
    """
    compression = CompressionType(compression) if compression else None
    size = graph_size(module, input_size)
    require_openvino()
    _require_calibration(compression, datamodule, max_drop)
    import openvino  # noqa: PLC0415 - optional

    images = validation_images(datamodule, size) if datamodule else synthetic_images(size)
    with staged(root, ExportType.OPENVINO) as folder:
        path = weights_folder(folder, ExportType.OPENVINO) / f"{name}.xml"
        # The graph may read its weights from the ONNX file until it is saved.
        with TemporaryDirectory() as onnx_folder:
            onnx = onnx or write_onnx(module, onnx_folder, name, size, **(onnx_kwargs or {}))
            graph = openvino.convert_model(onnx, **(ov_kwargs or {}))
            graph = compress(graph, compression, images, metric, max_drop)
            openvino.save_model(graph, path, compress_to_fp16=compression == CompressionType.FP16)
        details = {"format": "openvino", "compression": compression.value if compression else "fp32"}
        check_graph(module, path, _TOLERANCES.get(compression, _INT8), images, details)
    return _finished(root, path)


def write_onnx(module: AnomalibModule, root: Path | str, name: str, size: tuple[int, int], **kwargs: Any) -> Path:
    """Write an unchecked ONNX file with the host's own function; the module's method would check it.

    Args:
        module: The module.
        root: Folder of the export; the file goes to ``weights/onnx`` in it.
        name: Name of the file.
        size: Height and width of the images, see :func:`graph_size`.
        **kwargs: Arguments of anomalib's ``to_onnx``, as in :func:`export_onnx`.

    Returns:
        Path of the file.
    """
    kwargs.setdefault("opset_version", _OPSET)
    with _without_steps_of_the_exporter(), _out_of_place(module):
        return ExportMixin.to_onnx(module, root, name, size, **kwargs)


def _finished(root: Path | str, staged_file: Path) -> Path:
    """Log the result of the check, and return where the staged file is now."""
    path = published(root, staged_file)
    log_result(path)
    return path


def _size_of(module: AnomalibModule) -> tuple[int, int] | None:
    """Height and width that the pre-processor resizes to, None if it does not resize."""
    size = module.input_size
    return None if size is None else (int(size[0]), int(size[1]))


def graph_size(module: AnomalibModule, input_size: tuple[int, int] | None = None) -> tuple[int, int]:
    """Height and width of a graph's images, which are fixed because the models score each cell of the feature map.

    Args:
        module: The module.
        input_size: Height and width. The default is the size that the pre-processor resizes to.

    Returns:
        Height and width.

    Raises:
        ValueError: If ``input_size`` is missing and the pre-processor does not resize.
    """
    if input_size is not None:
        return int(input_size[0]), int(input_size[1])
    size = _size_of(module)
    if size is None:
        msg = (
            f"the exported graph of {type(module).__name__} has a fixed image size, because the model knows what is "
            "normal for each cell of the feature map. Got no input_size, and its pre-processor does not resize: give "
            "input_size=(HEIGHT, WIDTH), or --input_size '[HEIGHT, WIDTH]'. The batch size may be dynamic."
        )
        raise ValueError(msg)
    logger.info("The exported graph takes images of %d x %d px; --input_size sets another size.", *size)
    return size


def require_openvino() -> None:
    """Check that OpenVINO is installed.

    Raises:
        ModuleNotFoundError: If it is not.
    """
    if find_spec("openvino") is None:
        msg = 'exports are checked in OpenVINO, which is not installed; run: pip install "anomalib-ot[openvino]"'
        raise ModuleNotFoundError(msg)


def _require_calibration(
    compression: CompressionType | None, datamodule: AnomalibDataModule | None, max_drop: float
) -> None:
    """Refuse arguments that quantization cannot use, before the export starts."""
    if compression in _CALIBRATED and datamodule is None:
        msg = (
            f"{compression.name} is calibrated on validation images, got no data module: give datamodule, or --data on "
            "the command line, or use INT8, which needs no images"
        )
        raise ValueError(msg)
    if compression == CompressionType.INT8_ACQ:
        require(0 <= max_drop <= 1, "max_drop", "in [0, 1]", max_drop)


@contextmanager
def _resizing_as_trained(pre_processor: nn.Module | None) -> Iterator[None]:
    """Let an exported module resize as the model does; the host's transform for graphs has no filter."""
    if not isinstance(pre_processor, PreProcessor):
        yield
        return
    for_graphs = pre_processor.export_transform
    pre_processor.export_transform = pre_processor.transform
    try:
        yield
    finally:
        pre_processor.export_transform = for_graphs


@contextmanager
def _out_of_place(module: nn.Module) -> Iterator[None]:
    """Let activations make new tensors: the exporter takes three times as long to decompose ReLU6 in place."""
    in_place: list[Any] = [each for each in module.modules() if getattr(each, "inplace", False) is True]
    for each in in_place:
        each.inplace = False
    try:
        yield
    finally:
        for each in in_place:
            each.inplace = True


@contextmanager
def _without_steps_of_the_exporter() -> Iterator[None]:
    """Keep the ONNX exporter's messages about each node out of the log: 100 kB, which would hide ours."""
    loggers = [logging.getLogger(name) for name in ("onnx_ir", "onnxscript")]
    # A level that somebody has set asks for these messages.
    silenced = [each for each in loggers if each.level == logging.NOTSET]
    for each in silenced:
        each.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for each in silenced:
            each.setLevel(logging.NOTSET)
