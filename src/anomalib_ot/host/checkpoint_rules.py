"""What a checkpoint decides about a model."""

from typing import NamedTuple

from .model_settings import ModelSettings


class CheckpointRules(NamedTuple):
    """What a checkpoint decides about a model.

    Attributes:
        settings: The model's settings, each of which has a kind.
        learned: Substrings of the names of tensors whose shape depends on the training images.
        parts: Attributes of the Lightning model that are modules built from the settings.
        marks: Prefixes of names of tensors that only this model has. Only a model that wrote checkpoints of the first
            format, which do not record their model, needs them.
    """

    settings: type[ModelSettings]
    learned: tuple[str, ...] = ()
    parts: tuple[str, ...] = ("model",)
    marks: tuple[str, ...] = ()

    @property
    def score(self) -> frozenset[str]:
        """Settings that change the scores of a trained model. The checkpoint decides them."""
        return self.settings.names("scoring")

    @property
    def training(self) -> frozenset[str]:
        """Settings that change what is trained only. When training continues, the given values apply."""
        return self.settings.names("training")
