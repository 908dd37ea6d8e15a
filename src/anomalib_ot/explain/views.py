"""The view that all models have, and the table of a model's views: its own are declared in its package."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module

from anomalib.models.components import AnomalibModule
from matplotlib.figure import Figure

from anomalib_ot import MODELS
from anomalib_ot.drawing.data import Data
from anomalib_ot.drawing.pictures import Picture
from anomalib_ot.drawing.views import Subject, View

from .evidence import Evidence, NormalScores, draw_evidence, evidence_of

# A p-value would compare what the model knows with what it does not.
_TRAINED_ON = NormalScores(why_none="no p-value, as the model was trained on this picture")


class ScoredSubject(Subject):
    """A fitted model and pictures, with the scores of normal ones that tell how unusual a score is.

    Args:
        model: A fitted model of ours.
        data: The pictures.
        normal: Scores of its normal pictures that are held out.
        seed: Seed of what is drawn at random.
        pixel: Pixel of a picture that a view explains, from the left and from the top, as the model sees it; by default
            the highest of its map.
    """

    def __init__(
        self,
        model: AnomalibModule,
        data: Data,
        normal: NormalScores | None = None,
        seed: int = 0,
        pixel: tuple[float, float] | None = None,
    ) -> None:
        super().__init__(model, data, seed, pixel)
        self.normal = normal or NormalScores()

    def evidence(self, picture: Picture) -> Evidence:
        """The evidence for or against a picture."""
        is_trained_on = picture.path in self.training_paths
        return evidence_of(self.model, picture, _TRAINED_ON if is_trained_on else self.normal)


def _draw_evidence(subject: ScoredSubject, picture: Picture) -> dict[str, Figure]:
    return {"evidence": draw_evidence(subject.evidence(picture))}


EVIDENCE = View(
    "What the model flags and how sure that is: regions above its threshold, the anomaly map, the place of the "
    "score among normal pictures, and how much each part of the model adds.",
    _draw_evidence,
)


@dataclass(frozen=True)
class Views:
    """The views of a model, by name.

    Args:
        of_pictures: Those of a picture, the evidence first.
        of_model: Those of the model itself.
    """

    of_pictures: Mapping[str, View]
    of_model: Mapping[str, View]

    @property
    def all(self) -> dict[str, View]:
        """All of them, those of pictures first."""
        return {**self.of_pictures, **self.of_model}


def views_of(model: type[AnomalibModule], names: Sequence[str] | None = None) -> Views:
    """The views of a model.

    Args:
        model: Class of the model. Its attribute ``views`` names the package that declares its views.
        names: Those that are wanted; by default all.

    Returns:
        The views.

    Raises:
        ValueError: If the model has no views, or none of a name.
    """
    package = getattr(model, "views", None)
    if not isinstance(package, str):
        msg = f"there are no views of {model.__name__}, but of {', '.join(MODELS)}"
        raise ValueError(msg)  # noqa: TRY004 - the type of the model is what the user asks for
    declared = import_module(package)
    available = Views({"evidence": EVIDENCE, **declared.PICTURE_VIEWS}, declared.MODEL_VIEWS)
    if names is None:
        return available
    if unknown := [name for name in names if name not in available.all]:
        msg = f"{model.__name__} has no views {', '.join(unknown)}; it has {', '.join(available.all)}"
        raise ValueError(msg)
    return Views(
        *(
            {name: view for name, view in table.items() if name in names}
            for table in (available.of_pictures, available.of_model)
        )
    )
