"""Settings of a model: one dataclass for its Lightning and its torch module, with what each setting changes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

from anomalib_ot.features.backbone_defaults import default_image_size, default_layers
from anomalib_ot.features.backbones import backbone_name, layers_of_backbone
from anomalib_ot.features.extraction import Extraction
from anomalib_ot.features.store import CachePlace
from anomalib_ot.settings import require, require_image_size, require_seed, require_smoothing, require_whole

if TYPE_CHECKING:
    from typing_extensions import Self

_T = TypeVar("_T")


# What a setting changes: the scores of a trained model; only what is trained; or neither, but its threshold, or where
# and how fast something is computed.
Kind = Literal["scoring", "training", "running"]

# Type of a field, with the kind of the setting.
Scoring = Annotated[_T, "scoring"]
Training = Annotated[_T, "training"]
Running = Annotated[_T, "running"]


def _hints(settings: type) -> dict[str, Any]:
    hints = get_type_hints(settings, include_extras=True)
    return {name: hint for name, hint in hints.items() if ClassVar not in (hint, get_origin(hint))}


def _kind(hint: Any) -> Kind | None:
    return next((each for each in getattr(hint, "__metadata__", ()) if each in get_args(Kind)), None)


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Settings that every model has, and the checks that all models share.

    A model's own settings inherit from it. Each field is annotated with its kind: ``Scoring[int]``, ``Training[int]``
    or ``Running[int]``. The Lightning model has the same names as arguments of its constructor, with these defaults,
    and documents them.

    A ``backbone`` that is a path becomes a name, and ``layers`` and ``image_size`` that are None become those that suit
    the backbone, see :mod:`anomalib_ot.features.backbone_defaults`.

    Attributes:
        strides: Strides of the maps that the model works on, in pixels; they decide the default ``layers``.
        usual_image_size: Default ``image_size`` on a backbone that accepts any.
        backbone: Name of a timm model, or ``local-dir:PATH`` or a ``Path`` for a folder that timm saved.
        layers: Layers of the backbone to take features from.
        pre_trained: Whether to load the backbone's pre-trained weights.
        image_size: Height and width that the default pre-processor resizes to, in pixels.
        smoothing: Standard deviation of the Gaussian that smooths the anomaly map, in pixels; 0 for none.
        seed: Seed of all random numbers of a training, at least 0; None sets none.

    Raises:
        TypeError: If a field of a subclass has no kind, or the backbone is neither a name nor a path.
        ValueError: If a setting is out of its range.
    """

    strides: ClassVar[tuple[int, ...]]
    usual_image_size: ClassVar[tuple[int, int]]

    backbone: Scoring[str | Path]
    layers: Scoring[Sequence[str] | None] = None
    pre_trained: Training[bool] = True
    image_size: Scoring[tuple[int, int] | None] = None
    smoothing: Scoring[float]
    seed: Training[int | None] = None

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if without := [name for name, hint in _hints(cls).items() if _kind(hint) is None]:
            msg = f"{cls.__name__} must annotate {', '.join(without)} with Scoring, Training or Running"
            raise TypeError(msg)

    def __post_init__(self) -> None:
        for name, hint in _hints(type(self)).items():
            choice = get_args(hint)[0]
            if get_origin(choice) is Literal:
                require(getattr(self, name) in get_args(choice), name, get_args(choice), getattr(self, name))
        # The class is frozen for its users.
        object.__setattr__(self, "backbone", backbone_name(self.backbone))
        if self.image_size is None:
            object.__setattr__(self, "image_size", default_image_size(self.backbone, self.usual_image_size))
        require_image_size(cast("tuple[int, int]", self.image_size))
        require_smoothing(self.smoothing)
        if self.seed is not None:
            require_seed(self.seed)
        if self.layers is None:
            object.__setattr__(self, "layers", default_layers(layers_of_backbone(self.backbone), self.strides))

    @property
    def layer_names(self) -> tuple[str, ...]:
        """``layers``, which are no longer None."""
        return tuple(cast("Sequence[str]", self.layers))

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Self":
        """The settings among named values, such as the arguments of a constructor.

        Args:
            values: Value of each setting by name; other names are ignored.

        Raises:
            KeyError: If a setting is missing.
            ValueError: If a setting is out of its range.
        """
        return cls(**{each.name: values[each.name] for each in fields(cls)})

    @classmethod
    def scoring_of(cls, recorded: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
        """Settings that change scores, as a checkpoint decides them.

        Args:
            recorded: Settings of this kind in the checkpoint.
            given: All settings of the model that loads it, for a setting that consists of several kinds.
        """
        del given
        return dict(recorded)

    @classmethod
    def names(cls, kind: Kind) -> frozenset[str]:
        """Names of the settings of a kind."""
        return frozenset(name for name, hint in _hints(cls).items() if _kind(hint) == kind)


@dataclass(frozen=True, kw_only=True)
class FeatureTrainingSettings(ModelSettings):
    """Settings of the models that train on cached features, see :class:`FeatureTraining`.

    Attributes:
        usual_batch_size: Images in a training batch by default, where there are as many.
        batch_size: Images in a training batch; by default ``usual_batch_size``, or all images where there are fewer.
        validation_fraction: Fraction of the training images held out, in [0, 1).
        patience: Measurements without an improvement after which training stops.
        calibration_folds: Folds of the training images whose scores set the threshold, see
            :mod:`anomalib_ot.host.cross_fit`; 0 takes the scores of the validation images.
        feature_cache: See :func:`train_on_features`.
        cache_budget: Fraction of the free memory that ``feature_cache="auto"`` may use, in (0, 1].
        extraction: See :class:`FastExtractor`.
    """

    usual_batch_size: ClassVar[int]

    patience: Training[int]
    batch_size: Training[int | None] = None
    validation_fraction: Training[float] = 0.0
    calibration_folds: Running[int] = 3
    feature_cache: Running[CachePlace] = "auto"
    cache_budget: Running[float] = 0.5
    extraction: Running[Extraction] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_whole(1, "patience", self.patience)
        if self.batch_size is not None:
            require_whole(1, "batch_size", self.batch_size)
        require(0 <= self.validation_fraction < 1, "validation_fraction", "in [0, 1)", self.validation_fraction)
        require_whole(0, "calibration_folds", self.calibration_folds)
        require(self.calibration_folds != 1, "calibration_folds", "0 or at least 2", self.calibration_folds)
        require(0 < self.cache_budget <= 1, "cache_budget", "in (0, 1]", self.cache_budget)
