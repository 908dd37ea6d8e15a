"""Duo: Pradot and WtFlow on the features of one backbone, with one anomaly map."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from anomalib.data import InferenceBatch
from anomalib.data.utils.tiler import Tiler
from torch import Tensor

from anomalib_ot.features.anomaly_map import AnomalyMapGenerator, by_maximum
from anomalib_ot.features.backbones import prepare_extractor
from anomalib_ot.features.scorer import FeatureScorer
from anomalib_ot.models.pradot import PradotModel
from anomalib_ot.models.wt_flow import WtFlowModel

from .settings import DuoSettings

if TYPE_CHECKING:
    from anomalib_ot.features.map_extractor import MapExtractor

PartScores = tuple[list[Tensor], list[Tensor]]
"""Score maps (B, 1, H, W) of the layers of Pradot, and of those of WtFlow."""


class DuoModel(FeatureScorer):
    """A :class:`PradotModel` and a :class:`WtFlowModel` that share their feature extractor.

    The anomaly map is the weighted sum of the two maps. The weights bring both to one scale, see :meth:`weigh`.

    Args:
        settings: The settings that :class:`Duo` documents.
        feature_extractor: Extractor of another model of the same settings to share; by default a new one.

    Attributes:
        pradot: The prototypes.
        wt_flow: The flow.
        weights: Weight of each of the two maps, (2,).

    Raises:
        ValueError: If the backbone lacks a layer.

    Example:
        >>> settings = DuoSettings(
        ...     backbone="resnet18",
        ...     layers=["layer3"],
        ...     pre_trained=False,
        ...     pradot={"prototypes_per_cell": 1},
        ...     wt_flow={"width": 16},
        ... )
        >>> model = DuoModel(settings).eval()
        >>> features = model.extract(torch.rand(8, 3, 64, 64))
        >>> model.pradot.fit_whitening([features])
        >>> model.pradot.initialise(features)
        >>> model.wt_flow.fit_normalization([features])
        >>> model.weigh([model.part_scores(features)], (64, 64))
        >>> model(torch.rand(2, 3, 64, 64)).anomaly_map.shape
        torch.Size([2, 1, 64, 64])
    """

    single_precision = ("weights",)
    pradot: PradotModel
    wt_flow: WtFlowModel
    weights: Tensor

    def __init__(self, settings: DuoSettings, feature_extractor: "MapExtractor | None" = None) -> None:
        super().__init__()
        self.settings = settings
        self.feature_extractor = feature_extractor or prepare_extractor(
            settings.backbone, settings.layer_names, settings.pre_trained
        )
        self.pradot = PradotModel(settings.of_pradot(), self.feature_extractor)
        self.wt_flow = WtFlowModel(settings.of_wt_flow(), self.feature_extractor)
        self.register_buffer("weights", torch.full((2,), 0.5))

    @property
    def anomaly_map_generator(self) -> AnomalyMapGenerator:
        """The generator that has the limit of the smoothing, that of Pradot."""
        return self.pradot.anomaly_map_generator

    @property
    def tiler(self) -> Tiler | None:
        """The tiles of images that are larger than memory; None for whole images."""
        return self.pradot.tiler

    @tiler.setter
    def tiler(self, tiler: Tiler | None) -> None:
        self.pradot.tiler = self.wt_flow.tiler = tiler

    def score(self, features: dict[str, Tensor], size: Sequence[int]) -> InferenceBatch:
        """Score feature maps (B, D, H, W) of each layer.

        Args:
            features: The feature maps.
            size: Height and width of the images, in pixels.

        Returns:
            The anomaly map (B, 1, h, w) and the image score (B,), its maximum.

        Raises:
            RuntimeError: If the model is not fitted.
        """
        return self.combine(self.part_scores(features), size)

    def part_scores(self, features: dict[str, Tensor]) -> PartScores:
        """Score maps of the layers of both parts for feature maps (B, D, H, W) of each layer.

        Raises:
            RuntimeError: If the model is not fitted.
        """
        self._require_fit()
        return self.pradot.layer_scores(features), self.wt_flow.layer_scores(features)

    def combine(self, scores: PartScores, size: Sequence[int]) -> InferenceBatch:
        """Combine score maps of the parts, as :meth:`score` does.

        Args:
            scores: Result of :meth:`part_scores`.
            size: Height and width of the images, in pixels.

        Returns:
            As :meth:`score`.
        """
        first, second = self._maps(scores, size)
        return by_maximum(self.weights[0] * first + self.weights[1] * second)

    @torch.no_grad()
    def weigh(self, batches: Iterable[PartScores], size: Sequence[int]) -> None:
        """Weigh the parts by the inverse of how much their scores of normal images vary.

        A part whose scores of normal images vary less finds smaller anomalies. Divided by their standard deviation,
        equal scores of the parts are equally unusual.

        Args:
            batches: Score maps of both parts for images that the parts were not fitted on. A single image says nothing
                about a standard deviation: its scores replace it.
            size: Height and width of the images, in pixels.

        Raises:
            ValueError: If a score is not finite.
        """
        peaks = [[each.flatten(1).amax(1) for each in self._maps(scores, size)] for scores in batches]
        highest = torch.stack([torch.cat(part) for part in zip(*peaks, strict=True)])
        if not highest.isfinite().all():
            msg = "the scores of left-out images are NaN or infinite, and weigh no parts"
            raise ValueError(msg)
        spread = highest.std(1) if highest.shape[1] > 1 else highest[:, 0]
        # Equal scores give no scale.
        self.weights = 0.5 / spread.clamp(min=1e-6 * float(spread.max()) or 1.0)

    @torch.no_grad()
    def contributions(self, images: Tensor) -> dict[str, Tensor]:
        """Contribution of each part's maps to the anomaly map, which is their sum.

        Args:
            images: (B, 3, h, w), pre-processed.

        Returns:
            (B, 1, h, w) for each contribution to the map of Pradot and to that of WtFlow; named after both.

        Raises:
            RuntimeError: If the model is not fitted.
        """
        self._require_fit()
        return {
            f"{name}, {each}": weight * contribution
            for name, contributions, weight in zip(
                ("Pradot", "WtFlow"),
                (self.pradot.contributions(images), self.wt_flow.contributions(images)),
                self.weights,
                strict=True,
            )
            for each, contribution in contributions.items()
        }

    def _maps(self, scores: PartScores, size: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The map (B, 1, h, w) of each part."""
        pradot, wt_flow = scores
        return self.pradot.anomaly_map_generator(pradot, size), self.wt_flow.anomaly_map_generator(wt_flow, size)

    def _require_fit(self) -> None:
        if not (self.pradot.is_initialised and self.wt_flow.is_fitted):
            msg = "Duo is not fitted yet: fit it, or load a checkpoint with ckpt_path"
            raise RuntimeError(msg)
