"""Exported graphs in OpenVINO: run them, and compress them where accuracy permits it."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from anomalib.data import ImageBatch, InferenceBatch
from anomalib.deploy import CompressionType
from anomalib.metrics import F1Score
from torch import Tensor

from .trial_images import TrialBatch, TrialImages

if TYPE_CHECKING:
    import nncf
    import openvino
    from torchmetrics import Metric

_BACKBONE = "feature_extractor"
# Operations between an output and the one that clips or compresses it: the switch for normalisation, or arithmetic.
_STEPS = {
    "Clamp": {"Result", "Select", "Convert"},
    "Abs": {"Result", "Convert", "Add", "Multiply", "Divide", "Power"},
}


class GraphRunner:
    """An exported graph on the CPU. It returns maps and scores before the post-processor clips or compresses them.

    Labels and masks are those of the graph, None if it has none.

    Args:
        path: An ``.xml`` or ``.onnx`` file.
        precision: OpenVINO's settings of the precision. If empty, OpenVINO chooses.
        clipped: Names of the outputs that the graph clips or compresses.
        operation: The operation that does it, ``Clamp``, or that is its first step, ``Abs``.

    Attributes:
        batch_size: Images per call, None for a dynamic batch.
        precision: Precision in which OpenVINO computes operations that are not quantized.
    """

    def __init__(self, path: Path, precision: dict[str, str], clipped: Sequence[str], operation: str = "Clamp") -> None:
        import openvino  # noqa: PLC0415 - optional

        # Conversion also turns ONNX's operation Clip into OpenVINO's Clamp.
        model = openvino.convert_model(path) if path.suffix == ".onnx" else openvino.Core().read_model(path)
        self._indices = {
            name: index
            for name in ("anomaly_map", "pred_score", "pred_label", "pred_mask")
            if (index := _index(model, name)) is not None
        }
        for name in clipped:
            unclipped = _before(operation, model.output(name))
            self._indices[name] = len(model.outputs)
            model.add_outputs(unclipped)
        self._compiled = openvino.compile_model(model, "CPU", precision)
        self.batch_size = fixed_batch_size(model)
        self.precision = self._compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()

    def __call__(self, images: Tensor) -> InferenceBatch:
        """Return anomaly maps and masks (B, 1, h, w), scores and labels (B,) of images (B, 3, h, w) in [0, 1]."""
        results = self._compiled(images.cpu().numpy()).to_tuple()
        return InferenceBatch(
            **{name: torch.from_numpy(results[index].copy()) for name, index in self._indices.items()}
        )


def _index(model: "openvino.Model", name: str) -> int | None:
    return next((index for index, output in enumerate(model.outputs) if name in output.names), None)


def _before(operation: str, output: Any) -> Any:
    """The input of the operation that clips or compresses an output, found behind the steps that follow it."""
    pending = [output.get_node()]
    while pending:
        node = pending.pop(0)
        if node.get_type_name() == operation:
            return node.input_value(0)
        if node.get_type_name() in _STEPS[operation]:
            pending += [each.get_source_output().get_node() for each in node.inputs()]
    msg = (
        f"the output {output.any_name} of the graph has no {operation} operation, expected that of the "
        "post-processor; use anomalib's, or one with enable_normalization=False"
    )
    raise ValueError(msg)


def fixed_batch_size(model: "openvino.Model") -> int | None:
    """Images that a graph takes per call, None for a dynamic batch."""
    batch = model.input(0).partial_shape[0]
    return batch.get_length() if batch.is_static else None


def compress(
    graph: "openvino.Model",
    compression: CompressionType | None,
    images: TrialImages,
    metric: "Metric | None",
    max_drop: float,
) -> "openvino.Model":
    """Compress a graph before it is saved. FP16 needs nothing here, because OpenVINO rounds while it saves.

    All INT8 types store the weights after the backbone, which take most of the space, in INT8. ``INT8`` stores the
    backbone's weights in FP16. ``INT8_PTQ`` and ``INT8_ACQ`` also run convolutions of the backbone in INT8.

    Args:
        graph: The graph, in FP32.
        compression: Type of compression, None for FP32.
        images: Images that PTQ and ACQ calibrate on, at the size of the graph.
        metric: Metric that ACQ measures. The default is anomalib's image F1 score.
        max_drop: Largest fall of the metric that ACQ allows.

    Returns:
        The compressed graph.
    """
    if compression in {None, CompressionType.FP16}:
        return graph
    graph = _compress_weights(_halved(graph))
    if compression == CompressionType.INT8_PTQ:
        return _quantize(graph, images)
    if compression == CompressionType.INT8_ACQ:
        metric = metric or F1Score(fields=["pred_label", "gt_label"])
        return _quantize_with_accuracy_control(graph, images, metric, max_drop)
    return graph


def _halved(model: "openvino.Model") -> "openvino.Model":
    """Round the constants of a graph to FP16."""
    import openvino  # noqa: PLC0415 - optional

    # OpenVINO rounds constants only while it saves a graph.
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.xml"
        openvino.save_model(model, path, compress_to_fp16=True)
        return openvino.Core().read_model(path.read_bytes(), path.with_suffix(".bin").read_bytes())


def _compress_weights(model: "openvino.Model") -> "openvino.Model":
    """Store the weights after the backbone in INT8.

    The backbone's weights stay as they are. They take little space, and depthwise convolutions lose accuracy in INT8.
    """
    import nncf  # noqa: PLC0415 - optional

    backbone, _ = _parts(model)
    return nncf.compress_weights(model, ignored_scope=nncf.IgnoredScope(names=backbone, validate=False))


def _quantize(model: "openvino.Model", images: TrialImages) -> "openvino.Model":
    """Run convolutions of the backbone in INT8, calibrated on images."""
    import nncf  # noqa: PLC0415 - optional

    return nncf.quantize(model, _dataset(model, images), **_settings(model))


def _quantize_with_accuracy_control(
    model: "openvino.Model", images: TrialImages, metric: "Metric", max_drop: float
) -> "openvino.Model":
    """Run convolutions of the backbone in INT8, except those that reduce a metric too much.

    Args:
        model: Graph with the outputs of anomalib's ``InferenceBatch``.
        images: Images with labels, to calibrate and to measure on.
        metric: Metric that takes an ``ImageBatch``; higher is better.
        max_drop: Largest fall of the metric.
    """
    import nncf  # noqa: PLC0415 - optional

    def measure(compiled: Callable[[Any], Any], batches: Iterable[tuple[int, ...]]) -> float:
        # anomalib's own function keeps the counts of the graph that was measured before.
        metric.reset()
        for batch in batches:
            shown = images.read(batch)
            metric.update(_predictions(compiled(shown.images.numpy()), shown))
        return float(metric.compute())

    data = _dataset(model, images)
    validation = nncf.Dataset(list(_batches(model, images)))
    return nncf.quantize_with_accuracy_control(model, data, validation, measure, max_drop=max_drop, **_settings(model))


def _settings(model: "openvino.Model") -> dict[str, Any]:
    """Settings of NNCF: INT8 reduces accuracy after the backbone and in depthwise convolutions, so neither uses it."""
    import nncf  # noqa: PLC0415 - optional

    _, rest = _parts(model)
    return {
        "preset": nncf.QuantizationPreset.MIXED,
        "fast_bias_correction": False,
        "ignored_scope": nncf.IgnoredScope(names=rest, types=["GroupConvolution"], validate=False),
    }


def _parts(model: "openvino.Model") -> tuple[list[str], list[str]]:
    """Names of the operations up to the last of the backbone's weights, and of the operations after it."""
    weights = [
        operation
        for operation in model.get_ordered_ops()
        if operation.get_type_name() == "Constant" and _BACKBONE in operation.get_friendly_name()
    ]
    before: set[str] = set()
    pending = [target.get_node() for weight in weights for target in weight.output(0).get_target_inputs()]
    # A conversion stands between a rounded weight and its operation.
    pending += [
        target.get_node()
        for node in pending
        if node.get_type_name() == "Convert"
        for target in node.output(0).get_target_inputs()
    ]
    while pending:
        node = pending.pop()
        if node.get_friendly_name() not in before:
            before.add(node.get_friendly_name())
            pending += [each.get_source_output().get_node() for each in node.inputs()]
    operations = [
        operation.get_friendly_name()
        for operation in model.get_ordered_ops()
        if operation.get_type_name() not in {"Constant", "Convert", "Parameter", "Result"}
    ]
    return [name for name in operations if name in before], [name for name in operations if name not in before]


def _batches(model: "openvino.Model", images: TrialImages) -> Iterator[tuple[int, ...]]:
    """Indices of the images in batches that a graph takes. An incomplete batch of a fixed size is left out."""
    size = fixed_batch_size(model) or 1
    yield from (batch for batch in images.batches(size) if len(batch) == size)


def _dataset(model: "openvino.Model", images: TrialImages) -> "nncf.Dataset":
    import nncf  # noqa: PLC0415 - optional

    return nncf.Dataset(list(_batches(model, images)), lambda batch: images.read(batch).images.numpy())


def _predictions(outputs: Any, shown: TrialBatch) -> ImageBatch:
    """Outputs of a graph, with the labels and masks of the images."""
    values = {
        name: torch.from_numpy(outputs[name].copy())
        for name in ("pred_score", "pred_label", "anomaly_map", "pred_mask")
    }
    masks = [mask for mask in shown.masks if mask is not None]
    return ImageBatch(
        image=shown.images,
        gt_label=torch.tensor(shown.labels),
        gt_mask=torch.stack(masks) if len(masks) == len(shown.masks) else None,
        anomaly_map=values["anomaly_map"][:, 0],
        pred_mask=values["pred_mask"][:, 0],
        pred_score=values["pred_score"].flatten(),
        pred_label=values["pred_label"].flatten(),
    )
