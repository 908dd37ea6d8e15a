"""Views of Duo: those of Pradot and of WtFlow, each of its part of the model."""

from collections.abc import Mapping
from copy import copy
from dataclasses import replace
from typing import Any

from anomalib_ot.drawing.views import Subject, View
from anomalib_ot.models.pradot import views as of_pradot
from anomalib_ot.models.wt_flow import views as of_wt_flow

__all__ = ["MODEL_VIEWS", "PICTURE_VIEWS"]


def _of_part(views: Mapping[str, View], name: str) -> dict[str, View]:
    """The views of a part, from a subject that is the whole model."""

    def part(subject: Subject) -> Subject:
        found = copy(subject)
        found.torch_model = getattr(subject.torch_model, name)
        return found

    def adapted(view: View) -> View:
        def draw(subject: Subject, *rest: Any) -> Any:
            return view.draw(part(subject), *rest)

        return replace(view, draw=draw, missing=lambda subject: view.missing(part(subject)))

    return {each: adapted(view) for each, view in views.items()}


PICTURE_VIEWS = {
    **_of_part(of_pradot.PICTURE_VIEWS, "pradot"),
    **_of_part(of_wt_flow.PICTURE_VIEWS, "wt_flow"),
}
MODEL_VIEWS = {
    **_of_part(of_pradot.MODEL_VIEWS, "pradot"),
    **_of_part(of_wt_flow.MODEL_VIEWS, "wt_flow"),
}
