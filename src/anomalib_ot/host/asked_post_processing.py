"""Thresholds that are asked for: what a user says of the post-processor wins over the checkpoint."""

import inspect
import logging
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from anomalib.post_processing import PostProcessor

from anomalib_ot.settings import require

if TYPE_CHECKING:
    from anomalib.models.components import AnomalibModule

logger = logging.getLogger(__name__)


class AskedPostProcessing:
    """Part of a Lightning model that obeys the settings of a post-processor which are asked for.

    The host loads those of the checkpoint over them: a sensitivity that is given to ``predict``, ``test`` or ``export``
    would say nothing. What differs from the default counts as asked for, as nothing tells a default that was typed from
    one that was not.
    """

    # What the last checkpoint had; the model has it now, but nobody asked for it.
    _of_checkpoint: dict[str, Any] | None = None

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: str | Path, *args: Any, **kwargs: Any) -> "AnomalibModule":
        """Load a model, as the base does; in an export, with the post-processor that was asked for."""
        given = _given_to_export(inspect.currentframe())
        post_processor = getattr(given, "post_processor", None)
        if _asked(post_processor, {}):
            kwargs.setdefault("post_processor", deepcopy(post_processor))
        return cast("type[AnomalibModule]", super()).load_from_checkpoint(checkpoint_path, *args, **kwargs)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the post-processor of the checkpoint, but for what is asked for."""
        model = cast("AnomalibModule", self)
        asked = _asked(model.post_processor, self._of_checkpoint or {})
        for name, value in asked.items():
            if name.endswith("_sensitivity"):
                require(0 <= value <= 1, name, "in [0, 1]", value)
        cast("AnomalibModule", super()).on_load_checkpoint(checkpoint)
        if not isinstance(model.post_processor, PostProcessor):
            return
        theirs = self._of_checkpoint = model.post_processor.checkpoint_config()
        for name, value in asked.items():
            if value != theirs.get(name):
                setattr(model.post_processor, name, value)
                logger.info(
                    "%s: %s is %r as asked for, not %r as in the checkpoint", model.name, name, value, theirs.get(name)
                )


def _asked(post_processor: Any, of_checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Settings of a post-processor that are neither its defaults nor those of a checkpoint."""
    if not isinstance(post_processor, PostProcessor):
        return {}
    # A subclass may pass the host's on.
    kinds = (PostProcessor, type(post_processor))
    defaults = {name: each for kind in kinds for name, each in inspect.signature(kind).parameters.items()}
    return {
        name: value
        for name, value in post_processor.checkpoint_config().items()
        if name in defaults and value not in (defaults[name].default, of_checkpoint.get(name, defaults[name].default))
    }


def _given_to_export(frame: Any) -> Any:
    """The model that ``Engine.export`` was given, which it drops for one that it loads from the checkpoint."""
    from anomalib.engine import Engine  # noqa: PLC0415 - the engine imports the models

    caller = frame
    while caller is not None and caller.f_code.co_name == "load_from_checkpoint":
        caller = caller.f_back
    is_export = caller is not None and caller.f_code is Engine.export.__code__
    return caller.f_locals.get("model") if is_export else None
