"""Exported graphs in OpenVINO: running them, and quantizing them where accuracy bears it."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from anomalib.data import ImageBatch, InferenceBatch
from torch import Tensor

from .trial_pictures import Shown, TrialPictures

if TYPE_CHECKING:
    import nncf
    import openvino
    from torchmetrics import Metric

_BACKBONE = "feature_extractor"


class GraphRunner:
    """An exported graph on the CPU, with its maps and scores as they are before the post-processor clips them.

    Args:
        path: An ``.xml`` or ``.onnx`` file.
        precision: OpenVINO's settings of the precision; without any, it chooses.
        clipped: Outputs that are clipped.

    Attributes:
        batch_size: Images that the graph takes at once, None for any number.
        precision: Precision in which OpenVINO computes what is not quantized.
    """

    def __init__(self, path: Path, precision: dict[str, str], clipped: Sequence[str]) -> None:
        import openvino  # noqa: PLC0415 - optional

        # Conversion also gives what ONNX calls a clip its name in OpenVINO.
        model = openvino.convert_model(path) if path.suffix == ".onnx" else openvino.Core().read_model(path)
        self._indices = {name: _index(model, name) for name in ("anomaly_map", "pred_score")}
        for name in clipped:
            unclipped = _before_clipping(model.output(name))
            self._indices[name] = len(model.outputs)
            model.add_outputs(unclipped)
        self._compiled = openvino.compile_model(model, "CPU", precision)
        self.batch_size = fixed_batch_size(model)
        self.precision = self._compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()

    def __call__(self, images: Tensor) -> InferenceBatch:
        """Anomaly maps (B, 1, h, w) and scores (B,) of images (B, 3, h, w) in [0, 1]."""
        results = self._compiled(images.cpu().numpy()).to_tuple()
        return InferenceBatch(
            **{name: torch.from_numpy(results[index].copy()) for name, index in self._indices.items()}
        )


def _index(model: "openvino.Model", name: str) -> int:
    return next(index for index, output in enumerate(model.outputs) if name in output.names)


def _before_clipping(output: Any) -> Any:
    """What a graph's output is made from by clipping it, behind the choice of whether to normalise it."""
    pending = [output.get_node()]
    while pending:
        node = pending.pop(0)
        if node.get_type_name() == "Clamp":
            return node.input_value(0)
        if node.get_type_name() in {"Result", "Select", "Convert"}:
            pending += [each.get_source_output().get_node() for each in node.inputs()]
    msg = f"the output {output.any_name} is not clipped as the host's post-processor does"
    raise ValueError(msg)


def fixed_batch_size(model: "openvino.Model") -> int | None:
    """Images that a graph takes at once, None for any number."""
    batch = model.input(0).partial_shape[0]
    return batch.get_length() if batch.is_static else None


def halved(model: "openvino.Model") -> "openvino.Model":
    """The graph with its constants in FP16."""
    import openvino  # noqa: PLC0415 - optional

    # OpenVINO rounds constants only while it saves.
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.xml"
        openvino.save_model(model, path, compress_to_fp16=True)
        return openvino.Core().read_model(path.read_bytes(), path.with_suffix(".bin").read_bytes())


def compress_weights(model: "openvino.Model") -> "openvino.Model":
    """Store the weights after the backbone in INT8.

    Those of the backbone stay as they are: few bytes are to be had there, and depthwise convolutions bear eight bits
    badly.
    """
    import nncf  # noqa: PLC0415 - optional

    backbone, _ = _parts(model)
    return nncf.compress_weights(model, ignored_scope=nncf.IgnoredScope(names=backbone, validate=False))


def quantize(model: "openvino.Model", pictures: TrialPictures) -> "openvino.Model":
    """Let the backbone compute in INT8, calibrated on pictures."""
    import nncf  # noqa: PLC0415 - optional

    return nncf.quantize(model, _dataset(model, pictures), **_settings(model))


def quantize_with_accuracy_control(
    model: "openvino.Model", pictures: TrialPictures, metric: "Metric", max_drop: float
) -> "openvino.Model":
    """Let as much of the backbone compute in INT8 as a metric of its predictions allows.

    Args:
        model: Graph with outputs ``pred_score`` and ``pred_label``.
        pictures: What to calibrate and measure on, with labels.
        metric: Takes an ``ImageBatch``; the higher the better.
        max_drop: Largest fall of the metric.
    """
    import nncf  # noqa: PLC0415 - optional

    def measure(compiled: Callable[[Any], Any], batches: Iterable[tuple[int, ...]]) -> float:
        # The host's own does not forget the graph that was measured before.
        metric.reset()
        for batch in batches:
            shown = pictures.read(batch)
            metric.update(_predictions(compiled(shown.images.numpy()), shown))
        return float(metric.compute())

    data = _dataset(model, pictures)
    validation = nncf.Dataset(list(_batches(model, pictures)))
    return nncf.quantize_with_accuracy_control(model, data, validation, measure, max_drop=max_drop, **_settings(model))


def _settings(model: "openvino.Model") -> dict[str, Any]:
    """How to quantize: scores bear eight bits neither after the backbone nor in depthwise convolutions."""
    import nncf  # noqa: PLC0415 - optional

    _, rest = _parts(model)
    return {
        "preset": nncf.QuantizationPreset.MIXED,
        "fast_bias_correction": False,
        "ignored_scope": nncf.IgnoredScope(names=rest, types=["GroupConvolution"], validate=False),
    }


def _parts(model: "openvino.Model") -> tuple[list[str], list[str]]:
    """Names of the operations up to the last of the backbone's weights, and of those after it."""
    weights = [
        operation
        for operation in model.get_ordered_ops()
        if operation.get_type_name() == "Constant" and _BACKBONE in operation.get_friendly_name()
    ]
    before: set[str] = set()
    pending = [target.get_node() for weight in weights for target in weight.output(0).get_target_inputs()]
    # A rounded weight reaches its operation through a conversion.
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


def _batches(model: "openvino.Model", pictures: TrialPictures) -> Iterator[tuple[int, ...]]:
    """Numbers of the pictures in batches that a graph takes; what does not fill a batch of fixed size is left out."""
    size = fixed_batch_size(model) or 1
    yield from (batch for batch in pictures.batches(size) if len(batch) == size)


def _dataset(model: "openvino.Model", pictures: TrialPictures) -> "nncf.Dataset":
    import nncf  # noqa: PLC0415 - optional

    return nncf.Dataset(list(_batches(model, pictures)), lambda batch: pictures.read(batch).images.numpy())


def _predictions(outputs: Any, shown: Shown) -> ImageBatch:
    """What a graph says of pictures, beside what is true."""
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
