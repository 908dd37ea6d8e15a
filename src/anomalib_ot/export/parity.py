"""Comparison of an exported model with the model in torch."""

import warnings
from collections.abc import Callable, Mapping
from math import isnan
from typing import Any, cast

import torch
from anomalib.data import InferenceBatch
from anomalib.models.components import AnomalibModule
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torchmetrics.functional.classification import binary_auroc

from anomalib_ot.decide.conformal import UnsupportedRateWarning
from anomalib_ot.decide.decision import Decision

from .labels import LabelChanges, Labels
from .normalization import Normalization, Scores
from .trial_images import TrialImages

# Images per batch of a dynamic graph. The last batch is usually smaller, which tries a second batch size.
_BATCH = 4
# Maps are reduced by this factor for rank correlation and AUROC.
_REDUCTION = 4

Runner = Callable[[Tensor], InferenceBatch]


def compare(
    module: AnomalibModule,
    runners: Mapping[str, Runner],
    images: TrialImages,
    batch_size: int | None,
    decision: Decision | None = None,
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Compare exported models with the model in torch.

    The maps and scores that are compared are not yet clipped to [0, 1] by the post-processor, since clipping would hide
    differences. The reference is the model as anomalib's engine runs it, with the pre-processor's own resizing.

    Args:
        module: The model, in evaluation mode.
        runners: The exported models by name. Each returns, for images (B, 3, h, w), anomaly maps and scores that the
            post-processor has normalised but not clipped, and its labels and masks.
        images: Images to run them on.
        batch_size: Images per call, None for a dynamic batch.
        decision: The decision beside the exported model, if it has one.

    Returns:
        Image and pixel AUROC of the model in torch, None without both normal and anomalous images. For each exported
        model: the same; the largest difference of maps and of scores as a share of the range of torch's maps, on these
        images or in the model's validation, whichever is wider; the rank correlation of the maps' pixels; the number of
        images and of pixels whose labels and masks differ, and their largest distance from the threshold, as a share
        of the same range. With a decision, also the number of images for which it decides otherwise than torch, and
        their largest distance.
    """
    scale = Normalization(module.post_processor)
    reference = _Record()
    records = {name: _Record() for name in runners}
    changes = {name: LabelChanges(module) for name in runners}
    labels: list[bool | None] = []
    masks: list[Tensor | None] = []
    for batch in images.batches(batch_size or _BATCH):
        shown = images.read(batch)
        raw = _run_as_engine(module, shown.images)
        expected, decided = Scores.of(raw), Labels.of(_decided(module, raw))
        reference.add(expected, expected)
        # Copies of the last image complete a batch of a fixed size.
        missing = (batch_size or len(batch)) - len(batch)
        filled = torch.cat([shown.images, shown.images[-1:].expand(missing, -1, -1, -1)])
        for name, run in runners.items():
            found = run(filled)
            records[name].add(scale.undo(Scores.of(found).first(len(batch))), expected)
            changes[name].add(Labels.of(found), decided, expected.scores, expected.maps)
        labels += shown.labels
        masks += shown.masks
    truth = _Truth(labels, masks)
    span = max(reference.highest - reference.lowest, scale.width, torch.finfo(torch.float32).tiny)
    measured = {
        name: {
            "map_difference": record.map_difference / span,
            "score_difference": record.score_difference / span,
            "rank_correlation": _rank_correlation(record.maps, reference.maps),
            **truth.auroc(record),
            **changes[name].measured(span),
            **(_verdicts(module, decision, record.scores, reference.scores, span) if decision else {}),
        }
        for name, record in records.items()
    }
    return truth.auroc(reference), measured


def _verdicts(
    module: AnomalibModule, decision: Decision, scores: Tensor, expected: Tensor, span: float
) -> dict[str, float]:
    """Compare the verdicts of a decision on exported scores with those of the post-processor on torch's."""
    with warnings.catch_warnings():
        # The post-processor has said that it lacks images.
        warnings.simplefilter("ignore", UnsupportedRateWarning)
        # As the exported model shows them, in single precision.
        shown = scores.float() if decision.image.scale is None else decision.image.scale.shown(scores).float()
        raw_scores, limit = decision.raw_scores(shown.numpy()), decision.threshold()
        verdicts = torch.from_numpy(decision.is_anomalous(raw_scores))
    raw = InferenceBatch(pred_score=expected.float().to(module.device))
    labels = cast("nn.Module", module.post_processor)(raw).pred_label
    if labels is None:
        return {}
    changed = verdicts != labels.cpu()
    distances = (expected - limit).abs()[changed] / span
    return {"changed_verdicts": int(changed.sum()), "verdict_difference": max(distances.tolist(), default=0.0)}


def run_exported_module(module: AnomalibModule) -> Runner:
    """Return a function that runs a module loaded from an export, with maps and scores normalised but not clipped."""
    scale = Normalization(module.post_processor)

    @torch.inference_mode()
    def run(images: Tensor) -> InferenceBatch:
        images = images.to(module.device)
        raw = module.model(module.pre_processor(images) if module.pre_processor else images)
        scores, decided = scale.apply(Scores.of(raw)), _decided(module, raw)
        return InferenceBatch(scores.scores, decided.pred_label, scores.maps, decided.pred_mask)

    return run


@torch.inference_mode()
def _run_as_engine(module: AnomalibModule, images: Tensor) -> InferenceBatch:
    transform = getattr(module.pre_processor, "transform", None)
    images = images.to(module.device)
    return module.model(transform(images) if transform else images)


@torch.inference_mode()
def _decided(module: AnomalibModule, raw: InferenceBatch) -> InferenceBatch:
    return module.post_processor(raw) if module.post_processor else raw


class _Record:
    """Maps, reduced in size, and scores of a model on all images, and its largest differences from torch."""

    def __init__(self) -> None:
        self.map_difference = self.score_difference = 0.0
        self.lowest, self.highest = float("inf"), -float("inf")
        self._maps: list[Tensor] = []
        self._scores: list[Tensor] = []

    def add(self, scores: Scores, expected: Scores) -> None:
        self.map_difference = _largest(self.map_difference, scores.maps - expected.maps)
        self.score_difference = _largest(self.score_difference, scores.scores - expected.scores)
        self.lowest = min(self.lowest, float(scores.maps.min()))
        self.highest = max(self.highest, float(scores.maps.max()))
        self._maps.append(_reduced(scores.maps))
        self._scores.append(scores.scores)

    @property
    def maps(self) -> Tensor:
        return torch.cat(self._maps)

    @property
    def scores(self) -> Tensor:
        return torch.cat(self._scores)


def _largest(so_far: float, difference: Tensor) -> float:
    """Largest absolute value so far. NaN stays NaN."""
    return float(torch.cat([torch.tensor([so_far]), difference.abs().flatten()]).max())


def _reduced(maps: Tensor) -> Tensor:
    return F.avg_pool2d(maps[:, None], min(_REDUCTION, *maps.shape[-2:]))[:, 0]


def _rank_correlation(maps: Tensor, expected: Tensor) -> float | None:
    """Rank correlation of the pixels, None for constant maps, which have no order."""
    correlation = float(spearmanr(maps.flatten().numpy(), expected.flatten().numpy()).statistic)
    return None if isnan(correlation) else correlation


class _Truth:
    """Labels and masks of the images, None if unknown."""

    def __init__(self, labels: list[bool | None], masks: list[Tensor | None]) -> None:
        self._labels = None if None in labels else torch.tensor(labels)
        self._masks: Tensor | None = None
        shown = [mask for mask in masks if mask is not None]
        is_known = all(mask is not None or not label for mask, label in zip(masks, labels, strict=True))
        if self._labels is not None and shown and is_known:
            # Some data modules give normal images no mask, others an empty one.
            blank = torch.zeros_like(shown[0])
            self._masks = torch.stack([blank if mask is None else mask for mask in masks]).float()

    def auroc(self, record: _Record) -> dict[str, float | None]:
        return {
            "image_AUROC": _auroc(record.scores, self._labels),
            "pixel_AUROC": _auroc(record.maps, self._masks_like(record.maps)),
        }

    def _masks_like(self, maps: Tensor) -> Tensor | None:
        """The masks at the size of the reduced maps. A model that resizes its input has maps of another size."""
        return None if self._masks is None else F.adaptive_max_pool2d(self._masks[:, None], maps.shape[-2:])[:, 0] > 0


def _auroc(scores: Tensor, truth: Tensor | None) -> float | None:
    if truth is None or truth.all() or not truth.any():
        return None
    return float(binary_auroc(scores.flatten(), truth.flatten().long()))
