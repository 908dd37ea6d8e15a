"""The view that all models have, and the table of a model's views, which its package declares."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module

from anomalib.models.components import AnomalibModule
from matplotlib.figure import Figure

from anomalib_ot import MODELS
from anomalib_ot.drawing.data import Data
from anomalib_ot.drawing.pictures import Picture
from anomalib_ot.drawing.views import Subject, View

from .evidence import Evidence, NormalScores, evidence_of
from .evidence_figure import draw_evidence

# A p-value would compare a training image with images that the model was not trained on.
_TRAINED_ON = NormalScores(why_none="no p-value, because the model was trained on this image")


class ScoredSubject(Subject):
    """A fitted model and images, with the scores of other normal images for p-values.

    Args:
        model: A fitted model of this package.
        data: The images.
        normal: Scores of normal images that the model was not trained on.
        seed: Seed of random choices.
        pixel: Pixel that a view explains, from the left and from the top of the model's input; by default the highest
            pixel of the map.
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
        """The evidence for the score of an image."""
        is_trained_on = picture.path in self.training_paths
        return evidence_of(self.model, picture, _TRAINED_ON if is_trained_on else self.normal)


def _draw_evidence(subject: ScoredSubject, picture: Picture) -> dict[str, Figure]:
    return {"evidence": draw_evidence(subject.evidence(picture))}


EVIDENCE = View(
    "What the model flags, and how unusual the score is: regions above the threshold, the anomaly map, the rank of the "
    "score among normal images, and the contribution of each part of the model.",
    _draw_evidence,
)


@dataclass(frozen=True)
class Views:
    """The views of a model, by name.

    Args:
        of_pictures: Views of an image, with the evidence first.
        of_model: Views of the model.
    """

    of_pictures: Mapping[str, View]
    of_model: Mapping[str, View]

    @property
    def all(self) -> dict[str, View]:
        """All views, with those of images first."""
        return {**self.of_pictures, **self.of_model}


def views_of(model: type[AnomalibModule], names: Sequence[str] | None = None) -> Views:
    """The views of a model.

    Args:
        model: Class of the model. Its attribute ``views`` names the package that declares its views.
        names: Names of the requested views; by default all.

    Returns:
        The views.

    Raises:
        ValueError: If the model has no views, or no view with one of the names.
    """
    package = getattr(model, "views", None)
    if not isinstance(package, str):
        msg = f"{model.__name__} has no views; models with views are {', '.join(MODELS)}"
        raise ValueError(msg)  # noqa: TRY004 - the user chooses the class of the model
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
