"""The export methods of a Lightning model, as anomalib's ``Engine.export`` calls them."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from anomalib import TaskType
from anomalib.data import AnomalibDataModule
from anomalib.deploy import CompressionType
from torchmetrics import Metric

from anomalib_ot.host.run_folder import RunFolder

from .exporters import export_onnx, export_openvino, export_torch

if TYPE_CHECKING:
    from anomalib.models.components import AnomalibModule


class CheckedExport(RunFolder):
    """Part of a Lightning model that exports it with the checks of :mod:`anomalib_ot.export.exporters`.

    The export goes to the folder of the run that trained the model, unless the caller names another one.
    """

    def frozen(self) -> AbstractContextManager[None]:
        """Hold the state that an exported file has; a model that learns from queries overrides it."""
        return nullcontext()

    def to_torch(self, export_root: Path | str, model_file_name: str = "model") -> Path:
        """Export to torch, and check the file.

        Args:
            export_root: Folder of the export. The run's folder replaces the engine's default.
            model_file_name: Name of the file.

        Returns:
            Path of the ``.pt`` file. It is a pickle: load it only if you trust its source.

        Raises:
            ExportError: If the file differs from the model.
        """
        with self.frozen():
            return export_torch(cast("AnomalibModule", self), self.own_export_root(export_root), model_file_name)

    def to_onnx(
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> Path:
        """Export to ONNX, and check the file in OpenVINO.

        Args:
            export_root: Folder of the export. The run's folder replaces the engine's default.
            model_file_name: Name of the file.
            input_size: Height and width of the images. The default is the size that the pre-processor resizes to.
            **kwargs: Arguments of anomalib's ``to_onnx``. ``dynamic_axes={}`` fixes the batch size at one image.

        Returns:
            Path of the ``.onnx`` file.

        Raises:
            ValueError: If ``input_size`` is missing and the pre-processor does not resize.
            ModuleNotFoundError: If OpenVINO is not installed.
            ExportError: If the file differs from the model.
        """
        module, root = cast("AnomalibModule", self), self.own_export_root(export_root)
        with self.frozen():
            return export_onnx(module, root, model_file_name, input_size, **kwargs)

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
            export_root: Folder of the export. The run's folder replaces the engine's default.
            model_file_name: Name of the file.
            input_size: Height and width of the images. The default is the size that the pre-processor resizes to.
            compression_type: ``FP16``, ``INT8``, ``INT8_PTQ`` or ``INT8_ACQ``. The default is FP32.
            datamodule: Data module whose validation images the file is checked on. PTQ and ACQ calibrate on them.
            metric: Metric that ACQ measures. The default is anomalib's image F1 score.
            task: Unused.
            max_drop: Largest fall of the metric that ACQ allows.
            ov_kwargs: Arguments of ``openvino.convert_model``.
            onnx_kwargs: Arguments of anomalib's ``to_onnx``, as in :meth:`to_onnx`.

        Returns:
            Path of the ``.xml`` file.

        Raises:
            ValueError: If ``input_size`` is missing and the pre-processor does not resize, or if PTQ or ACQ gets no
                data module.
            ModuleNotFoundError: If OpenVINO is not installed.
            ExportError: If the file differs from the model.
        """
        del task
        module, root = cast("AnomalibModule", self), self.own_export_root(export_root)
        with self.frozen():
            return export_openvino(
                module,
                root,
                model_file_name,
                input_size,
                compression_type,
                datamodule,
                metric,
                max_drop,
                ov_kwargs,
                onnx_kwargs,
            )
