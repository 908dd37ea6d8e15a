"""Models that learn, but not by gradients."""

from collections.abc import Callable
from typing import Any


class GradientFree:
    """Part of a Lightning model whose training steps leave nothing for an optimizer to do."""

    @staticmethod
    def configure_optimizers() -> None:
        """There is none."""
        return

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """Take the training step alone: the scaler of ``16-mixed`` does not bear that nothing is optimised."""
        del epoch, batch_idx, optimizer
        assert optimizer_closure is not None  # noqa: S101 - the trainer gives one
        optimizer_closure()
