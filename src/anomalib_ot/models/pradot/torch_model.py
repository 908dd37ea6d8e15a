"""PRADOT: prototypes learned by optimal transport (Trombetta and Lartizien, 2025, arXiv 2508.12927)."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, cast

import torch
from anomalib.data import InferenceBatch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from anomalib_ot.features.anomaly_map import AnomalyMapGenerator, by_maximum
from anomalib_ot.features.backbones import prepare_extractor
from anomalib_ot.features.extraction import full_precision
from anomalib_ot.features.scorer import FeatureScorer
from anomalib_ot.features.whitening import LocalWhitening
from anomalib_ot.settings import require
from anomalib_ot.transport import NotConvergedWarning, Workspace

from .deviation import Deviation
from .prototypes import Prototypes
from .settings import PradotSettings

if TYPE_CHECKING:
    from anomalib_ot.features.map_extractor import MapExtractor


class PradotModel(FeatureScorer):
    """Multi-layer frozen features, their local and global prototypes, and the deviation from their means.

    Prototypes and maps stay in float32 for every precision of the backbone: bfloat16 cannot resolve an update by a
    twentieth, nor the differences between costs.

    Args:
        settings: The settings that :class:`Pradot` documents.
        feature_extractor: Extractor of another model of the same settings to share; by default a new one.

    Raises:
        ValueError: If the backbone lacks a layer.

    Example:
        >>> settings = PradotSettings(
        ...     backbone="resnet18", layers=["layer3"], pre_trained=False, prototypes_per_cell=1, whitened_channels=0
        ... )
        >>> model = PradotModel(settings).eval()
        >>> model.initialise(model.extract(torch.rand(2, 3, 64, 64)))
        >>> model(torch.rand(2, 3, 64, 64)).anomaly_map.shape
        torch.Size([2, 1, 64, 64])
    """

    single_precision = ("weights", "whitening", "deviations", "prototypes", "anomaly_map_generator")

    def __init__(self, settings: PradotSettings, feature_extractor: "MapExtractor | None" = None) -> None:
        super().__init__()
        self.tiler = None
        self.settings = settings
        self.layers, alphas = settings.layer_names, settings.alphas
        self.feature_extractor = feature_extractor or prepare_extractor(
            settings.backbone, self.layers, settings.pre_trained
        )
        self.workspace = Workspace(settings.transport_memory * 2**30)
        self.prototypes = nn.ModuleList(
            nn.ModuleList(Prototypes(n, alpha, settings, self.workspace) for alpha in alphas) for n in settings.per_cell
        )
        channels, count = settings.whitened_channels, len(alphas)
        self.whitening = nn.ModuleDict(
            {
                _key(layer): LocalWhitening(channels, max_modes=settings.global_modes)
                for layer in self.layers
                if channels
            }
        )
        self.deviations = nn.ModuleDict({layer: Deviation() for layer in self.whitening if settings.deviation})
        # Weight of each layer's maps: one for each α, then the deviation, (layers, maps). Until calibration, which
        # gives it a scale, the deviation has no weight, and the prototypes have equal ones.
        self.weights: Tensor
        self.register_buffer("weights", torch.full((len(self.layers), count), 1 / (len(self.layers) * count)))
        if self.deviations:
            self.weights = F.pad(self.weights, (0, 1))
        self.anomaly_map_generator = AnomalyMapGenerator(settings.smoothing)
        self._has_warned = False

    @property
    def is_initialised(self) -> bool:
        """Whether there are prototypes, from training or a checkpoint."""
        return all(prototypes.is_initialised for _, prototypes in self.by_layer())

    @property
    def count(self) -> int:
        """Number of prototypes of all layers and α."""
        return sum(len(prototypes.features) for _, prototypes in self.by_layer())

    def by_layer(self) -> Iterator[tuple[str, Prototypes]]:
        """Each layer with each of its sets of prototypes: layer by layer, then in the order of ``alphas``."""
        for layer, group in zip(self.layers, self.prototypes, strict=True):
            for prototypes in cast("nn.ModuleList", group):
                yield layer, cast("Prototypes", prototypes)

    def prototypes_of(self, layer: str, alpha: float) -> Prototypes:
        """The prototypes of a layer and an α.

        Raises:
            ValueError: If the model lacks the layer or the α.
        """
        found = {(name, each.alpha): each for name, each in self.by_layer()}
        alphas = tuple(dict.fromkeys(each for _, each in found))
        require(layer in self.layers, "layer", self.layers, layer)
        require(alpha in alphas, "alpha", alphas, alpha)
        return found[layer, alpha]

    def embeddings(self, images: Tensor) -> dict[str, Tensor]:
        """Features that are compared with the prototypes, for pre-processed images (B, 3, h, w).

        Returns:
            Features of each layer, whitened unless ``whitened_channels`` is 0, (B, D, H, W).

        Raises:
            RuntimeError: If there are no prototypes yet.
        """
        self._require_prototypes()
        return self._embed(self.extract(images))

    def fit_whitening(self, batches: Iterable[dict[str, Tensor]]) -> None:
        """Estimate how the features vary between images, unless this is known or whitening is off.

        Args:
            batches: Feature maps (B, D, H, W) of the training images.
        """
        if not self.whitening or all(self._whitening_of(layer).is_fitted for layer in self.layers):
            return
        for layer in self.layers:
            self._whitening_of(layer).reset()
        for features in batches:
            for layer in self.layers:
                self._whitening_of(layer).update(features[layer])
        for layer in self.layers:
            self._whitening_of(layer).compute()
            if self.deviations:
                self._deviation_of(layer).fit(self._whitening_of(layer))

    def initialise(self, features: dict[str, Tensor]) -> None:
        """Create the prototypes from the feature maps (B, D, H, W) of the first batch of training images."""
        embeddings = self._embed(features)
        for layer, prototypes in self.by_layer():
            prototypes.initialise(embeddings[layer])

    def update(self, features: dict[str, Tensor]) -> float:
        """Run one training step on the feature maps of a batch; return the transport cost, averaged over layers and α.

        Warns:
            NotConvergedWarning: Once, if the transport stopped before it reached the tolerance.
        """
        costs, errors = [], []
        with full_precision(features):
            embeddings = self._embed(features)
            for layer, prototypes in self.by_layer():
                plan = prototypes.update(embeddings[layer])
                costs.append(plan.transport_cost())
                errors.append(plan.marginal_error)
        settings = self.settings
        if max(errors) > settings.sinkhorn_tolerance > 0 and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"a transport stopped after {settings.sinkhorn_iterations} iterations with the marginals off by "
                f"{max(errors):.2g} in sum, more than sinkhorn_tolerance={settings.sinkhorn_tolerance:g}; if the "
                "transport cost does not fall, raise sinkhorn_iterations or epsilon",
                NotConvergedWarning,
                stacklevel=2,
            )
        return fmean(costs)

    def transport_cost(self, features: dict[str, Tensor]) -> float:
        """Transport cost of a batch, averaged over layers and α, without a training step."""
        with full_precision(features):
            embeddings = self._embed(features)
            plans = (prototypes.transport(embeddings[layer])[0] for layer, prototypes in self.by_layer())
            return fmean(plan.transport_cost() for plan in plans)

    @torch.no_grad()
    def highest_scores(self, batches: Iterable[dict[str, Tensor]]) -> Tensor:
        """Highest score of each image in each map of each layer: one for each α, then the deviation.

        Args:
            batches: Feature maps (B, D, H, W) of N images.

        Returns:
            (layers, maps, N).
        """
        return torch.cat(
            [
                torch.stack(
                    [torch.stack([score.flatten(1).amax(1) for score in row]) for row in self._scores(features)]
                )
                for features in batches
            ],
            dim=-1,
        )

    def calibrate(self, highest: Tensor) -> None:
        """Weight the maps by the inverse of the scores of normal images, so that none dominates the others.

        In each layer, the deviation has its share of the weight and the prototypes have the remainder.

        Args:
            highest: :meth:`highest_scores` of the training images, (layers, maps, N).
        """
        count = len(self.settings.alphas)
        mean = highest.mean(-1)
        weights = _inverse(mean[:, :count])
        if self.deviations:
            shares = torch.stack([self._deviation_of(layer).share for layer in self.layers])[:, None]
            weights = torch.cat([(1 - shares) / count * weights, shares * _inverse(mean[:, count:])], dim=1)
        self.weights = weights / weights.sum()

    def take_scale(self, other: "PradotModel") -> None:
        """Take the weights of a model that was fitted to more images, if it is fitted, to be comparable with it.

        The weights follow from the scores of images that a model was fitted to. These scores fall with the number of
        images, for prototypes more than for the deviation, and so would the scores of new images.

        Args:
            other: The other model, of the same settings.
        """
        if other.is_initialised:
            self.weights = other.weights

    def compress(self, batches: Iterable[dict[str, Tensor]], tolerance: float) -> Tensor:
        """Drop prototypes that no cell of a normal image needs to keep its score low.

        Args:
            batches: Feature maps (B, D, H, W) of the training images.
            tolerance: Allowed increase of a score, as a share of the highest score of its image; at least 0.

        Returns:
            :meth:`highest_scores` before compression, (layers, alphas, N).
        """
        needed = [torch.zeros(len(each.features), dtype=torch.bool) for _, each in self.by_layer()]
        highest = []
        for features in batches:
            with full_precision(features):
                embeddings = self._embed(features)
                scores = [
                    prototypes.add_needed(mask, embeddings[layer], tolerance)
                    for (layer, prototypes), mask in zip(self.by_layer(), needed, strict=True)
                ]
            highest.append(torch.stack(scores).unflatten(0, (len(self.layers), -1)))
        for (_, prototypes), mask in zip(self.by_layer(), needed, strict=True):
            prototypes.keep(mask)
        return torch.cat(highest, dim=-1)

    def finish(self, batches: Callable[[str], Iterable[dict[str, Tensor]]]) -> str:
        """Compress the prototypes and weight their maps by the training images, as the settings ask.

        Args:
            batches: Gives feature maps (B, D, H, W) of the training images, for a task that it may show.

        Returns:
            What the compression changed, in words; empty without one.
        """
        settings, report = self.settings, ""
        if not (settings.compress or settings.calibrate):
            return report
        if settings.compress:
            count = self.count
            before = self.compress(batches("Compressing"), settings.compress_tolerance)
        highest = self.highest_scores(batches("Scoring normal images"))
        if settings.compress:
            change = (highest[:, : before.shape[1]] - before).abs().amax(-1) / before.mean(-1).clamp(
                min=torch.finfo(before.dtype).tiny
            )
            report = (
                f"Kept {self.count} of {count} prototypes; the score of no training image changed by more than "
                f"{100 * float(change.max()):.1f} % of the mean."
            )
        if settings.calibrate:
            self.calibrate(highest)
        return report

    def score(self, features: dict[str, Tensor], size: Sequence[int]) -> InferenceBatch:
        """Score feature maps (B, D, H, W) of each layer.

        Args:
            features: The feature maps.
            size: Height and width of the images, in pixels.

        Returns:
            The anomaly map (B, 1, h, w) and the image score (B,), its maximum.

        Raises:
            RuntimeError: If there are no prototypes yet.
        """
        return by_maximum(self.anomaly_map_generator(self.layer_scores(features), size))

    def layer_scores(self, features: dict[str, Tensor]) -> list[Tensor]:
        """Score map (B, 1, H, W) of each layer, which the anomaly map is the sum of.

        Args:
            features: Feature maps (B, D, H, W) of each layer.

        Raises:
            RuntimeError: If there are no prototypes yet.
        """
        self._require_prototypes()
        scores = self._scores(features)
        return [
            cast("Tensor", sum(self.weights[i, j] * score for j, score in enumerate(row)))
            for i, row in enumerate(scores)
        ]

    @torch.no_grad()
    def contributions(self, images: Tensor) -> dict[str, Tensor]:
        """Contribution of each map of each layer to the anomaly map, which is their sum.

        Args:
            images: (B, 3, h, w), pre-processed.

        Returns:
            (B, 1, h, w) for each layer and each of its α and, where it counts, its deviation; named after both.

        Raises:
            RuntimeError: If there are no prototypes yet.
        """
        self._require_prototypes()
        scores = self._scores(self.extract(images))
        names = [*(f"alpha {alpha:g}" for alpha in self.settings.alphas), "deviation"]
        return {
            f"{layer}, {name}": self.anomaly_map_generator([weight * score], images.shape[-2:])
            for layer, row, weights in zip(self.layers, scores, self.weights, strict=True)
            for name, score, weight in zip(names, row, weights, strict=False)
            if name != "deviation" or weight > 0
        }

    def _scores(self, features: dict[str, Tensor]) -> list[list[Tensor]]:
        """Score map (B, 1, H, W) of each layer and, within it, each α and then the deviation."""
        with full_precision(features):
            embeddings = self._embed(features)
            return [
                [
                    *(prototypes(embeddings[layer]) for prototypes in cast("nn.ModuleList", group)),
                    *([self._deviation_of(layer)(embeddings[layer])] if self.deviations else []),
                ]
                for layer, group in zip(self.layers, self.prototypes, strict=True)
            ]

    def _embed(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """The features, whitened unless ``whitened_channels`` is 0."""
        if not self.whitening:
            return features
        return {layer: self._whitening_of(layer)(features[layer]) for layer in self.layers}

    def _require_prototypes(self) -> None:
        if not self.is_initialised:
            msg = "Pradot has no prototypes yet: fit it, or load a checkpoint with ckpt_path"
            raise RuntimeError(msg)

    def _deviation_of(self, layer: str) -> Deviation:
        return cast("Deviation", self.deviations[_key(layer)])

    def _whitening_of(self, layer: str) -> LocalWhitening:
        return cast("LocalWhitening", self.whitening[_key(layer)])


def _inverse(scores: Tensor) -> Tensor:
    """Inverse of scores; those far below the highest one give no scale, as with more prototypes than features."""
    return 1 / scores.clamp(min=1e-3 * float(scores.max()) or 1.0)


def _key(layer: str) -> str:
    """Name of a layer as a key of a ``ModuleDict``, which allows no dots."""
    return layer.replace(".", "_")
