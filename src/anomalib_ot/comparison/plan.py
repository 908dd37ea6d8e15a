"""The plan of a comparison: models, data, seeds and shared settings."""

import csv
import json
from argparse import ArgumentError
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from inspect import signature
from itertools import product
from pathlib import Path
from typing import Any

from anomalib.data import AnomalibDataModule
from anomalib.models.components import AnomalibModule
from anomalib.pre_processing import PreProcessor
from lightning.pytorch import Trainer

from anomalib_ot.data import FewShot
from anomalib_ot.features.backbones import backbone_name
from anomalib_ot.features.preprocessing import resize_and_normalize
from anomalib_ot.host.class_paths import class_of, create
from anomalib_ot.settings import require

from .defaults import defaults_for
from .record import Key, folder_name

_JOIN = "+"
_SPLIT_SEED = 0
_PUBLISHED = ("category", "model", "metric", "value", "source")
# Keys of a model in a plan besides its class and arguments.
_OWN = ("image_size", "shots", "trainer", "why")
_FORMS = {"init_args": dict, "trainer": dict, "image_size": list | tuple, "categories": list | tuple}
# Arguments of models that name their backbone; anomalib's models for vision transformers have the second.
_BACKBONES = ("backbone", "encoder_name")
# Arguments of the trainer that a plan can set; each job sets the others.
_TRAINER = signature(Trainer).parameters.keys() - {"accelerator", "callbacks", "default_root_dir", "logger"}
_HIGHEST_SEED = 2**32 - 1
# Longest file name of common file systems, in bytes.
_LONGEST_NAME = 255


@dataclass(frozen=True)
class Job:
    """One model to fit and test on one category with one seed. All values are plain, so that a job can be sent as JSON.

    Args:
        key: Key of the run.
        model: ``class_path`` and ``init_args`` of the model.
        data: ``class_path`` and ``init_args`` of the data module.
        image_size: Height and width in pixels.
        trainer: Further arguments of anomalib's Engine, such as ``max_epochs``.
        shots: Number of training images if the model has its own number, else None.
        overrides: Settings in which the model differs from the others, as text.
        accelerator: Accelerator of the trainer.
        threads: Threads of torch, or None for torch's default.
        openvino: Whether to time the model in OpenVINO as well.
        time_limit: Time limit of the run in minutes, or None.
    """

    key: Key
    model: dict[str, Any]
    data: dict[str, Any]
    image_size: tuple[int, int] = (256, 256)
    trainer: dict[str, Any] = field(default_factory=dict)
    shots: int | None = None
    overrides: dict[str, str] = field(default_factory=dict)
    accelerator: str = "auto"
    threads: int | None = None
    openvino: bool = False
    time_limit: float | None = None

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Job":
        """A job from the values of :meth:`to_dict`, which may have been converted to JSON and back."""
        return cls(**{**values, "key": Key(**values["key"]), "image_size": tuple(values["image_size"])})

    def to_dict(self) -> dict[str, Any]:
        """The job as plain values."""
        return asdict(self)

    @property
    def config(self) -> dict[str, Any]:
        """Settings that determine the result. Runs with different settings are different runs."""
        return {
            "model": self.model,
            "data": self.data,
            "image_size": list(self.image_size),
            "trainer": self.trainer,
            # Absent if the model has no shots of its own, as in all runs of earlier versions.
            **({"shots": self.shots} if self.shots else {}),
        }

    @property
    def training_images(self) -> int | None:
        """Number of training images, None for all."""
        return self.shots or self.key.shots

    def create_model(self) -> AnomalibModule:
        """A new model with the shared backbone and image size, without evaluator and visualizer."""
        shared = {"pre_processor": self._pre_processor(), "evaluator": False, "visualizer": False}
        model = {**self.model, "init_args": {**self.model["init_args"], **shared}}
        return create(AnomalibModule, model)

    def create_data(self) -> AnomalibDataModule:
        """A new data module. Its random splits are the same for all models and seeds."""
        data = create(AnomalibDataModule, self.data)
        if data.seed is None:
            data.seed = _SPLIT_SEED
        return data if self.training_images is None else FewShot(data, self.training_images, self.key.seed)

    def _pre_processor(self) -> PreProcessor:
        for name in _BACKBONES:
            if backbone := self.model["init_args"].get(name):
                return resize_and_normalize(self.image_size, backbone)
        return class_of(AnomalibModule, self.model).configure_pre_processor(self.image_size)


@dataclass(frozen=True)
class Plan:
    """A comparison of models on data, with the settings that all models share.

    Args:
        models: ``class_path`` and ``init_args`` for each label. Optional keys are ``trainer``, ``image_size``,
            ``shots`` and ``why``, the reason why the model differs from the others.
        data: ``class_path`` and ``init_args`` of a data module for each label, and ``categories`` if it has several.
        backbone: Backbone of all models that accept one, as ``backbone`` or as ``encoder_name``, and do not set their
            own. A folder is ``local-dir:PATH`` or a ``Path``, and may begin with ``~``.
        layers: Layers of all models that accept several and do not set their own. By default, each model uses its own
            layers. If the backbone has no layers of these names, the model uses its last layers of the same strides.
        image_size: Height and width in pixels.
        seeds: Seeds of all random numbers.
        shots: Numbers of training images, None for all images.
        trainer: Arguments of anomalib's Engine, such as ``max_epochs``, for models that do not set their own.
        baseline: Label of the model that the others are compared with.
        ensembles: Labels joined by plus signs, such as ``Pradot+PaDiM``.
        reference: CSV file of published results to show beside the measured ones.
        title: Title of the report.

    Raises:
        ValueError: If an argument is missing, unknown, or not accepted by a class.
    """

    models: dict[str, dict[str, Any]]
    data: dict[str, dict[str, Any]]
    backbone: str | Path | None = None
    layers: tuple[str, ...] | None = None
    image_size: tuple[int, int] = (256, 256)
    seeds: tuple[int, ...] = (0,)
    shots: tuple[int | None, ...] = (None,)
    trainer: dict[str, Any] = field(default_factory=dict)
    baseline: str | None = None
    ensembles: tuple[str, ...] = ()
    reference: Path | None = None
    title: str = "Comparison"

    def __post_init__(self) -> None:
        for name in ("models", "data", "seeds", "shots"):
            if not getattr(self, name):
                msg = f"a comparison needs {name}"
                raise ValueError(msg)
        require(all(count is None or count >= 1 for count in self.shots), "shots", "at least 1", list(self.shots))
        require(min(self.seeds) >= 0, "seeds", "at least 0", list(self.seeds))
        require(max(self.seeds) <= _HIGHEST_SEED, "a seed", f"at most {_HIGHEST_SEED}", max(self.seeds))
        for name, values in (("seeds", self.seeds), ("shots", self.shots)):
            require(len({*values}) == len(values), name, "different from one another", list(values))
        if self.backbone is not None:
            backbone_name(self.backbone)
        require_plain("the title", self.title)
        _check_size("image_size", self.image_size)
        _check_trainer("trainer", self.trainer)
        for kind, configs in ((AnomalibModule, self.models), (AnomalibDataModule, self.data)):
            for label, config in configs.items():
                _check(kind, label, config)
        for label, config in self.categories().items():
            _check_class(AnomalibDataModule, label, config)
        self._check_labels()

    def _check_labels(self) -> None:
        for ensemble in self.ensembles:
            if len(set(members(ensemble))) < 2 or ensemble in self.models:  # noqa: PLR2004
                msg = f"an ensemble joins the labels of two models or more, as a{_JOIN}b, not {ensemble!r}"
                raise ValueError(msg)
        wanted = {label for ensemble in self.ensembles for label in members(ensemble)}
        if unknown := wanted - self.models.keys():
            msg = f"no model is called {', '.join(sorted(unknown))}; there are {', '.join(self.models)}"
            raise ValueError(msg)
        if self.baseline and self.baseline not in {*self.models, *self.ensembles}:
            msg = f"the baseline {self.baseline!r} is not among {', '.join([*self.models, *self.ensembles])}"
            raise ValueError(msg)
        for labels in ([*self.models, *self.ensembles], [*self.categories()]):
            # Some file systems ignore case.
            folders = [folder_name(label).casefold() for label in labels]
            if len({*folders}) < len(labels):
                msg = f"two of the labels {', '.join(labels)} have the same folder; rename one"
                raise ValueError(msg)
            if too_long := [label for label in labels if len(folder_name(label).encode()) > _LONGEST_NAME]:
                msg = f"the label {too_long[0]!r} is too long for a folder name; rename it"
                raise ValueError(msg)

    def published(self) -> list[dict[str, str]]:
        """Rows of the reference. Each has ``category``, ``model``, ``metric``, ``value`` and ``source``.

        Raises:
            FileNotFoundError: If the file does not exist.
            ValueError: If the file has other columns or is not a CSV table.
        """
        if not self.reference:
            return []
        with self.reference.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            try:
                columns, rows = tuple(reader.fieldnames or ()), list(reader)
            except (csv.Error, UnicodeDecodeError) as error:
                msg = f"{self.reference} cannot be read as CSV: {error}"
                raise ValueError(msg) from error
        if columns != _PUBLISHED:
            msg = f"{self.reference} must have the columns {', '.join(_PUBLISHED)}, not {list(columns)}"
            raise ValueError(msg)
        if wrong := [row for row in rows if None in row or None in row.values()]:
            msg = f"{self.reference} has a line that does not have {len(columns)} cells: {wrong[0]}"
            raise ValueError(msg)
        return rows

    def categories(self) -> dict[str, dict[str, Any]]:
        """``class_path`` and ``init_args`` of each data module, by ``label`` or ``label/category``."""
        found = {}
        for label, config in self.data.items():
            data = {"class_path": config["class_path"], "init_args": config.get("init_args", {})}
            if names := config.get("categories"):
                for name in names:
                    found[f"{label}/{name}"] = {**data, "init_args": {**data["init_args"], "category": name}}
            else:
                found[label] = data
        return found

    def draws(self) -> list[tuple[str, int | None, int]]:
        """Category, number of training images and seed of the runs of each model."""
        return list(product(self.categories(), self.shots, self.seeds))

    def jobs(self, **settings: Any) -> list[Job]:
        """The jobs, ordered by category, number of training images, model and seed.

        Args:
            **settings: ``accelerator``, ``threads``, ``openvino`` and ``time_limit`` of each :class:`Job`.
        """
        models = {label: self._completed(config) for label, config in self.models.items()}
        combinations = product(self.categories().items(), self.shots, models, self.seeds)
        return [
            Job(Key(category, label, shots, seed), data=data, **models[label], **settings)
            for (category, data), shots, label, seed in combinations
        ]

    def _completed(self, config: dict[str, Any]) -> dict[str, Any]:
        """Arguments that all jobs of a model share."""
        kind = class_of(AnomalibModule, config)
        accepted = {*signature(kind).parameters}
        own = config.get("init_args", {})
        shared = {**dict.fromkeys(_BACKBONES, self.backbone), "layers": self.layers and list(self.layers)}
        given = {name: value for name, value in shared.items() if value and name in accepted and name not in own}
        init_args = {**given, **own}
        init_args |= {name: backbone_name(init_args[name]) for name in _BACKBONES if init_args.get(name)}
        image_size = tuple(config.get("image_size", self.image_size))
        defaults = defaults_for(kind, init_args, image_size)
        init_args |= {name: default.value for name, default in defaults.items()}
        return {
            "model": {"class_path": config["class_path"], "init_args": init_args},
            "image_size": image_size,
            "trainer": {**self.trainer, **config.get("trainer", {})},
            "shots": config.get("shots"),
            "overrides": {
                **self._overrides(config, accepted),
                **{name: f"{default.value}, {default.why}" for name, default in defaults.items()},
            },
        }

    def _overrides(self, config: dict[str, Any], accepted: set[str]) -> dict[str, str]:
        """Settings that the model sets itself, and those that it does not accept."""
        own = {**config.get("init_args", {}), **{name: config[name] for name in _OWN if name in config}}
        if self.backbone and accepted.isdisjoint(_BACKBONES):
            own["backbone"] = "its own"
        return {name: str(value) for name, value in own.items()}


def members(ensemble: str) -> list[str]:
    """Labels of the models of an ensemble."""
    return [label.strip() for label in ensemble.split(_JOIN)]


def _check(kind: type, label: str, config: dict[str, Any]) -> None:
    """Refuse a configuration that its class would refuse, before any run."""
    extra = {"class_path", "init_args", *(_OWN if kind is AnomalibModule else ("categories",))}
    require(isinstance(label, str) and bool(label.strip()), "a label", "text, in quotation marks", label)
    require_plain(label, {label: config})
    if not isinstance(config, dict) or "class_path" not in config or not config.keys() <= extra:
        msg = f"{label} must have a class_path, and may have {', '.join(sorted(extra - {'class_path'}))}: {config}"
        raise ValueError(msg)
    for name, form in _FORMS.items():
        if name in config and not isinstance(config[name], form):
            msg = f"{label}: {name} must be a {getattr(form, '__name__', 'list')}, not {config[name]!r}"
            raise ValueError(msg)
    shots = config.get("shots", 1)
    require(type(shots) is int and shots >= 1, f"{label}: shots", "a whole number of at least 1", shots)
    categories = config.get("categories", ())
    is_text = all(isinstance(each, str) and each.strip() for each in categories)
    require(is_text, f"{label}: categories", "text, in quotation marks", categories)
    _check_size(f"{label}: image_size", config.get("image_size", (1, 1)))
    _check_trainer(f"{label}: trainer", config.get("trainer", {}))
    _check_class(kind, label, config)


def _check_class(kind: type, label: str, config: dict[str, Any]) -> None:
    try:
        class_of(kind, config)
    except ArgumentError as error:
        msg = f"{label}: {' '.join(str(error).split())}"
        raise ValueError(msg) from error


def _check_size(name: str, size: Sequence[Any]) -> None:
    is_size = len(size) == 2 and all(type(side) is int and side >= 1 for side in size)  # noqa: PLR2004
    require(is_size, name, "two whole numbers of at least 1, height and width", size)


def _check_trainer(name: str, trainer: dict[str, Any]) -> None:
    unknown = [each for each in trainer if each not in _TRAINER]
    require(not unknown, f"each of {name}", "an argument of Lightning's Trainer that no job sets", unknown)


def require_plain(name: str, value: object) -> None:
    """Refuse values that JSON cannot represent, such as dates, NaN, or a list that contains itself."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (RecursionError, TypeError, ValueError) as error:
        msg = f"{name!r} must be text, finite numbers, lists and dictionaries: {error}"
        raise ValueError(msg) from error
