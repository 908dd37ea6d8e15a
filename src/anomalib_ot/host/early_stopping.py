"""Trainings that stop when a measured value no longer falls."""

from math import inf
from typing import Any, ClassVar

from torch import Tensor

from .feature_cache import TrainingFeatures
from .finishing import Finishing
from .model_settings import FeatureTrainingSettings


class StopsEarly(Finishing):
    """Part of a Lightning model whose training stops when a measured value no longer falls.

    The model calls :meth:`stopped_falling` with each measurement, and :meth:`restore_best` when it is finished. While
    images are held out, the state of the part that it finishes is kept with the lowest value.

    Attributes:
        early_stopping_keys: Keys in checkpoints: that of the entry, then those of the lowest value, of the number of
            measurements since then, and of the state with the lowest value.
    """

    early_stopping_keys: ClassVar[tuple[str, str, str, str]]
    settings: FeatureTrainingSettings
    training_features: TrainingFeatures
    _lowest = inf
    _measured_since = 0
    _best: dict[str, Tensor] | None = None

    @property
    def has_converged(self) -> bool:
        """Whether the last ``patience`` measurements were not lower than those before."""
        return self._measured_since >= self.settings.patience

    def stopped_falling(self, value: float, fall: float = 0.0) -> bool:
        """Record a measurement.

        Args:
            value: The measured value.
            fall: Share of the lowest value by which a lower one must be below it.

        Returns:
            Whether the training has converged.
        """
        if value < self._lowest * (1 - fall):
            self._lowest, self._measured_since = value, 0
            if self.training_features.held_out is not None:
                self._best = {name: each.clone() for name, each in self.finished_part().state_dict().items()}
        else:
            self._measured_since += 1
        return self.has_converged

    def restore_best(self) -> None:
        """Restore the state with the lowest value, if it was kept."""
        if self._best is not None:
            self.finished_part().load_state_dict(self._best)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the measurements, which resuming needs."""
        super().on_save_checkpoint(checkpoint)
        entry, *keys = self.early_stopping_keys
        checkpoint[entry] = dict(zip(keys, (self._lowest, self._measured_since, self._best), strict=True))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Load the measurements."""
        super().on_load_checkpoint(checkpoint)
        entry, *keys = self.early_stopping_keys
        self._lowest, self._measured_since, self._best = (checkpoint[entry][key] for key in keys)
