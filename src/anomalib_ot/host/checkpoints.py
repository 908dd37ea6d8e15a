"""Checkpoints that decide how a model scores: other settings are reported, other architectures are refused."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from anomalib.data import AnomalibDataModule
from anomalib.data.utils.tiler import ImageUpscaleMode, Tiler
from anomalib.engine.plugins.checkpoint_io import AnomalibCheckpointIO
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.utils.serialization import anomalib_safe_globals
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn

from anomalib_ot.features.backbones import backbone_name, fetch_weights
from anomalib_ot.features.recorded_backbones import record_backbone, recorded_backbone

from .asked_post_processing import AskedPostProcessing, asked_settings
from .checkpoint_files import read_checkpoint, require_exists
from .checkpoint_fit import is_same, require_fit
from .checkpoint_record import COMPONENTS, ENTRY, described, is_stored, new_entry, read_entry, tiling
from .checkpoint_rules import CheckpointRules
from .model_settings import ModelSettings

logger = logging.getLogger(__name__)

# Errors that a constructor, or a reader of an own part of the checkpoint, raises for the content of another model.
_UNFIT = (AttributeError, IndexError, KeyError, OverflowError, TypeError)


class SafeCheckpoints(AskedPostProcessing):
    """Part of a Lightning model whose checkpoints decide how it scores, and are loaded safely.

    A checkpoint holds everything that scoring needs, including the name and the weights of the backbone. If a command
    creates a model and then loads a checkpoint into it, the settings that change scores are those of the checkpoint.
    Only settings of the post-processor that the user gives override it. Only tensors and settings are unpickled,
    unless ``weights_only=False`` is given.

    Attributes:
        checkpoint_rules: The rules of the model's class.
        settings: The model's settings, which its constructor sets. They follow a checkpoint that is loaded.
        recorded_backbone: The backbone as checkpoints record it, see :meth:`record_backbone`.
    """

    checkpoint_rules: ClassVar[CheckpointRules]
    settings: ModelSettings
    recorded_backbone: dict[str, Any]

    def record_backbone(self, backbone: str) -> None:
        """Record the backbone for checkpoints.

        Args:
            backbone: An existing backbone.
        """
        self.recorded_backbone = record_backbone(backbone)

    def configure_callbacks(self) -> Any:
        """Fetch the deferred weights of the backbone before a training reads its data."""
        model = cast("AnomalibModule", self)
        if _is_fitting(model) and not model.trainer.ckpt_path:
            fetch_weights(cast("nn.Module", model.model.feature_extractor))
        return cast("AnomalibModule", super()).configure_callbacks()

    def setup(self, stage: str) -> None:
        """Let the trainer check checkpoints before it loads them."""
        model = cast("AnomalibModule", super())
        model.setup(stage)
        strategy = cast("AnomalibModule", self).trainer.strategy
        # A user-supplied CheckpointIO is kept.
        if type(strategy.checkpoint_io) is AnomalibCheckpointIO:
            strategy.checkpoint_io = _CheckingCheckpointIO(model.checkpoint_safe_globals())

    @classmethod
    def load_from_checkpoint(
        cls, checkpoint_path: str | Path, *args: Any, weights_only: bool = True, **kwargs: Any
    ) -> "AnomalibModule":
        """Load a model from a Lightning checkpoint.

        This needs neither the folder of the backbone nor a network connection.

        Args:
            checkpoint_path: Path of the file.
            *args: Those of the host.
            weights_only: Refuse a file that holds more than tensors and settings, as loading it may run code.
            **kwargs: Those of the host. Settings among them replace those of the checkpoint.

        Returns:
            The model.

        Raises:
            TypeError: If a given backbone is neither a name nor a path.
            ValueError: If the file is not a complete checkpoint of this model, or holds more than tensors and settings.
            FileNotFoundError: If the file does not exist.
        """
        host = cast("type[AnomalibModule]", super())
        require_exists(checkpoint_path)
        with anomalib_safe_globals(host.checkpoint_safe_globals()):
            content = (
                read_checkpoint(checkpoint_path)
                if weights_only
                else torch.load(checkpoint_path, map_location="cpu", weights_only=False)
            )
        if "backbone" in kwargs:
            # In the spelling of the model, so that it compares equal to that of the model.
            kwargs["backbone"] = backbone_name(kwargs["backbone"])
        with _naming(checkpoint_path):
            record = (
                None if "backbone" in kwargs else read_entry(content, cls.__name__, cls.checkpoint_rules)["backbone"]
            )
            with recorded_backbone(record) if record else nullcontext(kwargs.get("backbone")) as backbone:
                # The weights come from the checkpoint.
                settings = {"pre_trained": False, **kwargs, "backbone": backbone, "weights_only": weights_only}
                model = host.load_from_checkpoint(checkpoint_path, *args, **settings)
        theirs = content["hyper_parameters"]
        changed = {"pre_trained": kwargs.get("pre_trained", theirs["pre_trained"])}
        ours = cast("SafeCheckpoints", model)
        if record:
            changed["backbone"] = theirs["backbone"]
            ours.recorded_backbone = record
        model.hparams.update(changed)
        ours.replace_settings(changed)
        return model

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what loading needs besides settings and weights."""
        cast("AnomalibModule", super()).on_save_checkpoint(checkpoint)
        checkpoint[ENTRY] = new_entry(cast("AnomalibModule", self), self.recorded_backbone)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take what changes scores from the checkpoint, and refuse a checkpoint that does not fit.

        Raises:
            ValueError: If the checkpoint is of another model or format, or needs a component that this model lacks.
        """
        model = cast("AnomalibModule", self)
        entry = read_entry(checkpoint, type(self).__name__, self.checkpoint_rules)
        # The first format had anomalib's post-processor, and did not record it.
        recorded = entry["components"] if entry["format"] > 1 else {"post_processor": described(PostProcessor())}
        self._take_post_processor(recorded["post_processor"])
        if entry["format"] > 1:
            self._check_components(checkpoint, recorded)
        self._take_settings(checkpoint, entry["backbone"])
        if entry["format"] > 1:
            self._take_tiling(entry["tiler"])
        cast("AnomalibModule", super()).on_load_checkpoint(checkpoint)
        require_fit(model, checkpoint, self.checkpoint_rules)
        _update_data(model)

    def _take_settings(self, checkpoint: Mapping[str, Any], record: dict[str, Any]) -> None:
        """Build the model again with the settings of the checkpoint that change scores, if its own differ."""
        model = cast("AnomalibModule", self)
        theirs = checkpoint["hyper_parameters"]
        rules = self.checkpoint_rules
        if _is_fitting(model):
            self._name_differences(
                "training continues with the given settings, not with those of the checkpoint",
                [name for name in sorted(rules.training) if not is_same(model.hparams[name], theirs[name])],
                theirs,
            )
        scoring = rules.settings.scoring_of({name: theirs[name] for name in rules.score}, model.hparams)
        differing = [name for name in sorted(rules.score) if not is_same(model.hparams[name], scoring[name])]
        if not differing:
            return
        defaults = self._defaults()
        asked = [name for name in differing if not is_same(model.hparams[name], defaults[name])]
        self._name_differences("the checkpoint decides the scores, not the given settings", asked, theirs)
        # A default that the user typed cannot be told from one that was left out.
        if taken := ", ".join(f"{name} {theirs[name]!r}" for name in differing if name not in asked):
            logger.info("%s: settings taken from the checkpoint: %s", type(self).__name__, taken)
        settings = {**model.hparams, **scoring}
        without = dict.fromkeys((*COMPONENTS, "evaluator", "visualizer"), False)
        with recorded_backbone(record) as backbone:
            twin = type(self)(**{**settings, "backbone": backbone, "pre_trained": False, **without})
        for part in rules.parts:
            setattr(model, part, getattr(twin, part))
        model.train(model.training).to(model.device)
        model.hparams.update(settings)
        self.replace_settings(scoring)
        self.recorded_backbone = record

    def replace_settings(self, values: Mapping[str, Any]) -> None:
        """Replace settings of this model and, where it has them too, of its torch model."""
        self.settings = replace(self.settings, **values)
        torch_model = cast("Any", self).model
        if hasattr(torch_model, "settings"):
            torch_model.settings = self.settings

    def _defaults(self) -> dict[str, Any]:
        """Default of each setting; of those that follow from the backbone, for the backbone of this model."""
        own = cast("Any", self.checkpoint_rules.settings)
        with recorded_backbone(self.recorded_backbone) as backbone:
            return {**asdict(own(backbone=backbone)), "backbone": own.backbone}

    def _name_differences(self, rule: str, names: Sequence[str], theirs: Mapping[str, Any]) -> None:
        ours = cast("AnomalibModule", self).hparams
        if names:
            each = ", ".join(f"{name} {theirs[name]!r} (given: {ours[name]!r})" for name in names)
            logger.warning("%s: %s. In the checkpoint: %s", type(self).__name__, rule, each)

    def _take_tiling(self, theirs: dict[str, Any] | None) -> None:
        torch_model = cast("Any", self).model
        if theirs == tiling(torch_model.tiler):
            return
        if torch_model.tiler is not None:
            logger.warning("%s: the tiles are those of the checkpoint, %s", type(self).__name__, theirs or "none")
        torch_model.tiler = Tiler(**{**theirs, "mode": ImageUpscaleMode(theirs["mode"])}) if theirs else None

    def _take_post_processor(self, theirs: str | None) -> None:
        """Replace the post-processor by one of the class in the checkpoint, if that is anomalib's or the default.

        Raises:
            ValueError: If the user gave settings that the class in the checkpoint does not have.
        """
        model = cast("AnomalibModule", self)
        ours = model.post_processor
        default = model.configure_post_processor()
        known = {described(each): each for each in (PostProcessor(), default)}
        if theirs not in known or described(ours) not in known or theirs == described(ours):
            return
        if asked := asked_settings(ours):
            msg = (
                f"{', '.join(asked)} cannot be used with this checkpoint: it has the post_processor {theirs}, and "
                f"{'this is a setting' if len(asked) == 1 else 'these are settings'} of {described(ours)}. Leave it "
                "out, or train again."
            )
            raise ValueError(msg)
        # One of an earlier checkpoint was not asked for.
        if self._of_checkpoint is None and described(ours) != described(default):
            logger.warning(
                "%s: the post-processor is that of the checkpoint, %s, not the given %s. To use the given one, train "
                "again.",
                type(self).__name__,
                theirs,
                described(ours),
            )
        model.post_processor = cast("nn.Module", known[theirs]).to(model.device)
        if _has_trainer(model):
            trainer = cast("Any", model.trainer)
            trainer.callbacks = [model.post_processor if each is ours else each for each in trainer.callbacks]

    def _check_components(self, checkpoint: dict[str, Any], theirs: Mapping[str, str | None]) -> None:
        """Refuse a model whose pre- or post-processor differs from that of the checkpoint and cannot be restored."""
        model = cast("AnomalibModule", self)
        for name in COMPONENTS:
            component = getattr(model, name)
            if theirs[name] is None:
                # The host removes it from the model, but not from the trainer.
                if component is not None and _has_trainer(model):
                    trainer = cast("Any", model.trainer)
                    trainer.callbacks = [each for each in trainer.callbacks if each is not component]
            elif component is None or theirs[name] != described(component):
                given = "none" if component is None else described(component)
                msg = (
                    f"the model of the checkpoint has the {name} {theirs[name]}, which cannot be restored from the "
                    f"checkpoint; this model has {given}. Give the same {name}, or leave {name} out for the default."
                )
                raise ValueError(msg)
            elif name == "pre_processor" and not is_stored(component):
                # Otherwise the host would remove a transform that a checkpoint cannot store.
                checkpoint.pop("anomalib_pre_processor_config", None)


class _CheckingCheckpointIO(AnomalibCheckpointIO):
    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = True) -> dict[str, Any]:
        # The trainer passes None by default, which torch treats as True.
        if weights_only is not False and Path(path).is_file():
            with anomalib_safe_globals(self.extra_safe_globals):
                read_checkpoint(path)
        return super().load_checkpoint(path, map_location, weights_only=weights_only is not False)


def _has_trainer(model: AnomalibModule) -> bool:
    return model._trainer is not None  # noqa: SLF001 - the public property raises without one


def _is_fitting(model: AnomalibModule) -> bool:
    return _has_trainer(model) and model.trainer.state.fn == TrainerFn.FITTING


def _update_data(model: AnomalibModule) -> None:
    """Let the data module resize as the pre-processor of the checkpoint does: it was set up with the one before."""
    data = getattr(model.trainer, "datamodule", None) if _has_trainer(model) else None
    if isinstance(data, AnomalibDataModule):
        # A second set-up keeps the images and their split.
        data.setup(model.trainer.state.fn)


@contextmanager
def _naming(path: str | Path) -> Iterator[None]:
    """Name the file in the error if its content does not fit the model."""
    try:
        yield
    except _UNFIT as error:
        msg = f"{path} cannot be loaded, as its settings or its state do not fit the model: {error!r}"
        raise ValueError(msg) from error
