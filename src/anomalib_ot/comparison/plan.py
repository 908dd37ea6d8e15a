"""What to compare: models, data, seeds, and what all of them share."""

import csv
from argparse import ArgumentError
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from inspect import signature
from itertools import product
from pathlib import Path
from typing import Any

import yaml
from anomalib.data import AnomalibDataModule
from anomalib.models.components import AnomalibModule
from anomalib.pre_processing import PreProcessor
from jsonargparse import ArgumentParser

from anomalib_ot.components.backbones import backbone_name, resize_and_normalize
from anomalib_ot.components.class_paths import class_of, create, rooted
from anomalib_ot.components.settings import require
from anomalib_ot.data import FewShot

from .record import Key, folder_name

_JOIN = "+"
_SPLIT_SEED = 0
_PUBLISHED = ("category", "model", "metric", "value", "source")
# What a model of a plan may set beside its class and arguments.
_OWN = ("image_size", "shots", "trainer", "why")
_FORMS = {"init_args": dict, "trainer": dict, "image_size": list | tuple, "categories": list | tuple}


@dataclass(frozen=True)
class Job:
    """One model to fit and test on one category with one seed. Plain values, so that it can travel as JSON.

    Args:
        key: Which run this is.
        model: ``class_path`` and ``init_args`` of the model.
        data: ``class_path`` and ``init_args`` of the data module.
        image_size: Height and width in pixels.
        trainer: Further arguments of anomalib's Engine, such as ``max_epochs``.
        shots: Number of training images where the model has one of its own, else None.
        overrides: Where the model departs from the others, as text.
        accelerator: Where to run, as the trainer's.
        threads: Threads of torch, or None for its own choice.
        openvino: Whether to time the model in OpenVINO too.
        time_limit: Minutes after which the run is given up, or None.
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
        """A job from what :meth:`to_dict` made, after its way through JSON."""
        return cls(**{**values, "key": Key(**values["key"]), "image_size": tuple(values["image_size"])})

    def to_dict(self) -> dict[str, Any]:
        """The job as plain values."""
        return asdict(self)

    @property
    def config(self) -> dict[str, Any]:
        """What decides the result; a run with another one is another run."""
        return {
            "model": self.model,
            "data": self.data,
            "image_size": list(self.image_size),
            "trainer": self.trainer,
            # Absent from the runs of models without shots of their own, among them all that are older.
            **({"shots": self.shots} if self.shots else {}),
        }

    @property
    def training_images(self) -> int | None:
        """How many images the model is fitted on, None for all."""
        return self.shots or self.key.shots

    def create_model(self) -> AnomalibModule:
        """A new model with the shared backbone and size, which neither evaluates nor draws."""
        shared = {"pre_processor": self._pre_processor(), "evaluator": False, "visualizer": False}
        model = {**self.model, "init_args": {**self.model["init_args"], **shared}}
        return create(AnomalibModule, model)

    def create_data(self) -> AnomalibDataModule:
        """A new data module, whose random splits are the same for all models and seeds."""
        data = create(AnomalibDataModule, self.data)
        if data.seed is None:
            data.seed = _SPLIT_SEED
        return data if self.training_images is None else FewShot(data, self.training_images, self.key.seed)

    def _pre_processor(self) -> PreProcessor:
        if backbone := self.model["init_args"].get("backbone"):
            return resize_and_normalize(self.image_size, backbone)
        return class_of(AnomalibModule, self.model).configure_pre_processor(self.image_size)


@dataclass(frozen=True)
class Plan:
    """A comparison of models on data, with what all share.

    Args:
        models: For each label ``class_path`` and ``init_args``, and where a model needs them ``trainer``,
            ``image_size``, ``shots`` and ``why``, the reason for departing from the others.
        data: For each label ``class_path`` and ``init_args`` of a data module, and ``categories`` if it has several.
        backbone: Backbone of all models that take one and do not name their own; a folder is ``local-dir:PATH`` or a
            ``Path``, and may begin with ``~``.
        layers: Layers of all models that take several and do not name their own.
        image_size: Height and width in pixels.
        seeds: Seeds of everything random.
        shots: Numbers of training images, None for all of them.
        trainer: Arguments of anomalib's Engine, such as ``max_epochs``, for models that do not set their own.
        baseline: Label of the model that the others are compared with.
        ensembles: Labels joined by plus signs, as ``Pradot+PaDiM``.
        reference: CSV file of published results to show beside ours.
        title: Title of the report.

    Raises:
        ValueError: If something is missing, unknown, or not accepted by a class.
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
        if any(count is not None and count < 1 for count in self.shots) or any(seed < 0 for seed in self.seeds):
            msg = f"shots must be at least 1 and seeds at least 0, not {list(self.shots)} and {list(self.seeds)}"
            raise ValueError(msg)
        for kind, configs in ((AnomalibModule, self.models), (AnomalibDataModule, self.data)):
            for label, config in configs.items():
                _check(kind, label, config)
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
            if len({folder_name(label) for label in labels}) < len(labels):
                msg = f"two of the labels {', '.join(labels)} would lie in the same folder; rename one"
                raise ValueError(msg)

    def published(self) -> list[dict[str, str]]:
        """Rows of the reference, with ``category``, ``model``, ``metric``, ``value`` and ``source`` each.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it has other columns.
        """
        if not self.reference:
            return []
        with self.reference.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if tuple(reader.fieldnames or ()) != _PUBLISHED:
                msg = f"{self.reference} must have the columns {', '.join(_PUBLISHED)}, not {reader.fieldnames}"
                raise ValueError(msg)
            return list(reader)

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
        """The runs, category by category, each model with all its seeds.

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
        """What is the same in all jobs of a model."""
        accepted = _parameters(AnomalibModule, config)
        own = config.get("init_args", {})
        shared = {"backbone": self.backbone, "layers": self.layers and list(self.layers)}
        given = {name: value for name, value in shared.items() if value and name in accepted and name not in own}
        init_args = {**given, **own}
        if backbone := init_args.get("backbone"):
            init_args["backbone"] = backbone_name(backbone)
        return {
            "model": {"class_path": config["class_path"], "init_args": init_args},
            "image_size": tuple(config.get("image_size", self.image_size)),
            "trainer": {**self.trainer, **config.get("trainer", {})},
            "shots": config.get("shots"),
            "overrides": self._overrides(config, accepted),
        }

    def _overrides(self, config: dict[str, Any], accepted: set[str]) -> dict[str, str]:
        """What the model sets itself, and what it cannot be given."""
        own = {**config.get("init_args", {}), **{name: config[name] for name in _OWN if name in config}}
        if self.backbone and "backbone" not in accepted:
            own["backbone"] = "its own"
        return {name: str(value) for name, value in own.items()}


def members(ensemble: str) -> list[str]:
    """Labels of the models of an ensemble."""
    return [label.strip() for label in ensemble.split(_JOIN)]


def read_plan(
    path: Path | None = None,
    models: Sequence[str | dict[str, Any]] | None = None,
    data: Sequence[str | dict[str, Any]] | None = None,
    root: Path | None = None,
    **settings: Any,
) -> Plan:
    """The plan of a YAML file, of a command line, or of both, where the command line wins.

    Args:
        path: YAML file with the arguments of :class:`Plan`; its ``reference`` is meant from the file's folder.
        models: Labels of the file's models to keep, or other models: a class, or ``class_path`` and ``init_args``.
        data: The same for data modules.
        root: Folder that a data module's relative ``root`` is meant from.
        **settings: Other arguments of :class:`Plan`; None leaves what the file says.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file or a name is not understood.
    """
    content = _load(path) if path else {}
    for name, names in (("models", models), ("data", data)):
        if names is not None:
            content[name] = _choose(content.get(name, {}), names)
    if models is not None:
        content["ensembles"] = [
            each for each in content.get("ensembles", ()) if {*members(each)} <= {*content["models"]}
        ]
        if content.get("baseline") not in {*content["models"], *content["ensembles"]}:
            content["baseline"] = None
    content |= {name: value for name, value in settings.items() if value is not None}
    if root is not None:
        content["data"] = {label: rooted(config, root) for label, config in content.get("data", {}).items()}
    values: dict[str, Any] = {"models": {}, "data": {}}
    values |= {name: tuple(value) if isinstance(value, list) else value for name, value in content.items()}
    _check_types(values, path)
    return Plan(**values)


def _load(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        msg = f"{path} cannot be read as YAML: {error}"
        raise ValueError(msg) from error
    known = [each.name for each in fields(Plan)]
    if not isinstance(content, dict) or not content.keys() <= {*known}:
        msg = f"{path} is no plan of a comparison, which may have {', '.join(known)}"
        raise ValueError(msg)
    if isinstance(reference := content.get("reference"), str):
        content["reference"] = path.parent / reference
    return content


def _check_types(values: dict[str, Any], path: Path | None) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Plan)
    try:
        parser.parse_object(values)
    except (ArgumentError, TypeError) as error:
        msg = f"{path or 'the plan'}: {' '.join(str(error).split())}"
        raise ValueError(msg) from error


def _choose(labelled: dict[str, Any], wanted: Sequence[str | dict[str, Any]]) -> dict[str, Any]:
    chosen = {}
    for each in wanted:
        if isinstance(each, str) and each in labelled:
            chosen[each] = labelled[each]
        else:
            config = {"class_path": each} if isinstance(each, str) else each
            chosen[str(config.get("class_path")).rpartition(".")[2]] = config
    return chosen


def _check(kind: type, label: str, config: dict[str, Any]) -> None:
    """Refuse what the class would, before anything runs."""
    extra = {"class_path", "init_args", *(_OWN if kind is AnomalibModule else ("categories",))}
    require(isinstance(label, str), "a label", "text, in quotation marks", label)
    if not isinstance(config, dict) or "class_path" not in config or not config.keys() <= extra:
        msg = f"{label} must have a class_path, and may have {', '.join(sorted(extra - {'class_path'}))}: {config}"
        raise ValueError(msg)
    for name, form in _FORMS.items():
        if name in config and not isinstance(config[name], form):
            msg = f"{label}: {name} must be a {getattr(form, '__name__', 'list')}, not {config[name]!r}"
            raise ValueError(msg)
    shots = config.get("shots", 1)
    require(type(shots) is int and shots >= 1, f"{label}: shots", "a whole number of at least 1", shots)
    try:
        class_of(kind, config)
    except ArgumentError as error:
        msg = f"{label}: {' '.join(str(error).split())}"
        raise ValueError(msg) from error


def _parameters(kind: type, config: dict[str, Any]) -> set[str]:
    return {*signature(class_of(kind, config)).parameters}
