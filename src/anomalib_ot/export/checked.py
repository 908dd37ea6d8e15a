"""Exports that cannot drift: each file is run and compared with torch before anyone gets it."""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from anomalib import TaskType
from anomalib.data import AnomalibDataModule
from anomalib.deploy import CompressionType, ExportType
from anomalib.metrics import F1Score
from anomalib.models.components.base.export_mixin import ExportMixin
from anomalib.pre_processing import PreProcessor
from torch import nn
from torchmetrics import Metric

from anomalib_ot.features.extraction import FLOAT32

from .graphs import GraphRunner, compress_weights, halved, quantize, quantize_with_accuracy_control
from .parity import ExportError, Normalization, Runner, SameOrder, SameValues, compare, run_exported_module
from .staging import REPORT, final, staged
from .trial_pictures import TrialPictures, synthetic_pictures, validation_pictures

if TYPE_CHECKING:
    import openvino
    from anomalib.models.components import AnomalibModule

    from anomalib_ot.host.run_folder import RunFolder

logger = logging.getLogger(__name__)

# The same code on the same numbers.
_EXACT = SameValues(1e-5)
# Other kernels add up in another order; 2e-6 at the most in what was measured, more where features cancel.
_FLOAT32 = SameValues(1e-3)
# Half precision has eleven bits: 4e-3 at the most in what was measured.
_FLOAT16 = SameValues(1e-2)
# Eight bits move each value, but seldom an order.
_INT8 = SameOrder()
# The highest opset that the exporter writes without a conversion, which fails at a padding.
_OPSET = 18


class CheckedExport(ExportMixin):
    """Export of a Lightning model to torch, ONNX and OpenVINO, where a file that differs from torch is an error.

    Beside the model's file lies a report, ``<model_file_name>.parity.json``: which pictures were tried, the largest
    difference of maps and scores as a share of the range of torch's maps (on these pictures or in the model's
    validation, the wider), and the image and pixel AUROC before and after, in float32 and at OpenVINO's own precision,
    which is bfloat16 on processors that have it. Judged is what is computed in float32. The pictures are those of the
    validation set where there is a data module, else noise.

    Up to FP16, maps and scores must be as torch's; in INT8, neither AUROC may fall by more than 0.2 points, or, where
    it cannot be computed, the rank correlation of the maps' pixels be below 0.99. Otherwise the export raises
    :class:`ExportError` and leaves no file; one from an earlier export stays as it was. Files of the same names that no
    export of this package wrote are never replaced: they get a name with ``earlier``.

    Weights after the backbone, which take most of the space, are stored in eight bits by all of INT8, INT8_PTQ and
    INT8_ACQ, and those of the backbone in half precision or, by the latter two, in eight bits and computed so.
    """

    pre_processor: Any
    _is_checked_later = False

    def frozen(self) -> AbstractContextManager[None]:
        """The state that an exported model is in."""
        return nullcontext()

    def to_torch(self, export_root: Path | str, model_file_name: str = "model") -> Path:
        """Export to torch, and check the file.

        Args:
            export_root: Folder of the export; that of the model's run in the place of the engine's default.
            model_file_name: Name of the file.

        Returns:
            Path of the ``.pt`` file. It is a pickle: whoever loads it must trust where it is from.

        Raises:
            ExportError: If the file differs from the model.
        """
        export_root = self._root(export_root)
        with self.frozen(), staged(export_root, ExportType.TORCH) as folder:
            with _resizing_as_trained(self.pre_processor):
                path = super().to_torch(folder, model_file_name)
            # Just written here, so it is safe to unpickle.
            loaded = torch.load(path, weights_only=False)["model"].eval()
            runners = {"float32": run_exported_module(loaded)}
            self._check(path, runners, _EXACT, synthetic_pictures(self._own_size()), {"format": "torch"})
        return _handed_over(export_root, path)

    def to_onnx(
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> Path:
        """Export to ONNX, and check the file in OpenVINO.

        Args:
            export_root: Folder of the export; that of the model's run in the place of the engine's default.
            model_file_name: Name of the file.
            input_size: Height and width of the images; what the pre-processor resizes to by default.
            **kwargs: As the host's. ``dynamic_axes={}`` makes a graph of one image at a time.

        Returns:
            Path of the ``.onnx`` file.

        Raises:
            ValueError: If there is no ``input_size`` and the pre-processor does not resize.
            ModuleNotFoundError: If OpenVINO is not installed.
            ExportError: If the file differs from the model.
        """
        size = self._size(input_size)
        kwargs.setdefault("opset_version", _OPSET)
        if self._is_checked_later:
            with _without_steps_of_the_exporter():
                return super().to_onnx(export_root, model_file_name, size, **kwargs)
        _require_openvino()
        export_root = self._root(export_root)
        with self.frozen(), staged(export_root, ExportType.ONNX) as folder:
            with _without_steps_of_the_exporter():
                path = super().to_onnx(folder, model_file_name, size, **kwargs)
            self._check_graph(path, _FLOAT32, synthetic_pictures(size), {"format": "onnx"})
        return _handed_over(export_root, path)

    def to_openvino(
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        compression_type: CompressionType | None = None,
        datamodule: AnomalibDataModule | None = None,
        metric: Metric | None = None,
        task: TaskType | None = None,
        max_drop: float = 0.01,
        ov_kwargs: dict[str, Any] | None = None,
        onnx_kwargs: dict[str, Any] | None = None,
    ) -> Path:
        """Export to OpenVINO, and check the file.

        Args:
            export_root: Folder of the export; that of the model's run in the place of the engine's default.
            model_file_name: Name of the file.
            input_size: Height and width of the images; what the pre-processor resizes to by default.
            compression_type: ``FP16``, ``INT8``, ``INT8_PTQ`` or ``INT8_ACQ``; FP32 by default.
            datamodule: Its validation set is what the file is checked on, and what PTQ and ACQ calibrate with.
            metric: What ACQ measures; the host's image F1 score by default.
            task: Unused.
            max_drop: Largest fall of the metric that ACQ allows.
            ov_kwargs: For ``openvino.convert_model``.
            onnx_kwargs: For :meth:`to_onnx`.

        Returns:
            Path of the ``.xml`` file.

        Raises:
            ValueError: If there is no ``input_size`` and the pre-processor does not resize, or no data module where one
                is needed.
            ModuleNotFoundError: If OpenVINO is not installed.
            ExportError: If the file differs from the model.
        """
        size = self._size(input_size)
        _require_openvino()
        pictures = validation_pictures(datamodule, size) if datamodule else synthetic_pictures(size)
        tolerance = {None: _FLOAT32, CompressionType.FP16: _FLOAT16}.get(compression_type, _INT8)
        export_root = self._root(export_root)
        with self.frozen(), staged(export_root, ExportType.OPENVINO) as folder, self._checking_later():
            path = super().to_openvino(
                folder,
                model_file_name,
                size,
                compression_type,
                datamodule,
                metric,
                task,
                max_drop,
                ov_kwargs,
                onnx_kwargs,
            )
            compression = getattr(compression_type, "value", "fp32")
            self._check_graph(path, tolerance, pictures, {"format": "openvino", "compression": compression})
        return _handed_over(export_root, path)

    def _root(self, export_root: Path | str) -> Path:
        return cast("RunFolder", self).own_export_root(export_root)

    def _size(self, input_size: tuple[int, int] | None) -> tuple[int, int]:
        """Height and width of an export's pictures, fixed as the model knows what is normal cell by cell."""
        if input_size is not None:
            return int(input_size[0]), int(input_size[1])
        if cast("AnomalibModule", self).input_size is None:
            msg = (
                f"{type(self).__name__} knows what is normal cell by cell, so that its graph has a fixed size, and its "
                "pre-processor does not resize: give input_size=(HEIGHT, WIDTH), or --input_size '[HEIGHT, WIDTH]'. "
                "The batch may be dynamic."
            )
            raise ValueError(msg)
        size = self._own_size()
        logger.info("The exported graph takes pictures of %d x %d px; --input_size sets another size.", *size)
        return size

    def _own_size(self) -> tuple[int, int]:
        """Height and width that the pre-processor resizes to, or a common one where it does not."""
        size = cast("AnomalibModule", self).input_size or (256, 256)
        return int(size[0]), int(size[1])

    @contextmanager
    def _checking_later(self) -> Iterator[None]:
        self._is_checked_later = True
        try:
            yield
        finally:
            del self._is_checked_later

    def _compress_ov_model(
        self,
        model: "openvino.Model",
        compression_type: CompressionType | None = None,
        datamodule: AnomalibDataModule | None = None,
        metric: Metric | None = None,
        task: TaskType | None = None,
        max_drop: float = 0.01,
    ) -> "openvino.Model":
        """Quantize what bears it, calibrated on pictures as the file will get them."""
        if compression_type == CompressionType.INT8:
            return compress_weights(halved(model))
        if compression_type is None or datamodule is None:
            return super()._compress_ov_model(model, compression_type, datamodule, metric, task, max_drop)
        height, width = (side.get_length() for side in list(model.input(0).partial_shape)[2:])
        pictures = validation_pictures(datamodule, (height, width))
        model = compress_weights(halved(model))
        if compression_type == CompressionType.INT8_PTQ:
            return quantize(model, pictures)
        return quantize_with_accuracy_control(
            model, pictures, metric or F1Score(fields=["pred_label", "gt_label"]), max_drop
        )

    def _check_graph(
        self, path: Path, tolerance: SameValues | SameOrder, pictures: TrialPictures, details: dict[str, Any]
    ) -> None:
        clipped = Normalization(cast("AnomalibModule", self).post_processor).clipped
        graphs = {"float32": GraphRunner(path, FLOAT32, clipped), "default": GraphRunner(path, {}, clipped)}
        details |= {"batch_size": graphs["float32"].batch_size, "default_precision": graphs["default"].precision}
        self._check(path, graphs, tolerance, pictures, details)

    def _check(
        self,
        path: Path,
        runners: Mapping[str, Runner],
        tolerance: SameValues | SameOrder,
        pictures: TrialPictures,
        details: Mapping[str, Any],
    ) -> None:
        """Compare what an exported file says with torch, and leave a report beside it.

        Raises:
            ExportError: If it is out of tolerance.
        """
        module = cast("AnomalibModule", self)
        module.eval()
        batch_size = details.get("batch_size")
        reference, measured = compare(module, runners, pictures, batch_size)
        broken = tolerance.broken_by(measured["float32"], reference)
        sizes = {each.name: each.stat().st_size for each in sorted(path.parent.iterdir())}
        report = {
            "model": type(self).__name__,
            **details,
            "input_size": pictures.size,
            "bytes": sizes,
            "pictures": {"source": pictures.source, "count": len(pictures)},
            "tolerance": asdict(tolerance),
            "torch": reference,
            **measured,
            "versions": {name: version(name) for name in _PACKAGES if find_spec(name.replace("-", "_"))},
        }
        if broken:
            msg = (
                f"the exported {path.name} does not say what the model in torch says, on {len(pictures)} pictures "
                f"({pictures.source}): {'; '.join(broken)}. No file was left. {_WAY_OUT}"
            )
            raise ExportError(msg)
        path.with_name(f"{path.stem}{REPORT}").write_text(json.dumps(report, indent=1))


@contextmanager
def _resizing_as_trained(pre_processor: nn.Module | None) -> Iterator[None]:
    """Let an exported module resize as the model does; the host's way for graphs, without a filter, moves scores."""
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
def _without_steps_of_the_exporter() -> Iterator[None]:
    """Keep what the ONNX exporter does at each node out of the log: 100 kB, in which our lines would be lost."""
    loggers = [logging.getLogger(name) for name in ("onnx_ir", "onnxscript")]
    # Whoever set a level wants to see them.
    silenced = [each for each in loggers if each.level == logging.NOTSET]
    for each in silenced:
        each.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for each in silenced:
            each.setLevel(logging.NOTSET)


_PACKAGES = ("anomalib-ot", "anomalib", "torch", "openvino", "nncf")
_WAY_OUT = (
    "Export with less compression (FP16, or none), give a data module with more validation pictures, or an input_size "
    "of the size that the model resizes to."
)


def _require_openvino() -> None:
    if find_spec("openvino") is None:
        msg = 'exports are checked in OpenVINO, which is not installed; run: pip install "anomalib-ot[openvino]"'
        raise ModuleNotFoundError(msg)


def _handed_over(export_root: Path | str, staged_file: Path) -> Path:
    """Where a staged file has gone, which the log says in a line."""
    path = final(export_root, staged_file)
    report = path.with_name(f"{path.stem}{REPORT}")
    content = json.loads(report.read_text())
    logger.info(
        "Checked the export %s: maps differ from torch's by at most %.1e of their range, scores by %.1e, on %d "
        "pictures (%s). The report is %s.",
        path,
        content["float32"]["map_difference"],
        content["float32"]["score_difference"],
        content["pictures"]["count"],
        content["pictures"]["source"],
        report,
    )
    return path
