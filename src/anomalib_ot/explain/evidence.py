"""Evidence for the score of an image: contributions, rank among normal images, and anomalous regions."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from anomalib.data import InferenceBatch
from anomalib.models.components import AnomalibModule
from skimage.measure import label, regionprops
from torch import Tensor, nn

from anomalib_ot.decide.conformal import rank_p_values
from anomalib_ot.decide.post_processor import ConformalPostProcessor
from anomalib_ot.drawing.pictures import Extent, Picture
from anomalib_ot.host.calibration import HELD_OUT, TRAINED, clause
from anomalib_ot.host.scale import Scale, scale_of

_ITSELF = "this image is the only held-out normal image"
_IS_NAN = "the score is NaN"


@dataclass(frozen=True)
class NormalScores:
    """Scores of normal images that the model was not trained on.

    Args:
        scores: Image score of each image, from :func:`image_scores`; by number for calibration scores.
        why_none: Reason if there are no scores.
        is_calibration: Whether they are the calibration scores of the post-processor, as ``predict`` uses them.
        clause: Which images these are, as the end of the clause "good images that …".
    """

    scores: Mapping[str, float] = field(default_factory=dict)
    why_none: str = "no normal images were held out"
    is_calibration: bool = False
    clause: str = clause(HELD_OUT)

    @classmethod
    def of_calibration(cls, model: AnomalibModule) -> "NormalScores | None":
        """The calibration scores of a model's post-processor, unless it was trained on them; None if it has none."""
        processor = model.post_processor
        if not (isinstance(processor, ConformalPostProcessor) and processor.is_calibrated("image")):
            return None
        if processor.calibration_source == TRAINED:
            return cls(why_none="the model was trained on the good images that set the threshold")
        scores = {str(number): score for number, score in enumerate(processor.image_calibration.tolist())}
        return cls(scores, is_calibration=True, clause=clause(processor.calibration_source))

    def without(self, picture: Picture) -> tuple[float, ...]:
        """The scores without that of an image, which must not be compared with itself; all if they calibrate."""
        key = None if self.is_calibration else _key(picture)
        return tuple(score for each, score in self.scores.items() if each != key)


@dataclass(frozen=True)
class Contribution:
    """Contribution of a part of the model.

    Args:
        map: Contribution to each pixel of the anomaly map, (h, w).
        value: Contribution to the raw image score.
    """

    map: Tensor
    value: float


@dataclass(frozen=True)
class Region:
    """A connected region of the image with scores above the pixel threshold.

    Args:
        box: Left, top, right and bottom edge, in pixels of the file, or of the model's input if there is no file.
        score: Highest score of the region, as anomalib shows it.
        p_value: P-value of its highest pixel, see
            :meth:`~anomalib_ot.decide.decision.Decision.p_values_of_pixels`; None without calibration scores of maps.
    """

    box: Extent
    score: float
    p_value: float | None = None


@dataclass(frozen=True)
class Evidence:
    """Evidence for the score of an image.

    Args:
        picture: The image.
        score: Image score as ``predict`` returns it, in [0, 1] once the model is validated.
        raw_score: Image score before normalisation.
        scale: Conversion from raw image scores to shown ones.
        pixel_scale: Conversion for pixels, likewise.
        is_anomalous: Whether the model classifies the image as anomalous, None if it has no threshold.
        map: Raw anomaly map (h, w).
        contributions: Contribution of each part of the model. Maps and values add up to ``map`` and ``raw_score``.
        highest: Horizontal and vertical position of the highest pixel, in the pixels of ``Region.box``.
        regions: Regions of the map above the pixel threshold, the highest first; None if the model has no threshold.
        normal: Raw scores of normal images: those that calibrate the post-processor, or those of held-out images
            without this one.
        normal_clause: Which images these are, as the end of the clause "good images that …".
        p_value: Probability that a normal image has at least this score, from :func:`conformal_p_value`; None if there
            are no normal scores, or the score is NaN.
        why_no_p_value: Reason if there is no p-value.
    """

    picture: Picture
    score: float
    raw_score: float
    scale: Scale
    pixel_scale: Scale
    is_anomalous: bool | None
    map: Tensor
    contributions: dict[str, Contribution]
    highest: tuple[float, float]
    regions: tuple[Region, ...] | None
    normal: tuple[float, ...]
    normal_clause: str
    p_value: float | None
    why_no_p_value: str = ""

    @property
    def threshold(self) -> float | None:
        """Score above which an image is anomalous, on the scale of ``score``; None if the model has no threshold."""
        return self.scale.threshold

    @property
    def lowest_p_value(self) -> float | None:
        """The lowest p-value for this number of normal images; None without any."""
        return None if self.p_value is None else 1 / (len(self.normal) + 1)

    def p_value_in_words(self) -> str:
        """The p-value and whether it is the lowest possible one, or the reason why there is none."""
        if self.p_value is None:
            return self.why_no_p_value
        if self.p_value != self.lowest_p_value:
            return f"p = {self.p_value:.2g}"
        count = len(self.normal)
        allow = "1 good image allows" if count == 1 else f"{count} good images allow"
        return f"p ≤ {self.p_value:.2g}, the lowest that {allow}"

    def score_in_words(self) -> str:
        """The score and threshold as ``predict`` shows them, with the raw ones if these differ."""
        shown = _with_threshold(self.score, self.threshold)
        if self.scale.is_raw:
            return shown
        return f"{shown} (raw {_with_threshold(self.raw_score, self.scale.raw_threshold)})"

    def to_dict(self) -> dict[str, Any]:
        """The evidence as plain values for JSON, without the maps. Unknown values are None."""
        return {
            "picture": self.picture.name,
            "path": self.picture.path,
            "label": verdict_of(self.picture.label),
            "verdict": verdict_of(self.is_anomalous),
            "score": self.score,
            "threshold": self.threshold,
            "raw_score": self.raw_score,
            "raw_threshold": self.scale.raw_threshold,
            "pixel_threshold": self.pixel_scale.threshold,
            "contributions": {
                name: {"value": each.value, "share": self.share(name)} for name, each in self.contributions.items()
            },
            "highest_pixel": list(self.highest),
            "regions": None
            if self.regions is None
            else [{"box": list(each.box), "score": each.score, "p_value": each.p_value} for each in self.regions],
            "p_value": self.p_value,
            "lowest_p_value": self.lowest_p_value,
            "p_value_in_words": None if self.p_value is None else self.p_value_in_words(),
            "why_no_p_value": self.why_no_p_value or None,
            "normal_pictures": len(self.normal),
            "normal_pictures_that": self.normal_clause,
        }

    def share(self, name: str) -> float:
        """Share of a contribution in the raw score; 0 if the raw score is 0."""
        return self.contributions[name].value / self.raw_score if self.raw_score else 0.0


def conformal_p_value(score: float, normal: Iterable[float]) -> float:
    """Conformal p-value: the probability that a normal image has at least this score.

    The p-value is (1 + #{s_i ≥ s}) / (n + 1) for n held-out normal scores s_i. If the image is normal and exchangeable
    with the held-out ones, the p-value is at most p with probability at most p (Vovk, Gammerman and Shafer, Algorithmic
    learning in a random world, 2005). It is at least 1 / (n + 1).

    Args:
        score: Score of the image.
        normal: Scores of normal images that were used neither for the model nor for its thresholds.

    Returns:
        The p-value, in (0, 1].

    Example:
        >>> conformal_p_value(0.9, [0.1, 0.2, 0.9])
        0.5
    """
    return float(rank_p_values(score, sorted(normal)))


def image_scores(model: AnomalibModule, pictures: Iterable[Picture]) -> dict[str, float]:
    """Image scores before normalisation.

    Args:
        model: A fitted model of this package.
        pictures: Images that :func:`pictures_of` has prepared for the model.

    Returns:
        The scores by path, or by name for images without a file.
    """
    return {_key(picture): scored_map(model, picture)[0] for picture in pictures}


@torch.no_grad()
def scored_map(model: AnomalibModule, picture: Picture) -> tuple[float, Tensor]:
    """Image score and anomaly map (h, w) before normalisation. An online model does not update its memory.

    Args:
        model: A fitted model of this package.
        picture: The image that :func:`pictures_of` has prepared for the model.
    """
    anomaly_map = torch.stack([*_contributions(model, picture).values()]).sum(0)
    return float(anomaly_map.flatten()[_counted(model, anomaly_map)].mean()), anomaly_map


@torch.no_grad()
def evidence_of(model: AnomalibModule, picture: Picture, normal: NormalScores | None = None) -> Evidence:
    """Compute the evidence for the score of an image.

    An online model uses its current memory and does not update it.

    Args:
        model: A fitted model of this package.
        picture: The image that :func:`pictures_of` has prepared for the model.
        normal: Raw scores of held-out normal images, from :func:`image_scores`; by default the calibration scores of
            the post-processor.

    Returns:
        The evidence.

    Raises:
        RuntimeError: If the model is not fitted.
    """
    parts = _contributions(model, picture)
    anomaly_map = torch.stack([*parts.values()]).sum(0)
    counted = _counted(model, anomaly_map)
    raw_score = anomaly_map.flatten()[counted].mean()
    processed = _post_process(model, raw_score, anomaly_map)
    scale, pixel_scale = scale_of(model, "image"), scale_of(model, "pixel")
    score = float(torch.as_tensor(processed.pred_score))
    normal = normal or NormalScores.of_calibration(model) or NormalScores()
    others = normal.without(picture)
    why_none = _IS_NAN if raw_score.isnan() else "" if others else _ITSELF if normal.scores else normal.why_none
    ranked = _predicted_score(model, picture) if normal.is_calibration else float(raw_score)
    row, column = divmod(int(anomaly_map.argmax()), anomaly_map.shape[1])
    return Evidence(
        picture=picture,
        score=score,
        raw_score=float(raw_score),
        scale=scale,
        pixel_scale=pixel_scale,
        is_anomalous=None if scale.threshold is None else not score <= scale.threshold,
        map=anomaly_map,
        contributions={name: Contribution(each, float(each.flatten()[counted].mean())) for name, each in parts.items()},
        highest=_in_file(picture, (column + 0.5, row + 0.5, column + 0.5, row + 0.5))[:2],
        regions=None
        if None in {scale.threshold, pixel_scale.threshold}
        else _regions(picture, processed, anomaly_map, model.post_processor),
        normal=others,
        normal_clause=normal.clause,
        p_value=None if why_none else conformal_p_value(ranked, others),
        why_no_p_value=why_none,
    )


def _contributions(model: AnomalibModule, picture: Picture) -> dict[str, Tensor]:
    """Contribution of each part of the model to the map of an image, (h, w)."""
    torch_model: Any = model.model
    return {name: each[0, 0] for name, each in torch_model.contributions(picture.prepared[None]).items()}


def _predicted_score(model: AnomalibModule, picture: Picture) -> float:
    """Raw score as ``predict`` computes it. A sum of parts is rounded otherwise, and calibration images have this one.

    An online model does not update its memory.
    """
    ours: Any = model
    with ours.frozen():
        return float(ours.model(picture.prepared[None]).pred_score)


def _key(picture: Picture) -> str:
    return picture.path or picture.name


def _with_threshold(score: float, threshold: float | None) -> str:
    return f"{score:.4g}" + ("" if threshold is None else f", threshold {threshold:.4g}")


def verdict_of(is_anomalous: bool | None) -> str | None:
    """A verdict or a label in a word; None if it is unknown."""
    return None if is_anomalous is None else "anomalous" if is_anomalous else "normal"


def _counted(model: AnomalibModule, anomaly_map: Tensor) -> Tensor:
    """Indices of the pixels whose mean is the image score: the highest one, or a share of the highest ones."""
    count = round(getattr(model.model, "top_share", 0.0) * anomaly_map.numel())
    return anomaly_map.flatten().topk(max(1, count)).indices


def _post_process(model: AnomalibModule, score: Tensor, anomaly_map: Tensor) -> InferenceBatch:
    """Post-process a score and a map. Without a post-processor they do not change."""
    raw = InferenceBatch(pred_score=score[None], anomaly_map=anomaly_map[None, None])
    return model.post_processor(raw) if model.post_processor is not None else raw


def _in_file(picture: Picture, box: Extent) -> Extent:
    """Convert a box from pixels of the model's input to pixels of the file."""
    left, top, right, bottom = picture.extent or own_extent(picture)
    height, width = picture.image.shape[-2:]
    scales = ((right - left) / width, (bottom - top) / height) * 2
    x0, y0, x1, y1 = (each * scale for each, scale in zip(box, scales, strict=True))
    return left + x0, top + y0, left + x1, top + y1


def own_extent(picture: Picture) -> Extent:
    """Left, top, right and bottom edge of the model's input."""
    height, width = picture.image.shape[-2:]
    return 0.0, 0.0, float(width), float(height)


def _regions(
    picture: Picture, processed: InferenceBatch, anomaly_map: Tensor, processor: nn.Module | None
) -> tuple[Region, ...]:
    """Regions of the mask, ordered by their highest raw score."""
    shown = cast("Tensor", processed.anomaly_map)[0, 0].cpu().numpy()
    # anomalib's own boxes omit a region that fills the image.
    labels = label(cast("Tensor", processed.pred_mask)[0, 0].cpu().numpy(), connectivity=2)
    # Shown scores are clipped to 1, so that many may be equal.
    intensities = np.stack([anomaly_map.cpu().numpy(), shown], axis=-1)
    found = sorted(regionprops(labels, intensities), key=lambda each: -each.intensity_max[0])
    return tuple(
        Region(
            _in_file(picture, (x0, y0, x1, y1)),
            float(each.intensity_max[1]),
            _p_value(processor, each.intensity_max[0]),
        )
        for each in found
        for y0, x0, y1, x1 in [each.bbox]
    )


def _p_value(processor: nn.Module | None, peak: float) -> float | None:
    """P-value of the highest pixel of a region; None if it is NaN or there are no calibration scores of maps."""
    if np.isnan(peak) or not isinstance(processor, ConformalPostProcessor):
        return None
    p_value = processor.p_values_of_pixels(torch.tensor(peak))
    return None if p_value is None else float(p_value)
