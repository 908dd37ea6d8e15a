"""AnomalyDINO's rule as a model of anomalib, on any backbone, to measure its cost as that of the other models."""

from collections.abc import Sequence
from typing import Any

import torch
from anomalib import LearningType
from anomalib.data import Batch, InferenceBatch
from anomalib.models.components import AnomalibModule, MemoryBankMixin
from anomalib.models.image.patchcore.anomaly_map import AnomalyMapGenerator
from anomalib.pre_processing import PreProcessor
from torch import Tensor, nn

from anomalib_ot.features.backbones import create_extractor
from anomalib_ot.features.extraction import extract_by_parts

from .references import NearestCell, joined, top_mean


class NearestCellModel(nn.Module):
    """Extractor, cells of the training images, image score and map.

    Args:
        backbone: The backbone.
        layers: Layers whose features are joined.
    """

    bank: Tensor

    def __init__(self, backbone: str, layers: Sequence[str]) -> None:
        super().__init__()
        self.feature_extractor = create_extractor(backbone, layers)
        self.enlarge = AnomalyMapGenerator()
        self.store: list[Tensor] = []
        self.register_buffer("bank", torch.empty(0))

    def fit(self) -> None:
        """Keep the cells of all stored features."""
        self.rule = NearestCell(torch.cat(self.store))
        self.store.clear()
        # In the state, so that a saved model has the cells.
        self.bank = self.rule.cells

    def forward(self, images: Tensor) -> InferenceBatch | None:
        """Score images (B, 3, h, w), or store their features during training."""
        features = joined([*extract_by_parts(self.feature_extractor, images).values()])
        if self.training:
            self.store.append(features)
            return None
        distances = self.rule(features)
        anomaly_map = self.enlarge(distances[:, None], tuple(images.shape[-2:]))
        return InferenceBatch(pred_score=top_mean(distances), anomaly_map=anomaly_map)


class NearestCellDetector(MemoryBankMixin, AnomalibModule):
    """The Lightning model.

    Args:
        backbone: The backbone.
        layers: Layers whose features are joined, as in PatchCore.
        pre_processor: As in the models of anomalib.
        post_processor: As in the models of anomalib.
        evaluator: As in the models of anomalib.
        visualizer: As in the models of anomalib.
    """

    def __init__(
        self,
        backbone: str = "resnet18",
        layers: Sequence[str] = ("layer2", "layer3"),
        pre_processor: PreProcessor | bool = True,
        post_processor: nn.Module | bool = True,
        evaluator: nn.Module | bool = True,
        visualizer: nn.Module | bool = True,
    ) -> None:
        super().__init__(pre_processor, post_processor, evaluator, visualizer)
        self.model = NearestCellModel(backbone, layers)

    def configure_optimizers(self) -> None:
        """Nothing is optimised."""

    def training_step(self, batch: Batch, *args: Any, **kwargs: Any) -> Tensor:
        """Store the features of the images."""
        del args, kwargs
        self.model(batch.image)
        return torch.zeros((), requires_grad=True, device=self.device)

    def fit(self) -> None:
        """Keep the cells of all training images."""
        self.model.fit()

    def validation_step(self, batch: Batch, *args: Any, **kwargs: Any) -> Batch:
        """Score the images."""
        del args, kwargs
        return batch.update(**self.model(batch.image)._asdict())

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """One pass over the training images."""
        return {"gradient_clip_val": 0, "max_epochs": 1, "num_sanity_val_steps": 0, "devices": 1}

    @property
    def learning_type(self) -> LearningType:
        """Normal images only."""
        return LearningType.ONE_CLASS
