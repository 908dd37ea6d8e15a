"""FOCT's two memories: the semantic memory of the support set, and the episodic memory of earlier queries."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from anomalib.models.components import DynamicBufferMixin
from torch import Tensor, nn

from anomalib_ot.features.extraction import full_precision
from anomalib_ot.transport import euclidean_cost, squared_distance

from .coreset import greedy_coreset, random_projection

# Dimensions of the projection in which coresets are chosen.
_PROJECTION = 128


class Memory(NamedTuple):
    """Features that are compared with a query.

    Attributes:
        features: (B, N, C), for each query of a batch.
        is_foreground: Whether each feature belongs to the foreground, (B, N).
    """

    features: Tensor
    is_foreground: Tensor


class Coresets(NamedTuple):
    """Coresets of the R views of a support image.

    Attributes:
        features: (R, n, C).
        is_foreground: (R, n).
        reach: Mean distance of a feature from the coreset of its own view, (R,).
    """

    features: Tensor
    is_foreground: Tensor
    reach: Tensor


class SemanticMemory(DynamicBufferMixin, nn.Module):
    """Coresets of the views of the support images (paper, section 4.1).

    Args:
        foreground_ratio: Share of the foreground features to keep, in (0, 1].
        background_ratio: Share of the background features to keep, in (0, 1].
    """

    features: Tensor
    is_foreground: Tensor
    threshold: Tensor

    def __init__(self, foreground_ratio: float, background_ratio: float) -> None:
        super().__init__()
        self.foreground_ratio = foreground_ratio
        self.background_ratio = background_ratio
        # (K, R, n, C) and (K, R, n): n features of each of R views of K support images.
        self.register_buffer("features", torch.empty(0, dtype=torch.float32))
        self.register_buffer("is_foreground", torch.empty(0, dtype=torch.bool))
        # Mean distance of a support feature from the coreset of its own view.
        self.register_buffer("threshold", torch.zeros((), dtype=torch.float32))

    @property
    def is_fitted(self) -> bool:
        """Whether there is a support set."""
        return self.features.numel() > 0

    def coresets(self, views: Tensor, masks: Tensor, share: float) -> "Coresets":
        """Coresets of the views of a support image.

        Args:
            views: Features (R, M, C).
            masks: Whether they are of the foreground, (R, M).
            share: Share of the foreground in all support images.

        Raises:
            ValueError: If the shapes differ.
        """
        if masks.shape != views.shape[:-1]:
            msg = f"masks of shape {tuple(masks.shape)} do not fit features {tuple(views.shape)}"
            raise ValueError(msg)
        cells = masks.shape[1]
        foreground = max(1, round(self.foreground_ratio * share * cells)) if share > 0 else 0
        background = round(self.background_ratio * (1 - share) * cells)
        projection = random_projection(views.shape[-1], _PROJECTION).to(views)
        kept, flags, reach = [], [], []
        with full_precision(views):
            for view, mask in zip(views, masks, strict=True):
                chosen = _coreset_of_parts(view @ projection, mask, foreground, background)
                kept.append(view[chosen])
                flags.append(mask[chosen])
                reach.append(euclidean_cost(view[chosen], view).amin(1).mean())
        return Coresets(torch.stack(kept), torch.stack(flags), torch.stack(reach))

    def cosine_distances(self, query: Tensor, without: int | None = None) -> Tensor:
        """Cosine distances of queries from the nearest features of all views of all support images.

        Args:
            query: Features of unit length, (B, M, C).
            without: Index of a support image to leave out.

        Returns:
            (B, M), in [0, 2].
        """
        others = [each for index, each in enumerate(self.features) if index != without]
        similarities = torch.stack([(query @ each.flatten(0, 1).T).amax(-1) for each in others]).amax(0)
        return (1 - similarities).clamp(0, 2)

    def register_to(self, query: Tensor, without: int | None = None) -> Memory:
        """Select the nearest view of each support image.

        The distance of a view is the mean distance of the query's features from their nearest features in the view.
        This is the cost of transport if each feature is sent to one feature.

        Args:
            query: (B, M, C).
            without: Index of a support image to leave out.

        Returns:
            The memory of each query, N = K n, or (K − 1) n.
        """
        features, flags = [], []
        for index, (support, mask) in enumerate(zip(self.features, self.is_foreground, strict=True)):
            if index == without:
                continue
            best = _nearest_view(support, query)
            features.append(support[best])
            flags.append(mask[best])
        return Memory(torch.cat(features, 1), torch.cat(flags, 1))

    def left_out_distances(self, views: Tensor, index: int) -> Tensor:
        """Largest distance of a cell of each view of a support image from the memory of the other support images.

        The views of a single support image are compared with each other, and a single view with nothing.

        Args:
            views: Features of the views, (R, M, C).
            index: Index of the support image.

        Returns:
            (R,), or (0,).
        """
        count, rotations = self.features.shape[:2]
        if count * rotations == 1:
            return views.new_empty(0)
        distances = []
        with full_precision(views):
            for number, view in enumerate(views.split(1)):
                if count > 1:
                    memory = self.register_to(view, without=index).features
                else:
                    others = self.features[0, torch.arange(rotations, device=view.device) != number]
                    memory = others[_nearest_view(others, view)]
                distances.append(euclidean_cost(memory, view).amin(-1).amax(-1))
        return torch.cat(distances)

    def nearest_views(self, query: Tensor) -> Tensor:
        """Numbers (B, K) of the views that :meth:`register_to` selects for queries (B, M, C)."""
        return torch.stack([_nearest_view(support, query) for support in self.features], 1)


class EpisodicMemory(DynamicBufferMixin, nn.Module):
    """Features of earlier queries (paper, section 4.2).

    Args:
        capacity: Number of features at which the memory is compressed, L.
        compression: Share of the capacity that compression keeps, λ, in (0, 1).
    """

    features: Tensor
    is_foreground: Tensor

    def __init__(self, capacity: int, compression: float) -> None:
        super().__init__()
        self.capacity = capacity
        self.compression = compression
        self.register_buffer("features", torch.empty((0, 0), dtype=torch.float32))
        self.register_buffer("is_foreground", torch.empty(0, dtype=torch.bool))

    def clear(self) -> None:
        """Discard all features."""
        self.replace(self.features.new_empty((0, 0)), self.is_foreground.new_empty(0))

    def add(self, features: Tensor, is_foreground: Tensor) -> None:
        """Add features (L, C), and compress the memory if it is full (eq. 7)."""
        if not features.numel():
            return
        if self.features.numel():
            features = torch.cat([self.features, features])
            is_foreground = torch.cat([self.is_foreground, is_foreground])
        if features.shape[0] >= self.capacity:
            projection = random_projection(features.shape[1], _PROJECTION).to(features)
            size = min(features.shape[0], max(1, round(self.compression * self.capacity)))
            chosen = greedy_coreset(features @ projection, size)
            features, is_foreground = features[chosen], is_foreground[chosen]
        self.replace(features, is_foreground)

    def replace(self, features: Tensor, is_foreground: Tensor) -> None:
        """Replace all features by features (N, C)."""
        # Scoring runs in inference mode, and a checkpoint could not be loaded into its tensors.
        with torch.inference_mode(mode=False):
            self.features, self.is_foreground = features.clone(), is_foreground.clone()

    def join(self, memory: Memory) -> Memory:
        """The memory of each query of a batch, extended by the features of earlier queries."""
        if not self.features.numel():
            return memory
        batch = memory.features.shape[0]
        return Memory(
            torch.cat([memory.features, self.features.expand(batch, -1, -1)], 1),
            torch.cat([memory.is_foreground, self.is_foreground.expand(batch, -1)], 1),
        )


def fit_memories(
    memories: Sequence[SemanticMemory], features: Iterable[Sequence[Tensor]], is_foreground: Tensor
) -> None:
    """Fill memories with coresets of the same support images.

    Args:
        memories: The memories.
        features: For each support image, the features (R, M, C) of its views for each memory. Only those of one image
            are in memory.
        is_foreground: (K, R, M).

    Raises:
        ValueError: If the shapes differ.
    """
    share = float(is_foreground.float().mean())
    kept: list[list[Coresets]] = [[] for _ in memories]
    for each, masks in zip(features, is_foreground, strict=True):
        for memory, views, known in zip(memories, each, kept, strict=True):
            known.append(memory.coresets(views, masks, share))
    for memory, known in zip(memories, kept, strict=True):
        memory.features = torch.stack([each.features for each in known])
        memory.is_foreground = torch.stack([each.is_foreground for each in known])
        memory.threshold = torch.cat([each.reach for each in known]).mean()
        # So that no more than one memory is held twice.
        known.clear()


def _nearest_view(support: Tensor, query: Tensor) -> Tensor:
    """Number (B,) of the view of a support image (R, n, C) that is nearest to each query (B, M, C)."""
    distances = squared_distance(support.flatten(0, 1), query)
    nearest = distances.unflatten(-1, support.shape[:2]).amin(-1).clamp(min=0).sqrt()
    return nearest.mean(1).argmin(-1)


def _coreset_of_parts(features: Tensor, mask: Tensor, foreground: int, background: int) -> Tensor:
    """Coresets of foreground and background. If one is too small for its share, the other gets the rest."""
    parts = [mask.nonzero()[:, 0], (~mask).nonzero()[:, 0]]
    total = foreground + background
    first = max(min(foreground, parts[0].shape[0]), total - parts[1].shape[0])
    sizes = [first, total - first]
    return torch.cat(
        [part[greedy_coreset(features[part], size)] for part, size in zip(parts, sizes, strict=True) if size]
    )
