"""Models that clean up after an exception in a run."""

from typing import TYPE_CHECKING, Any, cast

from lightning.pytorch import Callback, Trainer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anomalib.models.components import AnomalibModule


class Interruptible:
    """Part of a Lightning model that cleans up after an exception in a run; it overrides :meth:`on_exception`."""

    def configure_callbacks(self) -> list[Callback]:
        """The callbacks of the host, and one that notifies the model of an exception."""
        callbacks = cast("AnomalibModule", super()).configure_callbacks()
        return [*cast("Sequence[Callback]", callbacks), _Notifier()]

    def on_exception(self) -> None:
        """Clean up after an exception that ended a run."""
        raise NotImplementedError


class _Notifier(Callback):
    """Notifies a model of an exception, which the trainer passes to callbacks only."""

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        del trainer, exception
        pl_module.on_exception()
