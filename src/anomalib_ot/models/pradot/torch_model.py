"""PRADOT: prototypes learned by optimal transport (Trombetta and Lartizien, 2025, arXiv 2508.12927)."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import ceil, sqrt
from statistics import fmean
from typing import Any, Literal, cast, get_args

import torch
from anomalib.data import InferenceBatch
from anomalib.models.components import DynamicBufferMixin
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from anomalib_ot.components.backbones import create_extractor
from anomalib_ot.components.whitening import LocalWhitening
from anomalib_ot.transport import (
    FusedCost,
    SpatialCost,
    TransportPlan,
    Workspace,
    grid_coordinates,
    sinkhorn,
    spatial_cost,
)

from .anomaly_map import AnomalyMapGenerator

Initialisation = Literal["sample", "normal", "uniform"]


@dataclass(frozen=True)
class PrototypeSettings:
    """How prototypes are learned and compared; the defaults are those that measured best.

    Args:
        spatial: ``squared`` distance of positions as in the paper, or ``euclidean`` as in the authors' code.
        initialisation: ``sample`` starts at features of training images, ``normal`` at N(0, 1) as in the paper,
            ``uniform`` at U(0, 1) as in the authors' code.
        ema_rate: η of eq. 5, in [0, 1].
        ema_warm_up: Keep min(η, t / (t + 1)) in step t, so that early prototypes are the plain mean of the start and
            all barycentres and the start is soon forgotten. The paper keeps η from the first step.
        epsilon: Entropic regularisation ε of eq. 4, positive.
        sinkhorn_iterations: Largest number of Sinkhorn iterations in a step.
        sinkhorn_tolerance: L1 error of the marginals at which the iterations stop; 0 runs all of them.
        free_coordinates: Move the coordinates to the barycentre of the coordinates sent to them.
        normalize_score: Score with both costs divided by their maxima over the image, as in the authors' code, rather
            than the plain cost of eq. 1, as in the paper's eq. 6.

    Raises:
        ValueError: If a setting is out of its range.
    """

    spatial: SpatialCost = "euclidean"
    initialisation: Initialisation = "sample"
    ema_rate: float = 0.95
    ema_warm_up: bool = True
    epsilon: float = 0.01
    sinkhorn_iterations: int = 100
    sinkhorn_tolerance: float = 0.1
    free_coordinates: bool = False
    normalize_score: bool = True

    def __post_init__(self) -> None:
        _require(self.spatial in get_args(SpatialCost), "spatial", get_args(SpatialCost), self.spatial)
        _require(
            self.initialisation in get_args(Initialisation),
            "initialisation",
            get_args(Initialisation),
            self.initialisation,
        )
        _require(0 <= self.ema_rate <= 1, "ema_rate", "in [0, 1]", self.ema_rate)
        _require(self.epsilon > 0, "epsilon", "positive", self.epsilon)
        _require(self.sinkhorn_iterations >= 1, "sinkhorn_iterations", "at least 1", self.sinkhorn_iterations)
        _require(self.sinkhorn_tolerance >= 0, "sinkhorn_tolerance", "at least 0", self.sinkhorn_tolerance)


class Prototypes(DynamicBufferMixin, nn.Module):
    """The prototypes of one layer and one α, each with a coordinate.

    Args:
        per_cell: Prototypes in a cell of the feature map, n. Below 1, the prototypes have a coarser grid of their own,
            with this many cells for one of the feature map.
        alpha: Weight of the spatial cost, in [0, 1]; 0 makes the prototypes global.
        settings: How they are learned and compared.
        workspace: Memory to solve the transport in; prototypes that learn one after another may share it.

    Raises:
        ValueError: If an argument is out of its range.
    """

    features: Tensor
    coordinates: Tensor
    potential: Tensor
    steps: Tensor

    def __init__(
        self, per_cell: float, alpha: float, settings: PrototypeSettings, workspace: Workspace | None = None
    ) -> None:
        super().__init__()
        _require(0 <= alpha <= 1, "each of alphas", "in [0, 1]", alpha)
        _require(
            0 < per_cell < 1 or (per_cell >= 1 and per_cell == int(per_cell)),
            "prototypes_per_cell",
            "a whole number or between 0 and 1",
            per_cell,
        )
        if per_cell < 1 and settings.free_coordinates:
            msg = "free_coordinates needs prototypes_per_cell of at least 1: a coarser grid has fixed coordinates"
            raise ValueError(msg)
        self.per_cell = per_cell
        self.alpha = alpha
        self.settings = settings
        # (n, G, D) and (n or 1, G, 2) for n prototypes in each of G cells, and (n·G,); known with the first batch.
        self.register_buffer("features", torch.empty(0, dtype=torch.float32))
        self.register_buffer("coordinates", torch.empty(0, dtype=torch.float32))
        self.register_buffer("potential", torch.empty(0, dtype=torch.float32))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self._workspace = workspace or Workspace()

    @property
    def is_initialised(self) -> bool:
        """Whether there are prototypes, from training or a checkpoint."""
        return self.features.numel() > 0

    def initialise(self, features: Tensor) -> None:
        """Create the prototypes.

        Args:
            features: Feature maps (B, D, H, W) of the first batch of training images.
        """
        height, width = features.shape[-2:]
        per_cell = max(1, int(self.per_cell))
        if self.per_cell < 1:
            height, width = (ceil(side * sqrt(self.per_cell)) for side in (height, width))
        shape = (per_cell, height * width, features.shape[1])
        if self.settings.initialisation == "normal":
            start = torch.randn(shape, dtype=torch.float32)
        elif self.settings.initialisation == "uniform":
            start = torch.rand(shape, dtype=torch.float32)
        else:
            coarse = F.adaptive_avg_pool2d(features.float(), (height, width)).flatten(2).mT
            rounds = [torch.randperm(len(coarse)) for _ in range(ceil(per_cell / len(coarse)))]
            start = coarse[torch.cat(rounds)[:per_cell].to(coarse.device)]
        self.features = start.to(features.device)
        grid = grid_coordinates(height, width, device=features.device)
        self.coordinates = grid.expand(per_cell if self.settings.free_coordinates else 1, -1, -1).clone()

    @torch.no_grad()
    def transport(self, features: Tensor) -> tuple[TransportPlan, Tensor, Tensor]:
        """Solve eq. 4 from a batch of embeddings to the prototypes.

        Args:
            features: Feature maps (B, D, H, W).

        Returns:
            The plan, the embeddings (B·H·W, D) and their coordinates (B·H·W, 2).
        """
        batch, channels, height, width = features.shape
        embeddings = features.float().permute(0, 2, 3, 1).reshape(-1, channels)
        grid = grid_coordinates(height, width, device=features.device)
        prototypes = self.features.flatten(0, 1)
        coordinates = self.coordinates.expand(len(self.features), -1, -1).flatten(0, 1)
        cost = FusedCost(
            embeddings,
            prototypes,
            grid,
            coordinates,
            self.alpha,
            self.settings.spatial,
            workspace=self._workspace,
        )
        plan = sinkhorn(
            cost,
            self.settings.epsilon,
            self.settings.sinkhorn_iterations,
            self.settings.sinkhorn_tolerance,
            potential=self.potential if self.potential.numel() else None,
            workspace=self._workspace,
        )
        return plan, embeddings, grid.repeat(batch, 1)

    def update(self, features: Tensor) -> float:
        """One training step: move the prototypes to their barycentres (eq. 5).

        Args:
            features: Feature maps (B, D, H, W).

        Returns:
            The transport cost ⟨T, M⟩ before the step.
        """
        plan, embeddings, coordinates = self.transport(features)
        self.steps += 1
        moved = 1 - self.settings.ema_rate
        if self.settings.ema_warm_up:
            moved = max(moved, 1 / (1 + int(self.steps)))
        self.features.lerp_(plan.barycentres(embeddings).view_as(self.features), moved)
        if self.settings.free_coordinates:
            self.coordinates = plan.barycentres(coordinates).view_as(self.coordinates)
        self.potential = plan.potential
        return plan.transport_cost()

    def forward(self, features: Tensor) -> Tensor:
        """Score of each cell, the least cost over the prototypes (eq. 6).

        Args:
            features: Feature maps (B, D, H, W).

        Returns:
            (B, 1, H, W).
        """
        batch, _, height, width = features.shape
        cells = F.normalize(features.float().flatten(2).mT, dim=-1)
        prototypes = F.normalize(self.features, dim=-1)
        similarities = [cells @ group.mT for group in prototypes]
        feature_scale: Tensor | float = 1 - self.alpha
        if self.settings.normalize_score:
            lowest = torch.stack([similarity.flatten(1).amin(1) for similarity in similarities]).amin(0)
            feature_scale = feature_scale / (1 - lowest).view(-1, 1, 1)
        if self.alpha > 0:
            grid = grid_coordinates(height, width, device=features.device)
            space = spatial_cost(grid, self.coordinates, self.settings.spatial)
            space = space * (self.alpha / (space.max() if self.settings.normalize_score else 1))
        # The least cost is the scale less the largest of what lowers the cost: fewer passes over the large matrices.
        # A group holds one prototype of each cell, so that groups share the spatial cost.
        best = []
        for index, similarity in enumerate(similarities):
            gain = feature_scale * similarity
            if self.alpha > 0:
                gain = gain - space[index if self.settings.free_coordinates else 0]
            best.append(gain.amax(-1, keepdim=True))
        score = (feature_scale - torch.stack(best).amax(0)).clamp(min=0)
        return score.view(batch, 1, height, width)


class PradotModel(nn.Module):
    """Multi-layer frozen features and their local and global prototypes.

    Prototypes and maps stay in float32 whatever the precision of the backbone: an update of a twentieth, and the
    differences between costs, are smaller than bfloat16 resolves.

    Args:
        backbone: Name of a timm model, or ``local-dir:PATH``.
        layers: Layers to take features from.
        pre_trained: Whether to load the backbone's pre-trained weights.
        prototypes_per_cell: n, one for all layers or one per layer; see :class:`Prototypes`.
        alphas: Weights of the spatial cost; prototypes are learned for each.
        settings: How prototypes are learned and compared.
        smoothing: Standard deviation of the Gaussian that smooths the anomaly map, in pixels; 0 for none.
        whitened_channels: Whiten the features locally, after a random projection to this many channels where they have
            more; see :class:`LocalWhitening`. 0 compares them as they are, as in the paper.

    Raises:
        ValueError: If an argument is out of its range or the backbone lacks a layer.

    Example:
        >>> model = PradotModel(
        ...     "resnet18", ["layer3"], pre_trained=False, prototypes_per_cell=1, whitened_channels=0
        ... ).eval()
        >>> model.initialise(model.extract(torch.rand(2, 3, 64, 64)))
        >>> model(torch.rand(2, 3, 64, 64)).anomaly_map.shape
        torch.Size([2, 1, 64, 64])
    """

    def __init__(
        self,
        backbone: str = "resnet50",
        layers: Sequence[str] = ("layer2", "layer3"),
        pre_trained: bool = True,
        prototypes_per_cell: float | Sequence[float] = 16,
        alphas: Sequence[float] = (0.0, 0.3),
        settings: PrototypeSettings | None = None,
        smoothing: float = 4.0,
        whitened_channels: int = 128,
    ) -> None:
        super().__init__()
        per_cell = [prototypes_per_cell] if isinstance(prototypes_per_cell, int | float) else list(prototypes_per_cell)
        if len(per_cell) == 1:
            per_cell *= len(layers)
        if len(per_cell) != len(layers):
            msg = f"prototypes_per_cell has {len(per_cell)} values for {len(layers)} layers; give one for each, or one"
            raise ValueError(msg)
        if not alphas or len(set(alphas)) < len(alphas):
            msg = f"alphas must be one or more different weights, not {list(alphas)}"
            raise ValueError(msg)
        self.layers = tuple(layers)
        workspace = Workspace()
        self.prototypes = nn.ModuleList(
            nn.ModuleList(Prototypes(n, alpha, settings or PrototypeSettings(), workspace) for alpha in alphas)
            for n in per_cell
        )
        _require(whitened_channels >= 0, "whitened_channels", "at least 0", whitened_channels)
        self.whitening = nn.ModuleDict(
            {_key(layer): LocalWhitening(whitened_channels) for layer in layers if whitened_channels}
        )
        # Share of each layer and α in the anomaly map; (layers, α), equal until they are calibrated.
        self.weights: Tensor
        self.register_buffer("weights", torch.full((len(layers), len(alphas)), 1 / (len(layers) * len(alphas))))
        self.feature_extractor = create_extractor(backbone, layers, pre_trained)
        self.anomaly_map_generator = AnomalyMapGenerator(smoothing)

    def _apply(self, fn: Any, recurse: bool = True) -> "PradotModel":
        super()._apply(fn, recurse)
        self.weights = self.weights.float()
        for part in (self.whitening, self.prototypes, self.anomaly_map_generator):
            part.float()
        return self

    @property
    def is_initialised(self) -> bool:
        """Whether there are prototypes, from training or a checkpoint."""
        return all(prototypes.is_initialised for _, prototypes in self.by_layer())

    def by_layer(self) -> Iterator[tuple[str, Prototypes]]:
        """Each layer with each of its prototypes, layer after layer, in the order of ``alphas``."""
        for layer, group in zip(self.layers, self.prototypes, strict=True):
            for prototypes in cast("nn.ModuleList", group):
                yield layer, cast("Prototypes", prototypes)

    def extract(self, images: Tensor) -> dict[str, Tensor]:
        """Feature map (B, D, H, W) of each layer for images (B, 3, h, w) that are pre-processed."""
        return self.feature_extractor(images.to(next(self.feature_extractor.parameters()).dtype))

    def fit_whitening(self, batches: Iterable[dict[str, Tensor]]) -> None:
        """Estimate how the features vary from image to image; does nothing where it is known or not wanted.

        Args:
            batches: Feature maps (B, D, H, W) of the training images.
        """
        if not self.whitening or all(self._whitening_of(layer).is_fitted for layer in self.layers):
            return
        for features in batches:
            for layer in self.layers:
                self._whitening_of(layer).update(features[layer])
        for layer in self.layers:
            self._whitening_of(layer).compute()

    def initialise(self, features: dict[str, Tensor]) -> None:
        """Create the prototypes from the feature maps (B, D, H, W) of the first batch of training images."""
        embeddings = self._embed(features)
        for layer, prototypes in self.by_layer():
            prototypes.initialise(embeddings[layer])

    def update(self, features: dict[str, Tensor]) -> float:
        """One training step on the feature maps of a batch; returns the transport cost, averaged over layers and α."""
        with _full_precision(features):
            embeddings = self._embed(features)
            return fmean(prototypes.update(embeddings[layer]) for layer, prototypes in self.by_layer())

    def transport_cost(self, features: dict[str, Tensor]) -> float:
        """Transport cost of a batch, averaged over layers and α, without a training step."""
        with _full_precision(features):
            embeddings = self._embed(features)
            plans = (prototypes.transport(embeddings[layer])[0] for layer, prototypes in self.by_layer())
            return fmean(plan.transport_cost() for plan in plans)

    @torch.no_grad()
    def calibrate(self, batches: Iterable[dict[str, Tensor]]) -> None:
        """Weigh layers and α by the inverse of the scores that normal images get, so that none drowns the others.

        Args:
            batches: Feature maps (B, D, H, W) of the training images.
        """
        highest = torch.cat(
            [
                torch.stack(
                    [torch.stack([score.flatten(1).amax(1) for score in row]) for row in self._scores(features)]
                )
                for features in batches
            ],
            dim=-1,
        ).mean(-1)
        # A normal image that scores nothing anywhere, as with more prototypes than features, says nothing of the scale.
        shares = 1 / highest.clamp(min=1e-3 * float(highest.max()) or 1.0)
        self.weights = shares / shares.sum()

    def forward(self, images: Tensor) -> dict[str, Tensor] | InferenceBatch:
        """Features while training, scores otherwise.

        Args:
            images: (B, 3, h, w), pre-processed.

        Returns:
            While training, the feature map of each layer. Otherwise the anomaly map (B, 1, h, w) and the image score
            (B,), its maximum.

        Raises:
            RuntimeError: If there are no prototypes yet.
        """
        features = self.extract(images)
        if self.training:
            return features
        if not self.is_initialised:
            msg = "Pradot has no prototypes yet: fit it, or load a checkpoint with ckpt_path"
            raise RuntimeError(msg)
        scores = self._scores(features)
        maps = [sum(self.weights[i, j] * score for j, score in enumerate(row)) for i, row in enumerate(scores)]
        anomaly_map = self.anomaly_map_generator(maps, images.shape[-2:])
        return InferenceBatch(pred_score=anomaly_map.amax(dim=(-2, -1)).flatten(), anomaly_map=anomaly_map)

    def _scores(self, features: dict[str, Tensor]) -> list[list[Tensor]]:
        """Score map (B, 1, H, W) of each layer and, within it, each α."""
        with _full_precision(features):
            embeddings = self._embed(features)
            return [
                [prototypes(embeddings[layer]) for prototypes in cast("nn.ModuleList", group)]
                for layer, group in zip(self.layers, self.prototypes, strict=True)
            ]

    def _embed(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """What prototypes are compared with: the features, whitened if wanted."""
        if not self.whitening:
            return features
        return {layer: self._whitening_of(layer)(features[layer]) for layer in self.layers}

    def _whitening_of(self, layer: str) -> LocalWhitening:
        return cast("LocalWhitening", self.whitening[_key(layer)])


def _key(layer: str) -> str:
    """Name of a layer as a key of a ``ModuleDict``, which has no dots."""
    return layer.replace(".", "_")


def _full_precision(features: dict[str, Tensor]) -> AbstractContextManager:
    """Suspend autocast. Where there is none there is nothing to suspend, nor to trace for export."""
    device = next(iter(features.values())).device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _require(condition: bool, name: str, allowed: object, value: object) -> None:
    if not condition:
        allowed = " or ".join(map(repr, allowed)) if isinstance(allowed, tuple) else allowed
        msg = f"{name} must be {allowed}, not {value!r}"
        raise ValueError(msg)
