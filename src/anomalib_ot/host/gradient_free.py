"""Models that learn without gradients."""

from collections.abc import Callable
from typing import Any


class GradientFree:
    """Part of a Lightning model whose training steps leave nothing for an optimizer to do."""

    @staticmethod
    def configure_optimizers() -> None:
        """Return None: there is nothing to optimise."""
        return

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """Run the training step alone: the scaler of ``16-mixed`` fails if nothing is optimised."""
        del epoch, batch_idx, optimizer
        assert optimizer_closure is not None  # noqa: S101 - the trainer passes one
        optimizer_closure()
