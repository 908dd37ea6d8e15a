"""Checkpoints decide how a model scores; what a command asks for otherwise is named, what does not fit is refused."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, cast

import torch
from anomalib.data import AnomalibDataModule
from anomalib.data.utils.tiler import ImageUpscaleMode, Tiler
from anomalib.engine.plugins.checkpoint_io import AnomalibCheckpointIO
from anomalib.models.components import AnomalibModule
from anomalib.pre_processing.utils.spec import transform_to_spec
from anomalib.utils.serialization import anomalib_safe_globals
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from anomalib_ot.features.backbones import backbone_name, fetch_weights
from anomalib_ot.features.recorded_backbones import record_backbone, recorded_backbone

from .asked_post_processing import AskedPostProcessing
from .checkpoint_files import read_checkpoint
from .model_settings import ModelSettings

logger = logging.getLogger(__name__)

# What this package adds to a checkpoint, under its name. Before 2 there was no such entry.
_FORMAT = 2
_ENTRY = "anomalib_ot"
_COMPONENTS = ("pre_processor", "post_processor")
# What content that does not belong to the model fails with, in its constructor or in its own part of the checkpoint.
_UNFIT = (AttributeError, IndexError, KeyError, OverflowError, TypeError)


class CheckpointRules(NamedTuple):
    """What a checkpoint decides of a model.

    Attributes:
        settings: The model's settings, each of which has a kind.
        learned: Parts of the names of tensors whose shape depends on the training images.
        parts: Attributes of the Lightning model that are modules made from the settings.
        marks: What names of tensors begin with in this model alone. Only a model that wrote checkpoints of the first
            format, which do not record their model, needs it.
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


class SafeCheckpoints(AskedPostProcessing):
    """Part of a Lightning model whose checkpoints decide how it scores, and are loaded safely.

    A checkpoint holds all that scoring needs, among it which network the backbone is and its weights. Where a command
    makes a model and then loads a checkpoint into it, the settings that change scores are the checkpoint's; only of the
    post-processor, what is asked for is obeyed. Nothing is unpickled but tensors and settings, unless
    ``weights_only=False`` is given.
    """

    checkpoint_rules: ClassVar[CheckpointRules]
    settings: ModelSettings
    recorded_backbone: dict[str, Any]

    def record_backbone(self, backbone: str) -> None:
        """Note which network the backbone is, for checkpoints.

        Args:
            backbone: The backbone, which exists.
        """
        self.recorded_backbone = record_backbone(backbone)

    def configure_callbacks(self) -> Any:
        """Fetch the backbone's weights, if that was put off, before a training looks at its data."""
        model = cast("AnomalibModule", self)
        if _is_fitting(model) and not model.trainer.ckpt_path:
            fetch_weights(cast("nn.Module", model.model.feature_extractor))
        return cast("AnomalibModule", super()).configure_callbacks()

    def setup(self, stage: str) -> None:
        """Let the trainer look at checkpoints before it loads them."""
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

        Neither the backbone's folder nor a network is needed.

        Args:
            checkpoint_path: Path of the file.
            *args: As the host's.
            weights_only: Refuse whatever is neither a tensor nor a setting, which may run code when it is loaded.
            **kwargs: As the host's; settings among them replace those of the checkpoint.

        Returns:
            The model.

        Raises:
            TypeError: If a backbone is given that is neither a name nor a path.
            ValueError: If the file is no whole checkpoint of such a model, or holds more than tensors and settings.
            FileNotFoundError: If there is no such file.
        """
        host = cast("type[AnomalibModule]", super())
        if not Path(checkpoint_path).is_file():
            msg = f"there is no checkpoint {checkpoint_path}"
            raise FileNotFoundError(msg)
        with anomalib_safe_globals(host.checkpoint_safe_globals()):
            content = (
                read_checkpoint(checkpoint_path)
                if weights_only
                else torch.load(checkpoint_path, map_location="cpu", weights_only=False)
            )
        if "backbone" in kwargs:
            # As the model names it, so that it is not taken for another than the model's.
            kwargs["backbone"] = backbone_name(kwargs["backbone"])
        with _naming(checkpoint_path):
            record = None if "backbone" in kwargs else _entry(content, cls)["backbone"]
            with recorded_backbone(record) if record else nullcontext(kwargs.get("backbone")) as backbone:
                # The weights are the checkpoint's.
                settings = {"pre_trained": False, **kwargs, "backbone": backbone, "weights_only": weights_only}
                model = host.load_from_checkpoint(checkpoint_path, *args, **settings)
        theirs = content["hyper_parameters"]
        changed = {"pre_trained": kwargs.get("pre_trained", theirs["pre_trained"])}
        ours = cast("SafeCheckpoints", model)
        if record:
            changed["backbone"] = theirs["backbone"]
            ours.recorded_backbone = record
        model.hparams.update(changed)
        ours.settings = replace(ours.settings, **changed)
        return model

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what loading needs beside settings and weights."""
        model = cast("AnomalibModule", self)
        cast("AnomalibModule", super()).on_save_checkpoint(checkpoint)
        checkpoint[_ENTRY] = {
            "format": _FORMAT,
            "model": type(self).__name__,
            "backbone": self.recorded_backbone,
            "tiler": _tiling(cast("Tiler | None", model.model.tiler)),
            "components": {name: _described(getattr(model, name)) for name in _COMPONENTS},
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take from the checkpoint what changes scores, and refuse by name what cannot be taken.

        Raises:
            ValueError: If the checkpoint is of another model or format, or needs a component that this model lacks.
        """
        model = cast("AnomalibModule", self)
        entry = _entry(checkpoint, type(self))
        if entry["format"] > 1:
            self._check_components(checkpoint, entry["components"])
        self._take_settings(checkpoint, entry["backbone"])
        if entry["format"] > 1:
            self._take_tiling(entry["tiler"])
        cast("AnomalibModule", super()).on_load_checkpoint(checkpoint)
        _refuse_what_does_not_fit(model, checkpoint)
        _let_data_follow(model)

    def _take_settings(self, checkpoint: Mapping[str, Any], record: dict[str, Any]) -> None:
        """Make the model anew with the settings of the checkpoint that change scores, where its own differ."""
        model = cast("AnomalibModule", self)
        theirs = checkpoint["hyper_parameters"]
        rules = self.checkpoint_rules
        if _is_fitting(model):
            self._name_differences(
                "training goes on with the settings that are given, not with those of the checkpoint",
                [name for name in sorted(rules.training) if not _is_same(model.hparams[name], theirs[name])],
                theirs,
            )
        differing = [name for name in sorted(rules.score) if not _is_same(model.hparams[name], theirs[name])]
        if not differing:
            return
        defaults = signature(type(self)).parameters
        asked = [name for name in differing if not _is_same(model.hparams[name], defaults[name].default)]
        self._name_differences("scores are those of the checkpoint, not of the settings that were given", asked, theirs)
        # Nothing tells a default that was asked for from one that was not.
        if taken := ", ".join(f"{name} {theirs[name]!r}" for name in differing if name not in asked):
            logger.info("%s: settings taken from the checkpoint: %s", type(self).__name__, taken)
        scoring = {name: theirs[name] for name in rules.score}
        settings = {**model.hparams, **scoring}
        without = dict.fromkeys((*_COMPONENTS, "evaluator", "visualizer"), False)
        with recorded_backbone(record) as backbone:
            twin = type(self)(**{**settings, "backbone": backbone, "pre_trained": False, **without})
        for part in rules.parts:
            setattr(model, part, getattr(twin, part))
        model.train(model.training).to(model.device)
        model.hparams.update(settings)
        self.settings = replace(self.settings, **scoring)
        self.recorded_backbone = record

    def _name_differences(self, rule: str, names: Sequence[str], theirs: Mapping[str, Any]) -> None:
        ours = cast("AnomalibModule", self).hparams
        if names:
            each = ", ".join(f"{name} {theirs[name]!r} (given: {ours[name]!r})" for name in names)
            logger.warning("%s: %s. In the checkpoint: %s", type(self).__name__, rule, each)

    def _take_tiling(self, theirs: dict[str, Any] | None) -> None:
        torch_model = cast("Any", self).model
        if theirs == _tiling(torch_model.tiler):
            return
        if torch_model.tiler is not None:
            logger.warning("%s: tiles are those of the checkpoint, %s", type(self).__name__, theirs or "none")
        torch_model.tiler = Tiler(**{**theirs, "mode": ImageUpscaleMode(theirs["mode"])}) if theirs else None

    def _check_components(self, checkpoint: dict[str, Any], theirs: Mapping[str, str | None]) -> None:
        """Refuse a model whose pre- or post-processor is not that of the checkpoint, where it cannot be restored."""
        model = cast("AnomalibModule", self)
        for name in _COMPONENTS:
            component = getattr(model, name)
            if theirs[name] is None:
                # The host takes it from the model, but not from the trainer.
                if component is not None and _has_trainer(model):
                    trainer = cast("Any", model.trainer)
                    trainer.callbacks = [each for each in trainer.callbacks if each is not component]
            elif component is None or theirs[name] != _described(component):
                given = "none" if component is None else _described(component)
                msg = (
                    f"the model of the checkpoint has the {name} {theirs[name]}, which cannot be made from the "
                    f"checkpoint; this model has {given}. Give the same as {name}, or leave {name} out for the default."
                )
                raise ValueError(msg)
            elif name == "pre_processor" and not _is_held(component):
                # Otherwise the host would replace a transform that no checkpoint holds by none.
                checkpoint.pop("anomalib_pre_processor_config", None)


class _CheckingCheckpointIO(AnomalibCheckpointIO):
    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = True) -> dict[str, Any]:
        # The trainer leaves it open by default, which torch takes for weights alone.
        if weights_only is not False and Path(path).is_file():
            with anomalib_safe_globals(self.extra_safe_globals):
                read_checkpoint(path)
        return super().load_checkpoint(path, map_location, weights_only=weights_only is not False)


def _has_trainer(model: AnomalibModule) -> bool:
    return model._trainer is not None  # noqa: SLF001 - the public property raises where there is none


def _is_fitting(model: AnomalibModule) -> bool:
    return _has_trainer(model) and model.trainer.state.fn == TrainerFn.FITTING


def _let_data_follow(model: AnomalibModule) -> None:
    """Let the data module resize as the pre-processor does now: it was set up with that of before the checkpoint."""
    data = getattr(model.trainer, "datamodule", None) if _has_trainer(model) else None
    if isinstance(data, AnomalibDataModule):
        # A second set-up keeps the pictures and their split.
        data.setup(model.trainer.state.fn)


@contextmanager
def _naming(path: str | Path) -> Iterator[None]:
    """Name the file whose content a model does not take."""
    try:
        yield
    except _UNFIT as error:
        msg = f"{path} cannot be loaded, as its settings or its state are not those of the model: {error!r}"
        raise ValueError(msg) from error


def _entry(checkpoint: Mapping[str, Any], kind: type) -> dict[str, Any]:
    """What this package has added to a checkpoint; of the first format, which had no such entry, only the backbone.

    Raises:
        ValueError: If the checkpoint is of another model, or of a format that is not known.
    """
    entry = _entry_of_known_format(checkpoint)
    if entry["format"] > 1 and entry["model"] != kind.__name__:
        msg = f"the checkpoint is of {entry['model']}, not of {kind.__name__}; give --model {entry['model']}"
        raise ValueError(msg)
    rules = cast("type[SafeCheckpoints]", kind).checkpoint_rules
    if missing := sorted((rules.score | rules.training) - checkpoint["hyper_parameters"].keys()):
        msg = f"the checkpoint is not of {kind.__name__}, or is damaged: it lacks the settings {', '.join(missing)}"
        raise ValueError(msg)
    if entry["format"] == 1:
        return {**entry, "backbone": _unrecorded_backbone(checkpoint["hyper_parameters"]["backbone"])}
    return entry


def recorded_model(checkpoint: Mapping[str, Any]) -> str | None:
    """Name of the class of a checkpoint's model.

    Args:
        checkpoint: Content of a checkpoint.

    Returns:
        The name; None where it is not recorded, as in the first format.

    Raises:
        ValueError: If the checkpoint is of a format that is not known.
    """
    return _entry_of_known_format(checkpoint).get("model")


def _entry_of_known_format(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    entry = checkpoint.get(_ENTRY, {"format": 1})
    if not isinstance(entry, dict) or entry.get("format") not in range(1, _FORMAT + 1):
        found = entry.get("format") if isinstance(entry, dict) else entry
        msg = (
            f"the checkpoint is of format {found!r}, this anomalib-ot knows formats up to {_FORMAT}; run: "
            "pip install --upgrade anomalib-ot"
        )
        raise ValueError(msg)
    return entry


def _unrecorded_backbone(backbone: str) -> dict[str, Any]:
    """Record the backbone of a checkpoint of the first format, which names it only."""
    try:
        return record_backbone(backbone)
    except OSError as error:
        msg = (
            f"the checkpoint was written before checkpoints recorded their backbone, and {backbone} is not there any "
            f"more ({error}). Load it in Python, with the same backbone from elsewhere: "
            'load_from_checkpoint(path, backbone="local-dir:PATH")'
        )
        raise ValueError(msg) from error


def _refuse_what_does_not_fit(model: AnomalibModule, checkpoint: Mapping[str, Any]) -> None:
    """Refuse a checkpoint whose tensors are not those of a model.

    Raises:
        ValueError: If tensors are missing, unknown or of another shape.
    """
    difference = _difference(model, checkpoint["state_dict"])
    if difference:
        settings = sorted(cast("SafeCheckpoints", model).checkpoint_rules.score)
        theirs = {key: checkpoint.get("hyper_parameters", {}).get(key) for key in settings}
        ours = {key: model.hparams.get(key) for key in settings}
        differing = [key for key in settings if not _is_same(theirs[key], ours[key])]
        msg = (
            f"the checkpoint is of another architecture: {difference}. It was made with "
            f"{ {key: theirs[key] for key in differing} }, this model has { {key: ours[key] for key in differing} }."
        )
        raise ValueError(msg)


def _difference(model: AnomalibModule, theirs: Mapping[str, Tensor]) -> str | None:
    """The first way in which a state dict does not fit the torch model, in words."""
    rules = cast("SafeCheckpoints", model).checkpoint_rules
    learned, parts = rules.learned, tuple(f"{part}." for part in rules.parts)
    ours = model.state_dict()
    # What the host's parts have may differ.
    of_model, in_theirs = ({name for name in state if name.startswith(parts)} for state in (ours, theirs))
    if missing := sorted(of_model - in_theirs):
        return f"it lacks {missing[0]}"
    if unknown := sorted(in_theirs - of_model):
        return f"it has {unknown[0]}, which this model lacks"
    for name, value in ours.items():
        # What a model learns has no shape before it is fitted.
        is_learned = any(part in name for part in learned)
        if name in theirs and value.numel() and not is_learned and theirs[name].shape != value.shape:
            return f"{name} is of shape {tuple(theirs[name].shape)}, not {tuple(value.shape)}"
    return None


def _is_same(ours: Any, theirs: Any) -> bool:
    """Whether two values of a setting are the same; a checkpoint has lists for tuples and texts for paths."""
    return _plain(ours) == _plain(theirs)


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value


def _tiling(tiler: Tiler | None) -> dict[str, Any] | None:
    """Arguments of a tiler, as plain data."""
    if tiler is None:
        return None
    return {
        "tile_size": [tiler.tile_size_h, tiler.tile_size_w],
        "stride": [tiler.stride_h, tiler.stride_w],
        "remove_border_count": tiler.remove_border_count,
        "mode": tiler.mode.value,
    }


def _described(component: nn.Module | None) -> str | None:
    """Class of a component, with its transform where a checkpoint cannot hold that."""
    if component is None:
        return None
    name = f"{type(component).__module__}.{type(component).__qualname__}"
    return name if _is_held(component) else f"{name} with {component.transform!r}"


def _is_held(component: nn.Module) -> bool:
    """Whether a checkpoint holds the transform of a pre-processor, if it has one."""
    try:
        transform_to_spec(getattr(component, "transform", None))
    except ValueError:
        return False
    return True
