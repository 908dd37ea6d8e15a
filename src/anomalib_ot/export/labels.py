"""Comparison of the labels and masks of an exported model with those of torch."""

from dataclasses import dataclass

import torch
from anomalib.data import InferenceBatch
from anomalib.models.components import AnomalibModule
from torch import Tensor

from anomalib_ot.host.scale import scale_of


@dataclass(frozen=True)
class Labels:
    """Labels (B,) and masks (B, h, w) on the CPU, each None without thresholding."""

    images: Tensor | None
    masks: Tensor | None

    @classmethod
    def of(cls, batch: InferenceBatch) -> "Labels":
        """Take them from a post-processed batch with masks (B, 1, h, w)."""
        labels, masks = (
            None if each is None else torch.as_tensor(each).cpu().bool() for each in (batch.pred_label, batch.pred_mask)
        )
        return cls(
            None if labels is None else labels.flatten(),
            None if masks is None else masks.reshape(-1, *masks.shape[-2:]),
        )


class LabelChanges:
    """Images and pixels for which an exported model decides otherwise than torch, and how far from the threshold.

    Rounding changes only what is near a threshold, or near the highest pixel, which is marked if no other one is. A
    model without a threshold has no labels and masks to compare.

    Args:
        module: The model in torch.
    """

    def __init__(self, module: AnomalibModule) -> None:
        self._image_limit = scale_of(module, "image").raw_threshold
        self._pixel_limit = scale_of(module, "pixel").raw_threshold
        self._images = self._pixels = 0
        self._image_distance = self._pixel_distance = 0.0

    def add(self, found: Labels, expected: Labels, scores: Tensor, maps: Tensor) -> None:
        """Compare a batch.

        Args:
            found: Those of the exported model. More than B are those of images that fill its batch.
            expected: Those of torch.
            scores: Raw scores (B,) of torch.
            maps: Raw maps (B, h, w) of torch.
        """
        distances = torch.full_like(scores, torch.inf)
        if self._image_limit is not None and expected.images is not None:
            changed = _changed(found.images, expected.images)
            distances = torch.where(changed, (scores - self._image_limit).abs(), torch.inf)
            self._images += int(changed.sum())
            # A file without labels differs in all images, however near they are.
            worst = torch.inf if found.images is None else _largest(distances[changed])
            self._image_distance = max(self._image_distance, worst)
        if self._pixel_limit is not None and expected.masks is not None:
            changed = _changed(found.masks, expected.masks)
            self._pixels += int(changed.sum())
            explained = distances[:, None, None].minimum(
                _distances(found.masks, expected.masks, maps, self._pixel_limit)
            )
            worst = torch.inf if found.masks is None else _largest(explained[changed])
            self._pixel_distance = max(self._pixel_distance, worst)

    def measured(self, span: float) -> dict[str, float]:
        """The numbers of changes, and their largest distances as shares of a range of raw scores."""
        return {
            "changed_labels": self._images,
            "label_difference": self._image_distance / span,
            "changed_pixels": self._pixels,
            "mask_difference": self._pixel_distance / span,
        }


def _distances(found: Tensor | None, expected: Tensor, maps: Tensor, limit: float) -> Tensor:
    """Smallest difference of maps (B, h, w) that may change each pixel of the mask of an image with its label."""
    distances = (maps - limit).abs()
    if found is None:
        return distances
    # Below the threshold, another pixel becomes the highest one if both move by half of their difference.
    marked = (found[: len(maps)].flatten(1).any(1) & expected.flatten(1).any(1))[:, None, None]
    gap = (maps.amax((-2, -1), keepdim=True) - maps) / 2
    return torch.where(marked & (maps <= limit), distances.minimum(gap), distances)


def _changed(found: Tensor | None, expected: Tensor) -> Tensor:
    return torch.ones_like(expected) if found is None else found[: len(expected)] != expected


def _largest(distances: Tensor) -> float:
    return float(distances.max()) if distances.numel() else 0.0
