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

    The functions of that module describe arguments and errors. The methods add two things. If ``export_root`` is the
    engine's default, the export goes to the folder of the run that trained the model. And the model is :meth:`frozen`
    while it is exported.
    """

    def frozen(self) -> AbstractContextManager[None]:
        """Hold the state that an exported file has; a model that learns from queries overrides it."""
        return nullcontext()

    def to_torch(self, export_root: Path | str, model_file_name: str = "model") -> Path:
        """Export to torch and check the file, see :func:`~anomalib_ot.export.exporters.export_torch`.

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
        """Export to ONNX and check the file, see :func:`~anomalib_ot.export.exporters.export_onnx`.

        Returns:
            Path of the ``.onnx`` file. ``dynamic_axes={}`` makes a graph for one image at a time.

        Raises:
            ValueError: If there is no ``input_size`` and the pre-processor does not resize.
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
        """Export to OpenVINO and check the files, see :func:`~anomalib_ot.export.exporters.export_openvino`.

        ``task`` is unused.

        Returns:
            Path of the ``.xml`` file.

        Raises:
            ValueError: If there is no ``input_size`` and the pre-processor does not resize, or an argument of the
                compression is missing or out of range.
            ModuleNotFoundError: If OpenVINO is not installed.
            ExportError: If the files differ from the model.
        """
        del task
        module, root = cast("AnomalibModule", self), self.own_export_root(export_root)
        with self.frozen():
            return export_openvino(
                module,
                root,
                model_file_name,
                input_size,
                compression=compression_type,
                datamodule=datamodule,
                metric=metric,
                max_drop=max_drop,
                ov_kwargs=ov_kwargs,
                onnx_kwargs=onnx_kwargs,
            )
