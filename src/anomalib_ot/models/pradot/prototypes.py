"""PRADOT's prototypes of one layer and one α: how they learn and how they score."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import ceil, sqrt
from typing import Any, NamedTuple

import torch
from anomalib.models.components import DynamicBufferMixin
from scipy.sparse import csr_array, vstack
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from anomalib_ot.features.extraction import full_precision, is_traced
from anomalib_ot.transport import (
    FusedCost,
    Processes,
    TransportPlan,
    Workspace,
    grid_coordinates,
    row_blocks,
    sinkhorn,
    spatial_cost,
)

from .hitting_set import hitting_set
from .settings import PradotSettings

# Prototypes of a layer and an α by default, as many as on 14 x 14 cells in the paper, and the paper's number in a cell.
_USUAL = 14 * 14 * 16
_MOST_PER_CELL = 16
# Where all cells equal all prototypes up to rounding, no largest cost can serve as the scale.
_SAME = 1e-6


@dataclass(frozen=True)
class Assignment:
    """The nearest prototype of each cell, and the two parts of its cost, (1 − α)·feature + α·space.

    Args:
        prototype: Index of the prototype, (B, H, W).
        feature: Feature cost, (B, H, W).
        space: Spatial cost, (B, H, W).
    """

    prototype: Tensor
    feature: Tensor
    space: Tensor

    def score(self, alpha: float) -> Tensor:
        """Cost (B, H, W) for a weight of the spatial part."""
        return (1 - alpha) * self.feature + alpha * self.space


class _KeptPenalties(NamedTuple):
    """Penalties for maps of one size. Computing them takes longer than all other steps of a score.

    Attributes:
        size: Height and width of the maps.
        coordinates: Coordinates of the prototypes for which the penalties were computed, (P, 2).
        penalties: (H·W, P).
    """

    size: torch.Size
    coordinates: Tensor
    penalties: Tensor

    def are_of(self, size: torch.Size, coordinates: Tensor) -> bool:
        """Whether they are valid for maps of this size and for these coordinates."""
        is_on_device = self.coordinates.device == coordinates.device
        return self.size == size and is_on_device and torch.equal(self.coordinates, coordinates)


class Prototypes(DynamicBufferMixin, nn.Module):
    """Prototypes of one layer and one α, each with a coordinate.

    Args:
        per_cell: Prototypes in a cell of the feature map, n. Below 1, the prototypes have a coarser grid of their own,
            with this many cells for each one of the feature map. None for :func:`usual_per_cell`.
        alpha: Weight of the spatial cost, in [0, 1]; 0 makes the prototypes global.
        settings: How they are learned and compared; :class:`Pradot` documents the settings.
        workspace: Memory in which the transport is solved. Prototypes that learn one after another may share it.
    """

    features: Tensor
    coordinates: Tensor
    potential: Tensor
    reach: Tensor
    steps: Tensor

    def __init__(
        self, per_cell: float | None, alpha: float, settings: PradotSettings, workspace: Workspace | None = None
    ) -> None:
        super().__init__()
        self.per_cell = per_cell
        self.alpha = alpha
        self.settings = settings
        # (P, D), (P, 2) and (P,), set by the first batch. The first prototype of every cell precedes the second ones.
        self.register_buffer("features", torch.empty(0, dtype=torch.float32))
        self.register_buffer("coordinates", torch.empty(0, dtype=torch.float32))
        self.register_buffer("potential", torch.empty(0, dtype=torch.float32))
        # Largest spatial cost between a cell and a prototype.
        self.register_buffer("reach", torch.ones((), dtype=torch.float32))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self._workspace = workspace or Workspace()
        self._kept_penalties: _KeptPenalties | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_kept_penalties": None}

    @property
    def is_initialised(self) -> bool:
        """Whether there are prototypes, from training or a checkpoint."""
        return self.features.numel() > 0

    def layout(self, height: int, width: int) -> tuple[int, int, int]:
        """Prototypes in a cell of their grid, and height and width of this grid, for feature maps of a size."""
        density = usual_per_cell(height * width) if self.per_cell is None else self.per_cell
        if self.settings.free_coordinates:
            # A coarser grid has fixed coordinates.
            density = max(density, 1)
        share = sqrt(min(density, 1))
        return max(1, int(density)), ceil(height * share), ceil(width * share)

    def initialise(self, features: Tensor) -> None:
        """Create the prototypes.

        Args:
            features: Feature maps (B, D, H, W) of the first batch of training images.
        """
        per_cell, height, width = self.layout(*features.shape[-2:])
        shape = (per_cell, height * width, features.shape[1])
        # Depends on the seed only, not on random numbers that were drawn before.
        generator = torch.Generator().manual_seed(torch.initial_seed())
        if self.settings.initialisation == "normal":
            start = torch.randn(shape, dtype=torch.float32, generator=generator)
        elif self.settings.initialisation == "uniform":
            start = torch.rand(shape, dtype=torch.float32, generator=generator)
        else:
            coarse = F.adaptive_avg_pool2d(features.float(), (height, width)).flatten(2).mT
            rounds = [torch.randperm(len(coarse), generator=generator) for _ in range(ceil(per_cell / len(coarse)))]
            start = coarse[torch.cat(rounds)[:per_cell].to(coarse.device)]
        # All processes of a training start from the same prototypes.
        self.features = Processes.all().first(start.flatten(0, 1).to(features.device))
        self.coordinates = grid_coordinates(height, width, device=features.device).repeat(per_cell, 1)
        self._measure_reach(features)

    @torch.no_grad()
    def transport(self, features: Tensor) -> tuple[TransportPlan, Tensor, Tensor]:
        """Solve eq. 4 from a batch of embeddings to the prototypes.

        In distributed training every process calls this with its own images, and together they solve one problem.

        Args:
            features: Feature maps (B, D, H, W).

        Returns:
            The plan, the embeddings (B·H·W, D) and their coordinates (B·H·W, 2).
        """
        batch, channels, height, width = features.shape
        embeddings = features.float().permute(0, 2, 3, 1).reshape(-1, channels)
        grid = grid_coordinates(height, width, device=features.device)
        processes = Processes.all()
        cost = FusedCost(
            embeddings,
            self.features,
            grid,
            self.coordinates,
            self.alpha,
            self.settings.spatial,
            processes,
            self._workspace,
        )
        plan = sinkhorn(
            cost,
            self.settings.epsilon,
            self.settings.sinkhorn_iterations,
            self.settings.sinkhorn_tolerance,
            potential=self.potential if self.potential.numel() else None,
            workspace=self._workspace,
            processes=processes,
            warn=False,
        )
        return plan, embeddings, grid.repeat(batch, 1)

    def update(self, features: Tensor) -> TransportPlan:
        """Run one training step: move the prototypes towards their barycentres (eq. 5).

        Args:
            features: Feature maps (B, D, H, W).

        Returns:
            The transport plan before the step. It is valid until the next step.
        """
        plan, embeddings, coordinates = self.transport(features)
        self.move(plan.barycentres(embeddings))
        if self.settings.free_coordinates:
            self.coordinates = plan.barycentres(coordinates)
            self._measure_reach(features)
        self.potential = plan.potential
        return plan

    def move(self, barycentres: Tensor) -> None:
        """Count a step, and move the prototypes towards their barycentres (P, D) at the rate of this step (eq. 5)."""
        self.steps += 1
        moved = 1 - self.settings.ema_rate
        if self.settings.ema_warm_up:
            moved = max(moved, 1 / (1 + int(self.steps)))
        self.features.lerp_(barycentres, moved)

    @torch.no_grad()
    def add_needed(self, needed: Tensor, features: Tensor, tolerance: float) -> Tensor:
        """Add prototypes to a set until images score about the same with this set alone.

        A cell is covered if the set has a prototype whose cost exceeds the cell's least cost by at most ``tolerance``
        times the highest score of its image. The prototype that covers most of the remaining cells is added until all
        cells are covered. This is the greedy solution of a hitting set problem.

        Args:
            needed: Boolean mask (P,) of the set, on the CPU; changed in place.
            features: Feature maps (B, D, H, W).
            tolerance: Allowed increase of a score, as a share of the highest score of its image; at least 0.

        Returns:
            Highest score of each image with all prototypes, (B,).
        """
        without, highest = [], []
        for image in features.split(1):
            similarities, scale = self._compare(image)
            if self.settings.normalize_score:
                # The costs of an image are scaled by its farthest prototype.
                needed[int(similarities.amin((0, 1)).argmin())] = True
            best = self._highest_gains(similarities, scale, image)
            highest.append((scale - best).amax().clamp(min=0))
            enough = best - tolerance * highest[-1]
            for cells, gains in self._gains(similarities, scale, image):
                usable = (gains >= enough[:, cells])[0].cpu()
                without.append(csr_array(usable[~usable[:, needed].any(-1)].numpy()))
        needed[hitting_set(csr_array(vstack(without)))] = True
        return torch.stack(highest)

    def keep(self, mask: Tensor) -> None:
        """Keep the prototypes of a Boolean mask (P,), and drop the others."""
        mask = mask.to(self.features.device)
        self.features, self.coordinates = self.features[mask], self.coordinates[mask]
        # Before the first step there is no potential.
        self.potential = self.potential[mask] if self.potential.numel() else self.potential

    def forward(self, features: Tensor) -> Tensor:
        """Compute the score of each cell, its least cost over the prototypes (eq. 6).

        Args:
            features: Feature maps (B, D, H, W).

        Returns:
            (B, 1, H, W).
        """
        # The costs of one image fit in a CPU's cache. An exported graph takes the batch as a whole.
        images = features.split(1) if features.device.type == "cpu" and not is_traced() else (features,)
        scores = []
        for image in images:
            similarities, scale = self._compare(image)
            best = self._highest_gains(similarities, scale, image)
            scores.append((scale - best).clamp(min=0).mT.unflatten(2, features.shape[-2:]))
        return torch.cat(scores)

    @torch.no_grad()
    def assign(self, features: Tensor, alpha: float | None = None) -> Assignment:
        """Find the prototype with the least cost for each cell, and the parts of this cost.

        Args:
            features: Feature maps (B, D, H, W).
            alpha: Weight of the spatial cost, in [0, 1]. The default is the weight of the prototypes' training, with
                which :meth:`forward` scores.

        Returns:
            Prototypes and costs, scaled as for the score.
        """
        alpha = self.alpha if alpha is None else alpha
        space = self._space(features)
        if self.settings.normalize_score:
            space = space / self.reach
        parts = []
        for image in features.split(1):
            with full_precision(image):
                similarities, _ = self._compare(image)
            feature = 1 - similarities[0]
            if self.settings.normalize_score:
                feature /= feature.amax().clamp(min=_SAME)
            nearest = torch.lerp(feature, space, alpha).argmin(-1, keepdim=True)
            parts.append(
                [
                    each.view(features.shape[-2:])
                    for each in (nearest, feature.gather(1, nearest), space.gather(1, nearest))
                ]
            )
        return Assignment(*map(torch.stack, zip(*parts, strict=True)))

    def _compare(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine similarity of cells and prototypes, (B, H·W, P), and the scale of the feature cost, (B or 1, 1, 1)."""
        similarities = _unit(features.float().flatten(2).mT) @ _unit(self.features).T
        if self.settings.normalize_score:
            farthest = (1 - similarities.amin((1, 2), keepdim=True)).clamp(min=_SAME)
            return similarities, (1 - self.alpha) / farthest
        return similarities, similarities.new_full((1, 1, 1), 1 - self.alpha)

    def _gains(self, similarities: Tensor, scale: Tensor, features: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Gain of each prototype, the scale minus its cost: slices of cells and their gains (B, cells, P).

        The least cost is the scale minus the largest gain, which takes fewer passes over the matrix. On a CPU the cells
        of an image come in blocks that fit in its cache.
        """
        penalties = self._penalties(features) if self.alpha > 0 else None
        blocks: Iterable[slice] = (slice(None),)
        if features.device.type == "cpu" and not is_traced():
            blocks = row_blocks(similarities.shape[1:], similarities.shape[1], features.device)
        for cells in blocks:
            here = similarities[:, cells]
            yield cells, here * scale if penalties is None else torch.addcmul(penalties[cells], here, scale)

    def _highest_gains(self, similarities: Tensor, scale: Tensor, features: Tensor) -> Tensor:
        """Largest gain of each cell over the prototypes, (B, H·W, 1)."""
        if self.alpha == 0:
            return similarities.amax(-1, keepdim=True) * scale
        return torch.cat([gains.amax(-1, keepdim=True) for _, gains in self._gains(similarities, scale, features)], 1)

    def _penalties(self, features: Tensor) -> Tensor:
        """Negative weighted spatial cost, (H·W, P), cached for further images of the same size."""
        size, coordinates, kept = features.shape[-2:], self.coordinates, self._kept_penalties
        if not is_traced() and kept is not None and kept.are_of(size, coordinates):
            return kept.penalties
        weight = self.alpha / self.reach if self.settings.normalize_score else self.alpha
        penalties = self._space(features) * -weight
        if not is_traced():
            self._kept_penalties = _KeptPenalties(size, coordinates.clone(), penalties)
        return penalties

    def _space(self, features: Tensor) -> Tensor:
        """Spatial cost (H·W, P) of the cells of feature maps (B, D, H, W)."""
        grid = grid_coordinates(*features.shape[-2:], device=features.device)
        squared = spatial_cost(grid, self.coordinates)
        # torch.cdist loses digits in its mode with matrix products, and cannot be exported in the other.
        return squared.sqrt() if self.settings.spatial == "euclidean" else squared

    def _measure_reach(self, features: Tensor) -> None:
        farthest = self._space(features).max()
        # A single cell has no distance to scale by.
        self.reach = torch.where(farthest > 0, farthest, 1.0)


def usual_per_cell(cells: int) -> float:
    """Default number of prototypes in a cell: 16 as in the paper, but about 3,136 in all at most.

    Args:
        cells: Number of cells of a feature map.

    Returns:
        A whole number, or below 1 the number of cells of a coarser grid for each one of the map.

    Example:
        >>> [usual_per_cell(side**2) for side in (7, 14, 28, 32)]
        [16, 16, 4, 3]
    """
    density = min(_MOST_PER_CELL, _USUAL / cells)
    return int(density) if density >= 1 else density


def _unit(vectors: Tensor) -> Tensor:
    """``F.normalize`` over the last dimension, without the expansion that it adds to exported graphs."""
    return vectors / torch.linalg.vector_norm(vectors, dim=-1, keepdim=True).clamp(min=1e-12)
