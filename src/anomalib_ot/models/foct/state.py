"""State of Foct: the memories, the navigator, and what queries teach them."""

import logging
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from anomalib.models.components import DynamicBufferMixin
from torch import Tensor

from anomalib_ot.decide.conformal import images_for, rank_p_values
from anomalib_ot.features.single_precision import SinglePrecisionParts
from anomalib_ot.settings import require
from anomalib_ot.transport import Navigator

from .memory import EpisodicMemory, Memory, SemanticMemory
from .navigator import fit_to, new_navigator
from .settings import FoctSettings

logger = logging.getLogger(__name__)

# Queries that can be undone. With the default settings and a Wide ResNet-50 they take 60 MB at most.
_HISTORY = 100


class Taught(NamedTuple):
    """What queries have taught up to a point in time.

    Attributes:
        memory: The episodic memory, (1, N, C) and (1, N).
        navigator: State of the navigator.
    """

    memory: Memory
    navigator: dict[str, Tensor]


class FoctState(DynamicBufferMixin, SinglePrecisionParts):
    """A semantic memory, and an episodic memory and a navigator, which queries may teach.

    All stay in float32 for every precision of the backbone.

    Args:
        settings: The settings that :class:`Foct` documents.
        channels: C, the dimensions of the points that are compared.
    """

    single_precision: ClassVar[tuple[str, ...]] = (
        *("centre", "scale", "view_distances", "semantic", "detail", "episodic", "support_navigator", "navigator"),
    )
    centre: Tensor
    scale: Tensor
    view_distances: Tensor | None

    def __init__(self, settings: FoctSettings, channels: int) -> None:
        super().__init__()
        self.settings = settings
        # Whether queries teach nothing.
        self.is_frozen = False
        self.semantic = self._new_memory()
        # Features of unit length that are not averaged.
        self.detail = self._new_memory() if settings.detail_weight else None
        self.episodic = EpisodicMemory(settings.capacity, settings.compression)
        # Mean (C,) and total standard deviation () of the support features.
        self.register_buffer("centre", torch.empty(0, dtype=torch.float32))
        self.register_buffer("scale", torch.ones((), dtype=torch.float32))
        # Largest distance of a cell of each left-out view of the support images, (V,), ascending.
        self.register_buffer("view_distances", torch.empty(0) if settings.online and settings.online_rate else None)
        self._new_navigator = partial(new_navigator, channels, settings)
        # Fitted to the support set, and the current one.
        self.support_navigator = self._new_navigator()
        self.navigator = deepcopy(self.support_navigator)
        # State before each of the last queries.
        self.earlier: deque[Taught] = deque(maxlen=_HISTORY)

    def _new_memory(self) -> SemanticMemory:
        return SemanticMemory(self.settings.foreground_ratio, self.settings.background_ratio)

    def __getstate__(self) -> dict[str, Any]:
        """The state without the history, which neither copies nor exported files need."""
        return {**super().__getstate__(), "earlier": deque(maxlen=_HISTORY)}

    @property
    def is_fitted(self) -> bool:
        """Whether there is a support set, from training or a checkpoint."""
        return self.semantic.is_fitted

    def _require_fit(self) -> None:
        if not self.is_fitted:
            msg = "Foct has no support set yet: fit it, or load a checkpoint with ckpt_path"
            raise RuntimeError(msg)

    def reset(self) -> None:
        """Discard the queries: empty the episodic memory, and restore the navigator of the support set."""
        self.episodic.clear()
        self.navigator.load_state_dict(self.support_navigator.state_dict())
        self.earlier.clear()

    def taught(self) -> Taught:
        """A copy of what queries have taught so far."""
        features, is_foreground = self.episodic.features.clone(), self.episodic.is_foreground.clone()
        navigator = {name: value.clone() for name, value in self.navigator.state_dict().items()}
        return Taught(Memory(features[None], is_foreground[None]), navigator)

    def recall(self, taught: Taught) -> None:
        """Restore memory and navigator to their state when :meth:`taught` was called."""
        self.episodic.replace(*(part[0] for part in taught.memory))
        self.navigator.load_state_dict(taught.navigator)

    @contextmanager
    def forgetting(self) -> Iterator[None]:
        """Start from a reset state, and restore memory, navigator and history on exit, also after an exception."""
        taught, earlier = self.taught(), tuple(self.earlier)
        self.reset()
        try:
            yield
        finally:
            self.recall(taught)
            self.earlier.clear()
            self.earlier.extend(earlier)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Keep memory and navigator unchanged: queries teach nothing."""
        before, self.is_frozen = self.is_frozen, True
        try:
            yield
        finally:
            self.is_frozen = before

    def rollback(self, queries: int) -> None:
        """Undo what the last queries taught, and score as before them.

        Args:
            queries: Number of queries, which are images and not batches; at most those since the last reset and at most
                100.

        Raises:
            ValueError: If fewer queries can be undone.
        """
        count = len(self.earlier)
        allowed = f"from 1 to {count}, the queries that can be undone (reset discards all)"
        require(1 <= queries <= count, "queries", allowed, queries)
        for _ in range(queries):
            taught = self.earlier.pop()
        self.recall(taught)

    @property
    def _is_taught(self) -> bool:
        """Whether a query changes the navigator or the memory, for itself only or for later queries too."""
        fits = self.settings.measure == "transport" and self.settings.query_steps > 0
        return not self.is_frozen and (self.settings.online or fits)

    def _navigator_of(self, memory: Memory, query: Tensor) -> Navigator:
        """The navigator that scores one query (1, M, C): the current one, or a copy that is fitted to the query."""
        steps = self.settings.query_steps
        if self.settings.measure == "nearest" or not steps or self.is_frozen:
            return self.navigator
        # Parameters that are created in inference mode could not be fitted.
        with torch.inference_mode(mode=False):
            navigator = deepcopy(self.navigator if self.settings.online else self.support_navigator)
        fit_to(navigator, memory.features[0], query[0], self.settings, steps)
        return navigator

    def _may_teach(self, distance: Tensor) -> bool:
        """Whether a query with distances (M,) from the semantic memory may teach, see ``online_rate``.

        Views of one image are no independent images, so that the p-value is a rank, and the rate no promise.
        """
        if self.view_distances is None:
            return True
        return float(rank_p_values(float(distance.amax()), self.view_distances.cpu())) > self.settings.online_rate

    def _left_out_distances(self, semantic: SemanticMemory, images: Iterable[Tensor]) -> Tensor | None:
        """The values of ``view_distances`` for the views (R, M, C) of each support image; None if it is unused."""
        if self.view_distances is None:
            return None
        distances = torch.cat([semantic.left_out_distances(views, index) for index, views in enumerate(images)])
        needed = images_for(self.settings.online_rate)
        if len(distances) < needed:
            logger.warning(
                "All images teach: online_rate=%g takes %d left-out views to refuse one, and the support images have "
                "%d. Give more images, more rotations or a higher rate.",
                self.settings.online_rate,
                needed,
                len(distances),
            )
        return distances.sort().values

    def _learn(self, query: Tensor, normal: Tensor, relevance: Tensor, is_foreground: Tensor) -> None:
        """Add the most relevant normal features of a query (M, C) to the episodic memory.

        A feature is normal if its score and its distance from the semantic memory are at most the mean distance of the
        support features from the coreset of their own image, which treats features at that distance as equal. A
        distance to the memory therefore never falls by more than this mean, however often a defect occurs.
        """
        chosen = torch.cat(
            [
                part[relevance[part].topk(min(count, part.shape[0])).indices]
                for count, part in (
                    (self.settings.top_foreground, (normal & is_foreground).nonzero()[:, 0]),
                    (self.settings.top_background, (normal & ~is_foreground).nonzero()[:, 0]),
                )
            ]
        )
        self.episodic.add(query[chosen], is_foreground[chosen])
