"""Settings of Duo."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from anomalib_ot.host.model_settings import FeatureTrainingSettings, Scoring, Training
from anomalib_ot.models.pradot import PradotSettings
from anomalib_ot.models.wt_flow import WtFlowSettings
from anomalib_ot.settings import require

_Part = TypeVar("_Part", bound=FeatureTrainingSettings)

# Duo's image score is the maximum of its map.
_UNUSED = frozenset({"top_share"})
_PARTS: dict[str, type[FeatureTrainingSettings]] = {"pradot": PradotSettings, "wt_flow": WtFlowSettings}


@dataclass(frozen=True, kw_only=True)
class DuoSettings(FeatureTrainingSettings):
    """Settings of Duo, each with what it changes; :class:`Duo` documents them.

    Raises:
        TypeError: If settings of a part are no dictionary, or one has a wrong type.
        ValueError: If a setting is out of its range, or a part has no such setting.

    Example:
        >>> DuoSettings(pradot={"epochs": 3}).of_pradot().epochs
        3
    """

    strides: ClassVar = PradotSettings.strides
    usual_image_size: ClassVar = PradotSettings.usual_image_size
    usual_batch_size: ClassVar = WtFlowSettings.usual_batch_size

    backbone: Scoring[str | Path] = PradotSettings.backbone
    smoothing: Scoring[float] = PradotSettings.smoothing
    patience: Training[int] = WtFlowSettings.patience
    # The folds weigh the parts too.
    calibration_folds: Training[int] = FeatureTrainingSettings.calibration_folds
    pradot: Scoring[dict[str, Any] | None] = None
    wt_flow: Scoring[dict[str, Any] | None] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in _PARTS:
            given = getattr(self, name)
            if not isinstance(given, Mapping | None):
                msg = f"{name} must be a dictionary of settings, not {given!r}"
                raise TypeError(msg)
            # A configuration of the host has other classes, which a checkpoint could not store.
            object.__setattr__(self, name, None if given is None else {**given})
        # Raises for settings that a part does not accept.
        self.of_pradot()
        self.of_wt_flow()

    @classmethod
    def scoring_of(cls, recorded: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
        """As the base class; of the settings of a part, only those that change scores."""
        scoring = super().scoring_of(recorded, given)
        for name, kind in _PARTS.items():
            own, theirs = ({**(values[name] or {})} for values in (given, recorded))
            decided = kind.names("scoring")
            merged = {
                **{each: value for each, value in own.items() if each not in decided},
                **{each: value for each, value in theirs.items() if each in decided},
            }
            # As it was given or recorded, if that says the same.
            same = [values[name] for values in (given, recorded) if {**(values[name] or {})} == merged]
            scoring[name] = same[0] if same else merged
        return scoring

    def of_pradot(self) -> PradotSettings:
        """The settings of Pradot."""
        return self._of_part(PradotSettings, "pradot")

    def of_wt_flow(self) -> WtFlowSettings:
        """The settings of WtFlow, which has the last one of the layers, and whose map is not smoothed."""
        return self._of_part(WtFlowSettings, "wt_flow", layers=self.layer_names[-1:], smoothing=0.0)

    def _of_part(self, kind: type[_Part], name: str, **others: Any) -> _Part:
        given = getattr(self, name) or {}
        own = {each.name for each in fields(kind)} - {each.name for each in fields(self)} - _UNUSED
        for each in given:
            require(each in own, f"a setting of {name}", f"one of {', '.join(sorted(own))}", each)
        shared = {each.name: getattr(self, each.name) for each in fields(FeatureTrainingSettings)}
        try:
            return kind(**{**shared, **others, **given})
        except TypeError as error:
            msg = f"{name} has a setting of a wrong type: {error}"
            raise TypeError(msg) from error
