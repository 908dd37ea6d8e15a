"""Views of WtFlow: how its velocity field moves the cells of an image."""

from matplotlib.figure import Figure

from anomalib_ot.drawing.pictures import Picture
from anomalib_ot.drawing.views import Subject, View

from .flow import Ways, draw_flow, ways_of

__all__ = ["MODEL_VIEWS", "PICTURE_VIEWS", "Ways", "draw_flow", "ways_of"]

# Normal images in the figure of an image.
_BESIDE = 8


def _normal_pictures(subject: Subject) -> list[Picture]:
    """A few normal images, held out from training if there are any."""
    items = subject.data.held_out or subject.data.training
    return list(subject.prepared([items[index] for index in range(min(_BESIDE, len(items)))]))


def _no_normal(subject: Subject) -> str:
    return (
        ""
        if subject.data.held_out or subject.data.training
        else "there are no normal images; give the data module as data"
    )


def _draw_flow(subject: Subject, picture: Picture) -> dict[str, Figure]:
    return {"flow": draw_flow(ways_of(subject.torch_model, picture, subject.once(_normal_pictures)), picture)}


PICTURE_VIEWS = {
    "flow": View(
        "Trajectories of usual and anomalous cells from features to noise, among normal ones.",
        _draw_flow,
        _no_normal,
    ),
}
MODEL_VIEWS: dict[str, View] = {}
