"""The views of the model, which ``anomalib-ot explain`` draws beside the evidence that all models have."""

from anomalib_ot.drawing.figures import new_figure, show_image, show_map
from anomalib_ot.drawing.views import View


def _draw_distance(subject, picture):
    figure, ((image, distance),) = new_figure(1, 2)
    show_image(image, picture.image, picture.name, picture.mask)
    show_map(distance, subject.torch_model(picture.prepared[None]).anomaly_map[0, 0], "distance to the mean feature")
    return {"distance": figure}


PICTURE_VIEWS = {"distance": View("How far the features of each cell are from their mean.", _draw_distance)}
MODEL_VIEWS = {}
