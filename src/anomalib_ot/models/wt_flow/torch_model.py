"""WT-Flow: time-reversed flow matching with worst transport (Li et al., 2025, arXiv 2508.05461)."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, cast

import torch
from anomalib.data import InferenceBatch
from anomalib.models.components import DynamicBufferMixin
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from anomalib_ot.features.anomaly_map import AnomalyMapGenerator
from anomalib_ot.features.backbones import prepare_extractor
from anomalib_ot.features.extraction import full_precision
from anomalib_ot.features.moments import nearest_cells
from anomalib_ot.features.scorer import FeatureScorer
from anomalib_ot.features.single_precision import SinglePrecisionParts
from anomalib_ot.features.whitening import LocalWhitening
from anomalib_ot.settings import require

from .settings import WtFlowSettings
from .velocity import VelocityField

if TYPE_CHECKING:
    from anomalib_ot.features.map_extractor import MapExtractor

# Whitening relies more on the covariance at a cell than Pradot's, which only compares features with each other.
_SHRINKAGE = 0.01
_PRIOR = 0.1


class WtFlowModel(FeatureScorer):
    """Frozen features, and a velocity field with its scores for each layer.

    The flow runs from the features x_0 at t = 0 to Gaussian noise x_1 at t = 1 on the straight lines
    x_t = (1 − t) x_0 + t x_1, and the field v(x_t, t) is regressed on x_1 − x_0.

    Args:
        settings: The settings that :class:`WtFlow` documents.
        feature_extractor: Extractor of another model of the same settings to share; by default a new one.

    Raises:
        ValueError: If the backbone lacks a layer.

    Example:
        >>> model = WtFlowModel(WtFlowSettings(backbone="resnet18", pre_trained=False, width=16))
        >>> features = model.extract(torch.rand(8, 3, 64, 64))
        >>> model.fit_normalization([features])
        >>> model.eval()(torch.rand(2, 3, 64, 64)).anomaly_map.shape
        torch.Size([2, 1, 64, 64])
    """

    single_precision = ("anomaly_map_generator",)

    def __init__(self, settings: WtFlowSettings, feature_extractor: "MapExtractor | None" = None) -> None:
        super().__init__()
        self.tiler = None
        self.settings = settings
        self.layers = settings.layer_names
        self.feature_extractor = feature_extractor or prepare_extractor(
            settings.backbone, self.layers, settings.pre_trained
        )
        channels = dict(zip(self.feature_extractor.layers, self.feature_extractor.out_dims, strict=True))
        self.heads = nn.ModuleList(_Head(channels[layer], settings) for layer in self.layers)
        self.anomaly_map_generator = AnomalyMapGenerator(settings.smoothing, align_corners=True)

    @property
    def is_fitted(self) -> bool:
        """Whether there is a normalisation, from training or a checkpoint."""
        return all(cast("_Head", head).noise.numel() > 0 for head in self.heads)

    def fit_normalization(self, batches: Iterable[dict[str, Tensor]]) -> None:
        """Estimate how the features of normal images vary, and draw the noise of ``mismatch``.

        Args:
            batches: Feature maps (B, D, H, W) of the training images.

        Raises:
            ValueError: If the maps are too small for the velocity field.
        """
        heads = [cast("_Head", head) for head in self.heads]
        for head in heads:
            head.reset()
        for features in batches:
            for layer, head in zip(self.layers, heads, strict=True):
                head.count_in(features[layer])
        for head in heads:
            head.compute()

    def embed(self, features: dict[str, Tensor]) -> list[Tensor]:
        """Pooled and normalised feature maps (B, C, H, W) of each layer, the start of the flow."""
        return [cast("_Head", head).embed(features[layer]) for layer, head in zip(self.layers, self.heads, strict=True)]

    def velocities(self) -> nn.ModuleList:
        """The velocity field of each layer."""
        return nn.ModuleList(cast("_Head", head).velocity for head in self.heads)

    def score(self, features: dict[str, Tensor], size: Sequence[int]) -> InferenceBatch:
        """Score feature maps (B, D, H, W) of each layer.

        Args:
            features: The feature maps.
            size: Height and width of the images, in pixels.

        Returns:
            The anomaly map (B, 1, h, w) and the image score (B,), the mean of the highest ``top_share`` of its pixels,
            of one pixel at least.

        Raises:
            RuntimeError: If the model is not fitted.
        """
        anomaly_map = self.anomaly_map_generator(self.layer_scores(features), size)
        return InferenceBatch(pred_score=self._image_score(anomaly_map), anomaly_map=anomaly_map)

    def layer_scores(self, features: dict[str, Tensor]) -> list[Tensor]:
        """Score map (B, 1, H, W) of each layer, which the anomaly map is the sum of.

        Args:
            features: Feature maps (B, D, H, W) of each layer.

        Raises:
            RuntimeError: If the model is not fitted.
        """
        self._require_fit()
        return [score / len(self.layers) for score in self.scores(features)]

    def _require_fit(self) -> None:
        if not self.is_fitted:
            msg = "WtFlow knows no normal features yet: fit it, or load a checkpoint with ckpt_path"
            raise RuntimeError(msg)

    @torch.no_grad()
    def contributions(self, images: Tensor) -> dict[str, Tensor]:
        """Contribution of each layer to the anomaly map, which is their sum.

        Args:
            images: (B, 3, h, w), pre-processed.

        Returns:
            (B, 1, h, w) for each layer.

        Raises:
            RuntimeError: If the model is not fitted.
        """
        scores = self.layer_scores(self.extract(images))
        return {
            layer: self.anomaly_map_generator([score], images.shape[-2:])
            for layer, score in zip(self.layers, scores, strict=True)
        }

    @torch.no_grad()
    def trajectories(self, images: Tensor, steps: int) -> dict[str, Tensor]:
        """Compute the trajectories of the flow from features to noise, by Euler steps.

        Args:
            images: (B, 3, h, w), pre-processed.
            steps: Number of steps from t = 0 to 1, at least 1. Scores use ``euler_steps``.

        Returns:
            For each layer x_t at the times t = 0, 1 / steps, …, 1, (steps + 1, B, C, H, W).

        Raises:
            ValueError: If the number of steps is below 1.
            RuntimeError: If the model is not fitted.
        """
        require(steps >= 1, "steps", "at least 1", steps)
        self._require_fit()
        features = self.extract(images)
        ways = {}
        with full_precision(features):
            for layer, head, maps in zip(self.layers, self.heads, self.embed(features), strict=True):
                way = [maps]
                for number in range(steps):
                    way.append(cast("_Head", head).step(way[-1], number, steps))
                ways[layer] = torch.stack(way)
        return ways

    @property
    def top_share(self) -> float:
        """Share of the pixels, the highest ones, whose mean is the image score; 0 for the maximum."""
        return self.settings.top_share

    def _image_score(self, anomaly_map: Tensor) -> Tensor:
        pixels = anomaly_map.flatten(1)
        count = round(self.top_share * anomaly_map.shape[-2] * anomaly_map.shape[-1])
        # For a single pixel, the maximum is much faster than sorting.
        return pixels.topk(count, dim=1).values.mean(1) if count > 1 else pixels.amax(1)

    def scores(self, features: dict[str, Tensor]) -> list[Tensor]:
        """Compute the score map of each layer, as ``score`` defines it.

        ``log_density`` is −log p = ½ mean_c y², for the end y of the flow that starts at the features; ``density`` is
        max p − p with the maximum over the image (paper); ``mismatch`` is the mean of ``|v(x_t, t) − (z − x)|²`` over
        times t and noise z, with x_t = (1 − t) x + t z (Flow Mismatching, 2026, arXiv 2605.23070). The noise is the
        same for all images.

        Args:
            features: Feature map (B, D, H, W) of each layer.

        Returns:
            (B, 1, H', W') for each layer, at least 0.
        """
        # Features far from normal would overflow in float16 and become NaN.
        with full_precision(features):
            return [
                self._score(cast("_Head", head), maps)
                for head, maps in zip(self.heads, self.embed(features), strict=True)
            ]

    def _score(self, head: "_Head", maps: Tensor) -> Tensor:
        if self.settings.score == "mismatch":
            return head.mismatch(maps, self.settings.mismatch_times)
        minus_log_density = head.flow(maps, self.settings.euler_steps).square().mean(1, keepdim=True) / 2
        if self.settings.score == "log_density":
            return minus_log_density
        density = torch.exp(-minus_log_density)
        return density.amax((-2, -1), keepdim=True) - density


class _Head(DynamicBufferMixin, SinglePrecisionParts):
    """Normalisation and velocity field of one layer.

    Args:
        channels: D, of the layer's feature maps.
        settings: The settings of the model.
    """

    single_precision = ("normalization",)
    noise: Tensor

    def __init__(self, channels: int, settings: WtFlowSettings) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(3, 2, 1) if settings.pooling else nn.Identity()
        # From feature maps (B, D, H, W) to (B, C, H, W).
        self.normalization: nn.Module = _LayerNorm()
        if settings.normalization == "whitening":
            self.normalization = LocalWhitening(
                settings.whitened_channels, _SHRINKAGE, _PRIOR, centred=True, max_modes=settings.global_modes
            )
            channels = min(channels, settings.whitened_channels)
        self.velocity = VelocityField(channels, settings.width, settings.depth)
        # Noise maps for ``mismatch``.
        self.draws = len(settings.mismatch_times) * settings.mismatch_draws
        # (H, W, draws, C), set by the fit.
        self.register_buffer("noise", torch.empty(0))
        self._shape: torch.Size | None = None

    def reset(self) -> None:
        if isinstance(self.normalization, LocalWhitening):
            self.normalization.reset()

    def count_in(self, maps: Tensor) -> None:
        pooled = self.pool(maps)
        self.velocity.check_size(*pooled.shape[-2:])
        self._shape = pooled.shape
        if isinstance(self.normalization, LocalWhitening):
            self.normalization.update(pooled)

    def compute(self) -> None:
        if self._shape is None:
            msg = "there are no features to normalise by; give at least one batch of feature maps"
            raise RuntimeError(msg)
        if isinstance(self.normalization, LocalWhitening):
            self.normalization.compute()
        channels = self.velocity.first.in_channels
        shape = (*self._shape[-2:], self.draws, channels)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        self.noise = noise.to(self.velocity.frequencies.device)

    def embed(self, maps: Tensor) -> Tensor:
        return self.normalization(self.pool(maps.float()))

    def flow(self, maps: Tensor, steps: int) -> Tensor:
        """The end of the flow, by Euler steps."""
        for number in range(steps):
            maps = self.step(maps, number, steps)
        return maps

    def step(self, maps: Tensor, number: int, steps: int) -> Tensor:
        """x_t after Euler step ``number`` of ``steps``, counted from 0."""
        return maps + self._velocity(maps, number / steps) / steps

    def mismatch(self, maps: Tensor, times: Sequence[float]) -> Tensor:
        noise = nearest_cells(self.noise, *maps.shape[-2:]).permute(2, 3, 0, 1)
        scores = []
        for index, draw in enumerate(noise):
            time = times[index % len(times)]
            velocity = self._velocity((1 - time) * maps + time * draw, time)
            scores.append((velocity - (draw - maps)).square().mean(1, keepdim=True))
        return torch.stack(scores).mean(0)

    def _velocity(self, maps: Tensor, time: float) -> Tensor:
        return self.velocity(maps, torch.full((1,), time, device=maps.device)).float()


class _LayerNorm(nn.Module):
    """Layer normalisation over (C, H, W) without parameters."""

    def forward(self, maps: Tensor) -> Tensor:
        return F.layer_norm(maps, maps.shape[1:])
