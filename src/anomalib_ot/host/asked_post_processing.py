"""Settings of the post-processor: those that the user gives override those of the checkpoint."""

import inspect
import logging
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from anomalib.post_processing import PostProcessor

from anomalib_ot.settings import require

if TYPE_CHECKING:
    from anomalib.models.components import AnomalibModule

logger = logging.getLogger(__name__)


class AskedPostProcessing:
    """Part of a Lightning model in which the user's settings of the post-processor override those of a checkpoint.

    The host replaces them by those of the checkpoint, so that a sensitivity given to ``predict``, ``test`` or
    ``export`` would have no effect. A setting that differs from its default counts as the user's: a default that the
    user typed cannot be told from one that was left out.
    """

    # Settings of the last checkpoint: the model has them now, but not from the user.
    _of_checkpoint: dict[str, Any] | None = None

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: str | Path, *args: Any, **kwargs: Any) -> "AnomalibModule":
        """Load a model as the base class does; in an export, with the user's post-processor."""
        given = _given_to_export(inspect.currentframe())
        post_processor = getattr(given, "post_processor", None)
        if asked_settings(post_processor):
            kwargs.setdefault("post_processor", deepcopy(post_processor))
        return cast("type[AnomalibModule]", super()).load_from_checkpoint(checkpoint_path, *args, **kwargs)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Load the post-processor of the checkpoint, and restore the user's settings.

        Raises:
            ValueError: If a sensitivity is not in [0, 1].
        """
        model = cast("AnomalibModule", self)
        asked = asked_settings(model.post_processor, self._of_checkpoint)
        require_sensitivities(asked)
        cast("AnomalibModule", super()).on_load_checkpoint(checkpoint)
        if not isinstance(model.post_processor, PostProcessor):
            return
        theirs = self._of_checkpoint = model.post_processor.checkpoint_config()
        for name, value in asked.items():
            if value != theirs.get(name):
                setattr(model.post_processor, name, value)
                logger.info(
                    "%s: %s is %r as given, not %r as in the checkpoint", model.name, name, value, theirs.get(name)
                )


def require_sensitivities(settings: Mapping[str, Any]) -> None:
    """Check the range of the sensitivities among the settings of a post-processor.

    Args:
        settings: Settings by name.

    Raises:
        ValueError: If one is not in [0, 1].
    """
    for name, value in settings.items():
        if name.endswith("_sensitivity"):
            require(0 <= value <= 1, name, "in [0, 1]", value)


def asked_settings(post_processor: Any, of_checkpoint: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Settings of a post-processor that are neither its defaults nor those of a checkpoint.

    Args:
        post_processor: A post-processor. One that is not anomalib's has no settings.
        of_checkpoint: Settings of the checkpoint that it was loaded from.

    Returns:
        The settings by name.
    """
    if not isinstance(post_processor, PostProcessor):
        return {}
    theirs = of_checkpoint or {}
    # A subclass may pass settings on to that of the host.
    kinds = (PostProcessor, type(post_processor))
    defaults = {name: each for kind in kinds for name, each in inspect.signature(kind).parameters.items()}
    return {
        name: value
        for name, value in post_processor.checkpoint_config().items()
        if name in defaults and value not in (defaults[name].default, theirs.get(name, defaults[name].default))
    }


def _given_to_export(frame: Any) -> Any:
    """The model that was given to ``Engine.export``, which replaces it by one that it loads from the checkpoint."""
    from anomalib.engine import Engine  # noqa: PLC0415 - the engine imports the models

    caller = frame
    while caller is not None and caller.f_code.co_name == "load_from_checkpoint":
        caller = caller.f_back
    is_export = caller is not None and caller.f_code is Engine.export.__code__
    return caller.f_locals.get("model") if is_export else None
