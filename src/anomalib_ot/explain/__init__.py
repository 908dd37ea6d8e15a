"""Views of what a model has learned and of why it flagged a picture.

The public names are imported on first use: the visualizer is imported whenever anomalib is, and draws later, if at all.
"""

_PUBLIC = {
    "Evidence": "anomalib_ot.explain.evidence",
    "ExplainingVisualizer": "anomalib_ot.explain.visualizer",
    "NormalScores": "anomalib_ot.explain.evidence",
    "Picture": "anomalib_ot.drawing.pictures",
    "conformal_p_value": "anomalib_ot.explain.evidence",
    "draw_all_assignments": "anomalib_ot.models.pradot.views.assignments",
    "draw_assignments": "anomalib_ot.models.pradot.views.assignments",
    "draw_evidence": "anomalib_ot.explain.evidence",
    "draw_flow": "anomalib_ot.models.wt_flow.views.flow",
    "draw_foreground": "anomalib_ot.models.foct.views.memory",
    "draw_growth": "anomalib_ot.models.foct.views.memory",
    "draw_projection": "anomalib_ot.models.pradot.views.projection",
    "draw_prototypes": "anomalib_ot.models.pradot.views.prototypes",
    "draw_restoration": "anomalib_ot.models.pradot.views.restoration",
    "draw_transport": "anomalib_ot.models.foct.views.memory",
    "evidence_of": "anomalib_ot.explain.evidence",
    "explain": "anomalib_ot.explain.explanation",
    "find_support": "anomalib_ot.models.foct.views.memory",
    "image_scores": "anomalib_ot.explain.evidence",
    "memory_growth": "anomalib_ot.models.foct.views.memory",
    "nearest_patches": "anomalib_ot.models.pradot.views.prototypes",
    "pictures_of": "anomalib_ot.drawing.pictures",
    "save": "anomalib_ot.drawing.figures",
    "ways_of": "anomalib_ot.models.wt_flow.views.flow",
    "write_page": "anomalib_ot.models.pradot.views.cells",
}
__all__ = sorted(_PUBLIC)  # noqa: PLE0605 - a list all the same


def __getattr__(name: str) -> object:
    if name in _PUBLIC:
        from importlib import import_module  # noqa: PLC0415

        return getattr(import_module(_PUBLIC[name]), name)
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
