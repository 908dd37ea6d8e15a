"""Explanations of a score: the evidence for an image, and the views that each model declares.

The views of a model are in its package, such as :mod:`anomalib_ot.models.pradot.views`.

The public names are imported on first use, because anomalib imports the visualizer at start-up, before it draws.
"""

from anomalib_ot.first_use import on_first_use

_PUBLIC = {
    "Evidence": "anomalib_ot.explain.evidence",
    "ExplainingVisualizer": "anomalib_ot.explain.visualizer",
    "NormalScores": "anomalib_ot.explain.evidence",
    "Picture": "anomalib_ot.drawing.pictures",
    "conformal_p_value": "anomalib_ot.explain.evidence",
    "draw_evidence": "anomalib_ot.explain.evidence_figure",
    "evidence_of": "anomalib_ot.explain.evidence",
    "explain": "anomalib_ot.explain.explanation",
    "image_scores": "anomalib_ot.explain.evidence",
    "pictures_of": "anomalib_ot.drawing.pictures",
    "save": "anomalib_ot.drawing.figures",
}
__all__ = sorted(_PUBLIC)  # noqa: PLE0605 - a list all the same
__getattr__, __dir__ = on_first_use(__name__, _PUBLIC, globals())
