"""FOCT: few-shot detection with foreground-aware online conditional transport (ACM Multimedia 2024)."""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING, NamedTuple

import torch
from anomalib.data import InferenceBatch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from anomalib_ot.features.anomaly_map import AnomalyMapGenerator, by_maximum
from anomalib_ot.features.backbones import prepare_extractor
from anomalib_ot.features.extraction import (
    extract_by_parts,
    extract_by_tiles,
    full_precision,
    is_exporting,
    is_traced,
)
from anomalib_ot.transport import (
    Navigator,
    conditional_plan,
    euclidean_cost,
    grid_coordinates,
    squared_distance,
)

from .cells import averaged, unaveraged
from .foreground import Everything, Foreground
from .memory import Memory, fit_memories
from .navigator import fit_to
from .rotations import turned_views
from .settings import FoctSettings
from .state import FoctState

if TYPE_CHECKING:
    from anomalib.data.utils.tiler import Tiler

# Support images whose features are extracted at once.
_PART = 8
# Held while queries are scored online, as each one depends on the queries before it. It is shared by all models, as a
# lock can be neither copied nor written to a file.
_teaching = Lock()


class QueryPlan(NamedTuple):
    """Where conditional transport sends the cells of a query.

    Attributes:
        forward: π(m_i | q_j) for the M cells of the query, row by row, and the N features of the memory, (M, N); its
            rows sum to 1. First come n features of each of the K support images, then those of earlier queries.
        grid: Rows and columns of the query's cells.
        views: Number of the view that is compared with, of each support image, (K,).
        of_support: n.
        is_foreground: Whether each feature of the memory belongs to the foreground, (N,).
    """

    forward: Tensor
    grid: tuple[int, int]
    views: Tensor
    of_support: int
    is_foreground: Tensor


class FoctModel(FoctState):
    """Frozen features, a semantic and an episodic memory, and the transport between them and a query.

    Memories, transport and maps stay in float32 for every precision of the backbone.

    Args:
        settings: The settings that :class:`Foct` documents.

    Raises:
        ValueError: If the backbone lacks a layer.

    Example:
        >>> model = FoctModel(FoctSettings(backbone="resnet18", pre_trained=False, rotations=1)).eval()
        >>> model.fit(torch.rand(2, 3, 64, 64))
        >>> model(torch.rand(2, 3, 64, 64)).anomaly_map.shape
        torch.Size([2, 1, 64, 64])
    """

    single_precision = (*FoctState.single_precision, "anomaly_map_generator")

    def __init__(self, settings: FoctSettings) -> None:
        extractor = prepare_extractor(settings.backbone, settings.layer_names, settings.pre_trained)
        super().__init__(settings, sum(extractor.out_dims) + 2 * (settings.position_weight > 0))
        self.tiler: Tiler | None = None
        self.feature_extractor = extractor
        self.anomaly_map_generator = AnomalyMapGenerator(settings.smoothing)

    def extract(self, images: Tensor) -> Tensor:
        """Features of cells as in PatchCore: averaged over 3 x 3 cells, layers concatenated at the finest grid.

        Args:
            images: (B, 3, h, w), pre-processed.

        Returns:
            (B, D, H, W), float32.
        """
        return averaged(self.extract_layers(images))

    def extract_layers(self, images: Tensor) -> list[Tensor]:
        """Features of each layer in the order of the network, the finest first.

        Args:
            images: (B, 3, h, w), pre-processed.

        Returns:
            (B, D, H, W) of each layer, float32.
        """
        extract = partial(extract_by_parts, self.feature_extractor)
        return [each.float() for each in extract_by_tiles(extract, images, self.tiler).values()]

    def views(self, images: Tensor) -> Tensor:
        """Images (K, C, h, w) rotated by equal angles, mirrored at their edges: (K, rotations, C, h, w)."""
        return turned_views(images, self.settings.rotations)

    # A validation within the epoch fits in inference mode, and nothing could be loaded into its tensors later.
    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def fit(self, images: Tensor, pixels: Tensor | None = None, foreground: Foreground | None = None) -> None:
        """Fill the semantic memory with the support set and fit the navigator to it.

        This replaces an earlier support set, which stays unchanged if the fit fails. Only the views of one image are in
        memory at a time: the kept features and one feature map of each image grow with the number of images.

        Args:
            images: Support images, pre-processed, (K, 3, h, w).
            pixels: The same images as RGB in [0, 1], for a foreground that needs them; ``images`` by default.
            foreground: Finds the foreground. By default, all cells are foreground.
        """
        layers = [torch.cat(parts) for parts in zip(*map(self.extract_layers, images.split(_PART)), strict=True)]
        features = averaged(layers)
        masks = (foreground or Everything())(images if pixels is None else pixels, features)
        # Rotation needs images, so masks are rotated as images.
        turned = self.views(masks[:, None].float()) > 0.5  # noqa: PLR2004
        centre, scale = _moments(features)
        # The layers, which are smaller, suffice for what follows.
        del features
        memories = [self._new_memory() for memory in (self.semantic, self.detail) if memory is not None]
        own = [*zip(*(each.split(1) for each in layers), strict=True)]
        pairs = [*zip(images.split(1), own, strict=True)]
        fit_memories(memories, (self._embed_views(*each, centre, scale) for each in pairs), turned.flatten(2))
        semantic, *detail = memories
        distances = self._left_out_distances(semantic, (self._embed_views(*each, centre, scale)[0] for each in pairs))
        navigator = self._new_navigator().to(images.device)
        if self.settings.measure == "transport":
            for query in (self._points(averaged(each), centre, scale) for each in own):
                with full_precision(query):
                    memory = semantic.register_to(query).features[0]
                    fit_to(navigator, memory, query[0], self.settings, self.settings.support_steps)
        self.centre, self.scale, self.semantic, self.view_distances = centre, scale, semantic, distances
        self.detail = detail[0] if detail else None
        self.support_navigator.load_state_dict(navigator.state_dict())
        self.reset()

    def _embed_views(self, image: Tensor, own: Sequence[Tensor], centre: Tensor, scale: Tensor) -> list[Tensor]:
        """Points (R, M, C) of the views of an image (1, 3, h, w) with known layers (1, D, H, W), and their detail."""
        turned = self.views(image)[0, 1:]
        views = [own, self.extract_layers(turned)] if len(turned) else [own]
        points = [self._points(averaged(layers), centre, scale) for layers in views]
        details = [unaveraged(layers) for layers in views] if self.settings.detail_weight else []
        return [torch.cat(each) for each in (points, details) if each]

    def forward(self, images: Tensor) -> Tensor | InferenceBatch:
        """Return features while training, and scores otherwise.

        Args:
            images: (B, 3, h, w), pre-processed.

        Returns:
            While training, the features (B, D, H, W). Otherwise the anomaly map (B, 1, h, w) and the image score (B,),
            its maximum. Online, each query teaches the memory before the next one is scored.

        Raises:
            RuntimeError: If there is no support set yet.
        """
        layers = self.extract_layers(images)
        features = averaged(layers)
        if self.training:
            return features
        self._require_fit()
        with full_precision(features):
            query = self._embed(features)
            if is_exporting() or (is_traced() and not self._is_taught):
                scores = self._score_frozen(query)
            else:
                score = self._score_and_learn if self._is_taught else self._score_frozen
                with _teaching if self._is_taught else nullcontext():
                    scores = torch.cat([score(each) for each in query.split(1)])
            return by_maximum(self._anomaly_map(scores + self._detail_scores(layers), features, images))

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def score_left_out(self, images: Tensor) -> InferenceBatch:
        """Score each support image by the memory of the others. Queries teach nothing here.

        Mean, scale and navigator are those of the whole support set.

        Args:
            images: The K support images of the last fit, in their order, (K, 3, h, w), K at least 2.

        Returns:
            The anomaly maps (K, 1, h, w) and the image scores (K,).
        """
        maps = []
        for index, image in enumerate(images.split(1)):
            layers = self.extract_layers(image)
            features = averaged(layers)
            with full_precision(features):
                query = self._embed(features)
                memory = self.semantic.register_to(query, without=index)
                scores = self._score(query, memory, self.support_navigator)[0] + self._detail_scores(layers, index)
                maps.append(self._anomaly_map(scores, features, image))
        return by_maximum(torch.cat(maps))

    def _detail_scores(self, layers: Sequence[Tensor], without: int | None = None) -> Tensor | float:
        """Weighted distances (B, M) of details from those of the support images, or of all but one; 0 if unused."""
        if self.detail is None:
            return 0.0
        details = unaveraged(layers)
        # A graph has a batch of any size. Otherwise, the similarities of one image are in memory at a time.
        queries = [details] if is_exporting() or is_traced() else details.split(1)
        distances = torch.cat([self.detail.cosine_distances(each, without) for each in queries])
        return self.settings.detail_weight * distances

    def _anomaly_map(self, scores: Tensor, features: Tensor, images: Tensor) -> Tensor:
        """Anomaly maps (B, 1, h, w) of images for the scores (B, M) of the cells of their features (B, D, H, W)."""
        maps = scores.unflatten(-1, features.shape[-2:])[:, None]
        anomaly_map: Tensor = self.anomaly_map_generator([maps], images.shape[-2:])
        return anomaly_map

    @torch.no_grad()
    def contributions(self, images: Tensor) -> dict[str, Tensor]:
        """Contribution of each layer, of the position and of the detail to the anomaly map, which is their sum.

        A cost is the root of a sum of squares, c = √Σ d_k² over layers and position. Its parts d_k ∂c/∂d_k = d_k² / c
        add up to c (Euler's theorem on homogeneous functions). The score is the mean of c over the memory under the
        forward navigator. Queries teach nothing here.

        Args:
            images: (B, 3, h, w), pre-processed.

        Returns:
            (B, 1, h, w) for each layer, for ``position`` unless ``position_weight`` is 0, and for ``detail`` unless
            ``detail_weight`` is 0.

        Raises:
            RuntimeError: If there is no support set yet.
        """
        self._require_fit()
        layers = self.extract_layers(images)
        features = averaged(layers)
        names = [*map(str, self.feature_extractor.layers), *["position"] * (self.settings.position_weight > 0)]
        with full_precision(features):
            parts = torch.cat([self._parts(query) for query in self._embed(features).split(1)], 1)
            if self.detail is not None:
                names.append("detail")
                parts = torch.cat([parts, torch.as_tensor(self._detail_scores(layers))[None]])
            maps = parts.unflatten(-1, features.shape[-2:])[:, :, None]
            return {
                name: self.anomaly_map_generator([scores], images.shape[-2:])
                for name, scores in zip(names, maps, strict=True)
            }

    @torch.no_grad()
    def plan(self, image: Tensor) -> QueryPlan:
        """Compute where conditional transport sends the cells of a query, which teaches nothing here.

        Args:
            image: (3, h, w), pre-processed.

        Returns:
            The plan.

        Raises:
            RuntimeError: If there is no support set yet.
        """
        self._require_fit()
        features = self.extract(image[None])
        with full_precision(features):
            query = self._embed(features)
            memory = self.episodic.join(self.semantic.register_to(query))
            return QueryPlan(
                self._forward_plan(memory, query)[0],
                (features.shape[-2], features.shape[-1]),
                self.semantic.nearest_views(query)[0],
                self.semantic.features.shape[2],
                memory.is_foreground[0],
            )

    @torch.no_grad()
    def locate(self, image: Tensor, view: int = 0) -> tuple[Tensor, Tensor]:
        """Find the memory's features in an image, such as one of the support set.

        Args:
            image: (3, h, w), pre-processed.
            view: Number of the view to find; the image is rotated to its angle.

        Returns:
            Nearest cell of the rotated image for each of the n features of this view of the K support images, (K, n),
            and its distance, (K, n), which is about zero for the image from which the features were taken.

        Raises:
            RuntimeError: If there is no support set yet.
        """
        self._require_fit()
        features = self.extract(self.views(image[None])[:, view])
        with full_precision(features):
            distances, cells = euclidean_cost(self.semantic.features[:, view], self._embed(features)).min(1)
        return cells, distances

    def _forward_plan(self, memory: Memory, query: Tensor) -> Tensor:
        """π(m | q) of one query (1, M, C), (1, M, N); with ``measure="nearest"``, 1 for the nearest feature."""
        if self.settings.measure == "nearest":
            nearest = euclidean_cost(memory.features, query).argmin(-1)
            return F.one_hot(nearest, memory.features.shape[1]).to(query.dtype)
        return conditional_plan(self._navigator_of(memory, query)(memory.features, query)).forward

    def _parts(self, query: Tensor) -> Tensor:
        """Contribution of each layer and of the position to the scores of one query (1, M, C): (parts, 1, M)."""
        memory = self.episodic.join(self.semantic.register_to(query))
        sizes = [*self.feature_extractor.out_dims, *[2] * (self.settings.position_weight > 0)]
        pairs = zip(memory.features.split(sizes, -1), query.split(sizes, -1), strict=True)
        squares = torch.stack([squared_distance(*pair).clamp(min=0) for pair in pairs])
        shares = squares / squares.sum(0).clamp(min=torch.finfo(squares.dtype).tiny)
        costs = self._forward_plan(memory, query) * euclidean_cost(memory.features, query)
        return (costs * shares).sum(-1)

    def _embed(self, features: Tensor) -> Tensor:
        """Features (B, D, H, W) with their positions, as points (B, M, C); their Euclidean distance is the cost."""
        return self._points(features, self.centre, self.scale)

    def _points(self, features: Tensor, centre: Tensor, scale: Tensor) -> Tensor:
        """As :meth:`_embed`, for the mean (C,) and the total standard deviation () of another support set."""
        points = (features.movedim(1, -1) - centre) / scale
        if self.settings.position_weight:
            positions = self.settings.position_weight * grid_coordinates(*features.shape[-2:]).to(points)
            batch = features.shape[0]
            points = torch.cat([points, positions.view(*features.shape[-2:], 2).expand(batch, -1, -1, -1)], -1)
        return points.flatten(1, 2)

    def _score_frozen(self, query: Tensor) -> Tensor:
        """Scores (B, M) of queries (B, M, C), for the current memory and navigator."""
        return self._score(query, self.episodic.join(self.semantic.register_to(query)), self.navigator)[0]

    # A compiled graph would learn only when it is traced, or not at all.
    @torch.compiler.disable
    def _score_and_learn(self, query: Tensor) -> Tensor:
        """Scores (1, M) of one query (1, M, C), which may then enter the episodic memory."""
        if self.settings.online:
            self.earlier.append(self.taught())
        semantic = self.semantic.register_to(query)
        memory = self.episodic.join(semantic)
        navigator = self._navigator_of(memory, query)
        scores, relevance, foreground = self._score(query, memory, navigator)
        if self.settings.online:
            # Excludes the episodic memory: a chain of small steps would lead away from the support set.
            distance = euclidean_cost(semantic.features, query)[0].amin(-1)
            if self._may_teach(distance):
                self.navigator.load_state_dict(navigator.state_dict())
                normal = torch.maximum(scores[0], distance) <= self.semantic.threshold
                self._learn(query[0], normal, relevance[0], foreground[0] > 0.5)  # noqa: PLR2004
        return scores

    def _score(self, query: Tensor, memory: Memory, navigator: Navigator) -> tuple[Tensor, Tensor, Tensor]:
        """Eq. 8 for queries (B, M, C): scores, relevance to the memory, and probability of the foreground, each (B, M).

        Relevance is the largest probability of being sent to a feature of the memory (eq. 6). With
        ``measure="nearest"`` it is the negative distance to the nearest feature.
        """
        costs = euclidean_cost(memory.features, query)
        flags = memory.is_foreground.to(costs.dtype)
        if self.settings.measure == "nearest":
            scores, nearest = costs.min(-1)
            return scores, -scores, flags.gather(-1, nearest)
        forward = conditional_plan(navigator(memory.features, query)).forward
        return (forward * costs).sum(-1), forward.amax(-1), (forward @ flags[..., None])[..., 0]


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (C,) and total standard deviation () of features (K, C, H, W)."""
    flat = features.movedim(1, -1).flatten(0, -2)
    return flat.mean(0), flat.var(0, correction=0).sum().sqrt().clamp(min=torch.finfo(flat.dtype).tiny)
