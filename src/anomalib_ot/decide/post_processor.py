"""The post-processor whose threshold promises a rate of false alarms, from good images alone."""

import logging
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from anomalib.data import Batch, InferenceBatch
from anomalib.post_processing import PostProcessor
from lightning import LightningModule, Trainer
from torch import Tensor

from anomalib_ot.transport import Processes

from .bounded_scores import below_one, compressed_scores, nan_as_infinite
from .conformal import (
    ConformalScale,
    UnsupportedRateWarning,
    calibration_scores,
    p_values,
    require_rate,
    threshold,
    unit_of,
    why_unsupported,
)
from .decision import Decision, Level

# Importing the host's room executes anomalib's models, which registers ours, and these need the class below. It is
# therefore imported where it is needed.
if TYPE_CHECKING:
    from anomalib_ot.host.calibration import CalibrationScores
    from anomalib_ot.host.scale import Scale

logger = logging.getLogger(__name__)

LevelName = Literal["image", "pixel"]
_LEVELS: tuple[LevelName, ...] = ("image", "pixel")
# Shown score of the threshold, and the sensitivity that leaves it there.
_THRESHOLD = 0.5


class ConformalPostProcessor(PostProcessor):
    """Verdicts with at most a promised rate of false alarms; for any model of anomalib.

    The threshold is computed from scores of good images that the model was not trained on: those of the validation
    set, or those that the model provides, such as from a cross-fit, see
    :class:`~anomalib_ot.host.calibration.CalibratesItself`, if they are not fewer or the model was trained on
    validation images.
    Anomalous validation images change nothing, and validation images without a label count as good.

    With held-out images, a new good image that is exchangeable with them is flagged with a probability of at most
    ``false_alarm_rate`` (split conformal prediction: Vovk, Gammerman and Shafer, Algorithmic learning in a random
    world, 2005; Bates et al., 2023, https://arxiv.org/abs/2104.08279).

    Image and mask agree: an image is anomalous if and only if its mask has a pixel. The mask of an anomalous image has
    the pixels above the pixel threshold, which is computed from the maxima of the good images' maps; if no pixel is
    above it, the mask has the highest pixel. The mask of a normal image is empty. A pixel of a good image is therefore
    marked with a probability of at most ``false_alarm_rate``.

    Shown scores and maps are ``0.5 + 0.5 · u / (1 + |u|)`` with u = (raw − threshold) / unit, see
    :class:`~anomalib_ot.decide.conformal.ConformalScale`: in [0, 1], with the threshold at 0.5. A score or pixel that
    is NaN counts as an infinite one: it is anomalous, and shown as 1. A checkpoint holds the calibration scores, so
    that another rate can be set after training.

    Args:
        false_alarm_rate: Promised rate of false alarms, in (0, 1). n good images support a rate of 1 / (n + 1) at
            best. With fewer images than the rate needs, that rate is used, and a warning says so.
        **settings: Settings of anomalib's ``PostProcessor``. Without ``enable_normalization``, raw scores are shown,
            and the threshold is raw. Without ``enable_thresholding``, there are neither labels nor masks.
            ``enable_threshold_matching`` has no effect, as each level has its own calibration. Sensitivities other
            than 0.5 are refused: they would move the threshold away from the promised rate.

    Raises:
        ValueError: If the rate is out of its range, or a sensitivity is not 0.5.

    Example:
        >>> from anomalib.models import Patchcore
        >>> model = Patchcore(post_processor=ConformalPostProcessor(false_alarm_rate=0.05))  # doctest: +SKIP
    """

    counted_buffers = ("image_calibration", "pixel_calibration")
    """Buffers whose length is the number of the images that they are from."""

    image_calibration: Tensor
    pixel_calibration: Tensor
    _image_unit: Tensor
    _pixel_unit: Tensor

    def __init__(self, false_alarm_rate: float = 0.01, **settings: Any) -> None:
        super().__init__(**settings)
        # Raw scores of good images (n,), and maxima of their maps (n,), in the order of the images; empty before a
        # validation.
        for level in _LEVELS:
            self.register_buffer(f"{level}_calibration", torch.empty(0))
            self.register_buffer(f"_{level}_unit", torch.tensor(1.0), persistent=False)
        self._scored: list[tuple[str, float, float | None]] = []
        # Where the calibration scores are from, a Source of anomalib_ot.host.calibration, which a checkpoint keeps.
        self.calibration_source = ""
        self.false_alarm_rate = false_alarm_rate

    @property
    def _checkpoint_config_keys(self) -> tuple[str, ...]:
        return (*super()._checkpoint_config_keys, "false_alarm_rate", "calibration_source")

    @property
    def false_alarm_rate(self) -> float:
        """Promised rate of false alarms. Setting it moves the thresholds."""
        return self._false_alarm_rate

    @false_alarm_rate.setter
    def false_alarm_rate(self, rate: float) -> None:
        require_rate("false_alarm_rate", rate)
        self._false_alarm_rate = rate
        self._set_thresholds()

    @property
    def image_sensitivity(self) -> float:
        """0.5, the only sensitivity that keeps the promised rate."""
        return _THRESHOLD

    @image_sensitivity.setter
    def image_sensitivity(self, value: float) -> None:
        _refuse_sensitivity("image_sensitivity", value)

    @property
    def pixel_sensitivity(self) -> float:
        """0.5, likewise."""
        return _THRESHOLD

    @pixel_sensitivity.setter
    def pixel_sensitivity(self, value: float) -> None:
        _refuse_sensitivity("pixel_sensitivity", value)

    def is_calibrated(self, level: LevelName) -> bool:
        """Whether there are calibration scores of a level. A graph that is exported keeps the answer."""
        return self._calibration(level).numel() > 0

    def scale(self, level: LevelName) -> "Scale":
        """How scores of a level are shown; without a threshold if there is none."""
        from anomalib_ot.host.scale import LinearScale  # noqa: PLC0415 - see above

        if not self.is_calibrated(level):
            return LinearScale()
        limit = float(self._limit(level))
        if not self.enable_normalization:
            return LinearScale(threshold=limit if self.enable_thresholding else None)
        return ConformalScale(limit, float(self._unit(level)), 0.5 if self.enable_thresholding else None)

    def p_values(self, raw_scores: Tensor) -> list[float] | None:
        """Conformal p-values of raw image scores (B,), see :func:`~anomalib_ot.decide.conformal.p_values`.

        Returns:
            A p-value for each; None without calibration scores.

        Raises:
            ValueError: If a score is NaN.
        """
        if not self.is_calibrated("image"):
            return None
        values: list[float] = p_values(raw_scores.detach().cpu().numpy(), self.image_calibration.cpu().numpy()).tolist()
        return values

    def p_values_of_pixels(self, raw_maps: Tensor) -> Tensor | None:
        """P-values of pixels, see :meth:`~anomalib_ot.decide.decision.Decision.p_values_of_pixels`.

        Args:
            raw_maps: Raw maps, or raw scores of pixels, of any shape.

        Returns:
            P-values of the same shape, float64, on the CPU; None without calibration scores of maps.

        Raises:
            ValueError: If a pixel is NaN.
        """
        if not self.is_calibrated("pixel"):
            return None
        known = self.pixel_calibration.cpu().numpy()
        return torch.from_numpy(p_values(raw_maps.detach().cpu().numpy(), known))

    def decision(self, model: str) -> Decision | None:
        """What an exported model needs to decide at another rate; None without calibration scores.

        Args:
            model: Class of the model.
        """
        image, pixel = (
            Level(calibration_scores(self._calibration(level).cpu().numpy()), self._shown_by_graph(level))
            if self.is_calibrated(level)
            else None
            for level in _LEVELS
        )
        return None if image is None else Decision(model, self.false_alarm_rate, image, pixel)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Discard the scores of an earlier validation."""
        del trainer, pl_module
        self._scored = []

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Collect the raw scores of good images, and the maxima of their maps.

        The metrics of a validation come next. They get ``s / (1 + |s|)`` for scores s, in the same order: torchmetrics
        applies a sigmoid to scores outside [0, 1], in which those above 17 tie.
        """
        from anomalib_ot.host.calibration import score_rows  # noqa: PLC0415 - see above

        del trainer, pl_module, args, kwargs
        # The range of scores is no longer used here, but comparisons show scores on it.
        self._image_min_max_metric.update(outputs)
        self._pixel_min_max_metric.update(outputs)
        scores, maps = outputs.pred_score, outputs.anomaly_map
        if scores is None:
            if maps is None:
                return
            scores = maps.flatten(1).amax(1)
        labels = [False] * len(scores) if outputs.gt_label is None else outputs.gt_label.flatten().tolist()
        paths = outputs.image_path or [""] * len(scores)
        rows = zip(paths, score_rows(scores, maps), labels, strict=True)
        self._scored += [(str(path), *row) for path, row, label in rows if not label]
        if outputs.pred_score is not None:
            outputs.pred_score = below_one(outputs.pred_score)
        if maps is not None:
            outputs.anomaly_map = below_one(maps)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compute the thresholds."""
        from anomalib_ot.host.held_out import calibrating_scores  # noqa: PLC0415 - see above

        super().on_validation_epoch_end(trainer, pl_module)
        shares = Processes.all().each(self._scored)
        self._scored = []
        # With several processes, a sampler repeats images to fill the last batch.
        rows = {
            path or (rank, index): (score, peak)
            for rank, share in enumerate(shares)
            for index, (path, score, peak) in enumerate(share)
        }
        self.calibrate(calibrating_scores(rows.values(), pl_module))

    def calibrate(self, scores: "CalibrationScores") -> None:
        """Compute the thresholds. Without usable scores there are none, and a warning gives the reason.

        Args:
            scores: Raw scores of good images, and the maxima of their maps.
        """
        # A tensor that is created in inference mode could not be loaded into later.
        with torch.inference_mode(mode=False):
            device = self._image_threshold.device
            self.image_calibration = torch.tensor(_usable("image", scores.images), device=device)
            self.pixel_calibration = torch.tensor(_usable("pixel", scores.maps), device=device)
        self.calibration_source = scores.source
        self._set_thresholds()
        if self.is_calibrated("image"):
            logger.info(
                "The threshold, a raw score of %.4g that is shown as 0.5, follows from the scores of %d good images "
                "that %s.",
                *(float(self._image_threshold), len(scores.images), scores.clause),
            )

    def forward(self, predictions: InferenceBatch) -> InferenceBatch:
        """Show scores and maps on the scale of the thresholds, and decide.

        Args:
            predictions: Raw image scores (B,), raw maps (B, …, h, w), or both. Without scores, the maxima of the maps
                are the scores.

        Returns:
            Scores and maps as they are shown, labels (B,) and masks (B, …, h, w). Without calibration scores, raw
            scores and maps are shown, and all labels and masks are false.

        Raises:
            ValueError: If there are neither scores nor maps.
        """
        raw, maps = predictions.pred_score, predictions.anomaly_map
        if raw is None:
            if maps is None:
                msg = "a prediction must have a pred_score, an anomaly_map or both, got neither"
                raise ValueError(msg)
            raw = maps.amax((-2, -1))
        score = self._shown(raw, "image")
        label = mask = None
        if self.enable_thresholding:
            # The shown score decides, so that rounding makes no difference. Nothing is above an unknown threshold.
            is_shown = self.enable_normalization and self.is_calibrated("image")
            label = nan_as_infinite(score) > (_THRESHOLD if is_shown else self._image_threshold)
            mask = None if maps is None else self._mask(label, maps)
        shown = None if maps is None else self._shown(maps, "pixel")
        return InferenceBatch(pred_score=score, pred_label=label, anomaly_map=shown, pred_mask=mask)

    def post_process_batch(self, batch: Batch) -> None:
        """Show scores and maps of a batch on the scale of the thresholds, and decide.

        Args:
            batch: Batch with raw predictions. Labels and masks that it has already are kept.
        """
        if batch.pred_score is None and batch.anomaly_map is None:
            return
        decided = self(InferenceBatch(pred_score=batch.pred_score, anomaly_map=batch.anomaly_map))
        batch.pred_score, batch.anomaly_map = decided.pred_score, decided.anomaly_map
        if batch.pred_label is None:
            batch.pred_label = decided.pred_label
        if batch.pred_mask is None:
            batch.pred_mask = decided.pred_mask

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in self.counted_buffers:
            if (known := state_dict.get(prefix + name)) is not None:
                setattr(self, name, torch.empty_like(known, device=self._image_threshold.device))
        super()._load_from_state_dict(state_dict, prefix, *args)
        # The rate may differ from that of the checkpoint.
        self._set_thresholds()

    def _set_thresholds(self) -> None:
        """Compute thresholds and units from the calibration scores, and warn if they do not support the rate.

        Without scores, a threshold is NaN, which no score is above: an earlier one must not decide.
        """
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", UnsupportedRateWarning)
            for level in _LEVELS:
                if not self.is_calibrated(level):
                    self._limit(level).fill_(torch.nan)
                    continue
                known = self._calibration(level).cpu().numpy()
                self._limit(level).fill_(threshold(known, self.false_alarm_rate))
                self._unit(level).fill_(unit_of(known))
        count = self.image_calibration.numel()
        if count and (reason := why_unsupported(count, self.false_alarm_rate)):
            logger.warning("%s.", reason[0].upper() + reason[1:])

    def _shown(self, raw: Tensor, level: LevelName) -> Tensor:
        if not (self.enable_normalization and self.is_calibrated(level)):
            return raw
        # As ConformalScale, with tensors that stay on the device and in the graph.
        return compressed_scores((nan_as_infinite(raw) - self._limit(level)) / self._unit(level))

    def _mask(self, label: Tensor, maps: Tensor) -> Tensor:
        maps = nan_as_infinite(maps)
        highest = maps.amax((-2, -1), keepdim=True)
        marked = (maps > self._pixel_threshold) | (maps >= highest)
        return marked & label.reshape(-1, *(1,) * (maps.ndim - 1))

    def _shown_by_graph(self, level: LevelName) -> ConformalScale | None:
        scale = self.scale(level)
        return scale if isinstance(scale, ConformalScale) else None

    def _calibration(self, level: LevelName) -> Tensor:
        return self.image_calibration if level == "image" else self.pixel_calibration

    def _limit(self, level: LevelName) -> Tensor:
        return self._image_threshold if level == "image" else self._pixel_threshold

    def _unit(self, level: LevelName) -> Tensor:
        return self._image_unit if level == "image" else self._pixel_unit


def _refuse_sensitivity(name: str, value: float) -> None:
    if value != _THRESHOLD:
        msg = (
            f"{name} must be {_THRESHOLD}, not {value!r}: another one would move the threshold away from the "
            "promised rate of false alarms. Set false_alarm_rate instead"
        )
        raise ValueError(msg)


def _usable(level: LevelName, scores: Sequence[float]) -> list[float]:
    """The scores, or none if they cannot calibrate; a training must not fail at its end because of them."""
    if level == "pixel" and not scores:
        return []
    try:
        calibration_scores(scores)
    except ValueError as error:
        what = "image scores" if level == "image" else "maxima of the maps"
        logger.warning("There is no %s threshold, from the %s: %s.", level, what, error)
        return []
    return list(scores)
