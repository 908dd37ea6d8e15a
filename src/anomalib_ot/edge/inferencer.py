"""Scores, verdicts, p-values, maps and masks of an exported model, in OpenVINO."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from anomalib_ot.decide.decision import Decision, calibration_of
from anomalib_ot.images.blank import blank_images
from anomalib_ot.images.reading import EIGHT_BITS, ValueRange

from .inputs import ImageInput, pixels_of, resized

if TYPE_CHECKING:
    import openvino

_FLOAT32 = {"INFERENCE_PRECISION_HINT": "f32"}
_SUFFIXES = (".xml", ".onnx")


@dataclass(frozen=True)
class Prediction:
    """What an exported model says of an image.

    Args:
        score: Score as the model shows it: in [0, 1] with the threshold of the export at 0.5, unless the model was
            exported without normalisation.
        threshold: Score above which the image is anomalous; None without calibration.
        is_anomalous: The verdict; None if the model has neither thresholds nor a calibration.
        raw_score: Score before normalisation; None without calibration.
        p_value: Share of good images that score as high, see :func:`~anomalib_ot.decide.conformal.p_values`; None
            without calibration. An image is anomalous at a rate that the good images support if its p-value is at most
            that rate.
        anomaly_map: Map (h, w) as the model shows it, float32; None if the model has no maps.
        mask: Anomalous pixels (h, w); None if the model has no maps or no thresholds.
        blank: What is wrong with an image without content, such as ``of one colour``; otherwise empty.
    """

    score: float
    threshold: float | None
    is_anomalous: bool | None
    raw_score: float | None
    p_value: float | None
    anomaly_map: NDArray[np.float32] | None
    mask: NDArray[np.bool_] | None
    blank: str = ""

    @property
    def label(self) -> str:
        """``anomalous``, ``normal``, or empty if there is no verdict."""
        return "" if self.is_anomalous is None else "anomalous" if self.is_anomalous else "normal"


class EdgeInferencer:
    """An exported model that predicts images, as anomalib's ``OpenVINOInferencer`` does without torch and anomalib.

    It resizes images as the model does in training, which anomalib's inferencer does not. With the calibration of the
    export beside the model, it gives raw scores and p-values and decides at any false-alarm rate. Models of anomalib
    that were exported without a calibration have the verdicts of their own thresholds.

    Args:
        model: Exported ``model.xml`` or ``model.onnx``, or a folder with one.
        device: Device of OpenVINO, such as ``CPU``, ``GPU`` or ``AUTO``.
        config: Settings of OpenVINO. By default, it computes in float32, as the checks of the export do.

    Attributes:
        path: The exported file.
        image_size: Height and width that images are resized to; None if the model resizes them.
        decision: The calibration; None if there is none.
        reading: How the training read images with more than 8 bits per channel, as far as it is known.

    Raises:
        ModuleNotFoundError: If OpenVINO is not installed.
        FileNotFoundError: If there is no model.
        ValueError: If the calibration is damaged or belongs to another export, or if OpenVINO cannot read the model,
            or the model is not one that anomalib exports.

    Example:
        >>> inferencer = EdgeInferencer("results/weights/openvino")  # doctest: +SKIP
        >>> prediction = inferencer.predict("image.png", rate=0.02)  # doctest: +SKIP
        >>> prediction.label, prediction.score, prediction.p_value  # doctest: +SKIP
        ('anomalous', 0.81, 0.0099)
    """

    def __init__(self, model: str | Path, device: str = "CPU", config: Mapping[str, Any] | None = None) -> None:
        self.path = model_file(Path(model))
        # Before the graph is compiled, which takes longer.
        self.decision = Decision.load(self.path) if calibration_of(self.path).is_file() else None
        self.reading = EIGHT_BITS if self.decision is None else self.decision.reading
        self._compiled = _compiled(self.path, device, _FLOAT32 if config is None else config)
        self.image_size = _image_size(self._compiled, self.path)
        self._outputs = {name: port for port in self._compiled.outputs for name in port.names}
        if "pred_score" not in self._outputs:
            msg = f"{self.path} returns {', '.join(self._outputs)}, expected pred_score; export the model with anomalib"
            raise ValueError(msg)

    def predict(
        self, image: ImageInput, rate: float | None = None, value_range: ValueRange | None = None
    ) -> Prediction:
        """Predict one image.

        Args:
            image: Path, Pillow image or array, see :func:`~anomalib_ot.edge.inputs.pixels_of`.
            rate: Promised rate of false alarms of the verdict and the mask, in (0, 1); by default that of the export.
            value_range: Values that map to black and white in an image with more than 8 bits per channel; by default,
                those of the training, and 0 and 1 in an array of floating-point numbers.

        Returns:
            The prediction.

        Raises:
            ValueError: If the image cannot be read, a score is NaN, the rate is not in (0, 1), or a rate is given and
                there is no calibration.
            FileNotFoundError: If the file does not exist.

        Warns:
            UnsupportedRateWarning: If there are too few calibration scores for the rate.
        """
        self.require_decision(rate)
        if value_range is None and self.reading.value_range is not None:
            # Floating-point numbers are in [0, 1] already.
            is_scaled = not isinstance(image, str | Path) and np.asarray(image).dtype.kind == "f"
            value_range = None if is_scaled else self.reading.value_range
        pixels = pixels_of(image, value_range)
        found = self._run(pixels)
        score, anomaly_map = found["pred_score"].reshape(()), found.get("anomaly_map")
        label, mask = found.get("pred_label"), found.get("pred_mask")
        is_anomalous = None if label is None else bool(label.item())
        blank = blank_images(pixels.transpose(2, 0, 1)[None]).get(0, "")
        if self.decision is None:
            # NaN is not comparable, and must not be normal.
            is_anomalous = is_anomalous if is_anomalous is None else is_anomalous or bool(np.isnan(score))
            return Prediction(float(score), None, is_anomalous, None, None, anomaly_map, mask, blank)
        raw, scale = self.decision.raw_scores(score), self.decision.image.scale
        limit = self.decision.threshold(rate)
        if rate is not None or label is None:
            is_anomalous = bool(self.decision.is_anomalous(raw, rate))
            mask = self._mask(raw, anomaly_map, rate)
        shown_limit = limit if scale is None else float(scale.shown(limit))
        p_value = float(self.decision.p_values(raw))
        return Prediction(float(score), shown_limit, is_anomalous, float(raw), p_value, anomaly_map, mask, blank)

    def require_decision(self, rate: float | None) -> None:
        """Check that a model without calibration is not asked for a rate.

        Raises:
            ValueError: If it is.
        """
        if rate is not None and self.decision is None:
            msg = (
                f"there is no {calibration_of(self.path).name} beside {self.path}, so that it decides by its own "
                f"threshold only, not at a rate of {rate}; leave out the rate, or export a model of anomalib-ot again"
            )
            raise ValueError(msg)

    def _run(self, pixels: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
        """The outputs of the graph for pixels (H, W, 3) by name; maps and masks are (h, w)."""
        if self.image_size is not None:
            pixels = resized(pixels, self.image_size)
        results = self._compiled(np.ascontiguousarray(pixels.transpose(2, 0, 1)[None]))
        found = {name: np.asarray(results[port]) for name, port in self._outputs.items()}
        for name in {"anomaly_map", "pred_mask"} & found.keys():
            found[name] = found[name].reshape(found[name].shape[-2:])
        return found

    def _mask(
        self, raw: NDArray[np.float64], shown: NDArray[np.float32] | None, rate: float | None
    ) -> NDArray[np.bool_] | None:
        """Mask (h, w) at a rate; None without a map or its calibration."""
        assert self.decision is not None  # noqa: S101 - the caller has one
        if shown is None or self.decision.pixel is None:
            return None
        maps = self.decision.raw_maps(shown[None])
        return self.decision.masks(raw.reshape(1), maps, rate)[0]


def model_file(path: Path) -> Path:
    """The exported file of a path, which may be its folder.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If a folder has several, none of which is ``model.xml``, or the file is not of OpenVINO or ONNX.
    """
    if path.is_dir():
        files = sorted(each for suffix in _SUFFIXES for each in path.glob(f"*{suffix}"))
        preferred = path / "model.xml"
        if not files:
            msg = f"there is no model.xml in {path}; export the model with --export_type openvino"
            raise FileNotFoundError(msg)
        if files[1:] and preferred not in files:
            msg = f"{path} holds {', '.join(each.name for each in files)}; give the path of one of them"
            raise ValueError(msg)
        return preferred if preferred in files else files[0]
    if not path.exists():
        msg = f"there is no model {path}; expected model.xml, or its folder"
        raise FileNotFoundError(msg)
    if path.suffix not in _SUFFIXES:
        msg = f"got {path}, expected a model.xml or model.onnx; export the model with --export_type openvino"
        raise ValueError(msg)
    return path


def _compiled(path: Path, device: str, config: Mapping[str, Any]) -> "openvino.CompiledModel":
    try:
        import openvino  # noqa: PLC0415 - optional
    except ModuleNotFoundError as error:
        msg = "this prediction needs OpenVINO, which is not installed; run: pip install openvino"
        raise ModuleNotFoundError(msg) from error
    try:
        return openvino.Core().compile_model(path, device, dict(config))
    except RuntimeError as error:
        msg = f"OpenVINO cannot run {path} on {device}; are all files of the export there? {error}"
        raise ValueError(msg) from error


def _image_size(compiled: "openvino.CompiledModel", path: Path) -> tuple[int, int] | None:
    """Height and width of the graph's images, None if they are not fixed.

    Raises:
        ValueError: If the graph does not take single RGB images.
    """
    shape = compiled.input(0).partial_shape
    wanted = ({0, 1}, {0, 3})
    dimensions = [each.get_length() if each.is_static else 0 for each in shape] if shape.rank.is_static else []
    is_image = len(dimensions) == 4 and all(got in allowed for got, allowed in zip(dimensions, wanted, strict=False))  # noqa: PLR2004 - batch, channels, height, width
    if not is_image:
        msg = f"{path} takes {shape}, expected images [1 or dynamic, 3, height, width]; export the model with anomalib"
        raise ValueError(msg)
    height, width = dimensions[2:]
    return (height, width) if height and width else None
