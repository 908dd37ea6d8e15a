"""What a checkpoint decides about a model."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from .model_settings import ModelSettings


class CheckpointRules(NamedTuple):
    """What a checkpoint decides about a model.

    Attributes:
        settings: The model's settings, each of which has a kind.
        learned: Substrings of the names of tensors whose shape depends on the training images.
        parts: Attributes of the Lightning model that are modules built from the settings.
        marks: Prefixes of names of tensors that only this model has. Only a model that wrote checkpoints of the first
            format, which do not record their model, needs them.
        before: Settings that checkpoints of earlier formats lack, with the values that give the same scores.
    """

    settings: type[ModelSettings]
    learned: tuple[str, ...] = ()
    parts: tuple[str, ...] = ("model",)
    marks: tuple[str, ...] = ()
    before: Mapping[str, Any] = MappingProxyType({})

    @property
    def score(self) -> frozenset[str]:
        """Settings that change the scores of a trained model. The checkpoint decides them."""
        return self.settings.names("scoring")

    @property
    def training(self) -> frozenset[str]:
        """Settings that change what is trained only. When training continues, the given values apply."""
        return self.settings.names("training")
