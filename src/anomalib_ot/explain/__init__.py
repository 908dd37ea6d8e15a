"""Why a model flagged a picture, and what it has learned: the evidence, and the views that each model declares.

What draws the views of a model is in its own package, such as :mod:`anomalib_ot.models.pradot.views`.

The public names are imported on first use: the visualizer is imported whenever anomalib is, and draws later, if at all.
"""

_PUBLIC = {
    "Evidence": "anomalib_ot.explain.evidence",
    "ExplainingVisualizer": "anomalib_ot.explain.visualizer",
    "NormalScores": "anomalib_ot.explain.evidence",
    "Picture": "anomalib_ot.drawing.pictures",
    "conformal_p_value": "anomalib_ot.explain.evidence",
    "draw_evidence": "anomalib_ot.explain.evidence",
    "evidence_of": "anomalib_ot.explain.evidence",
    "explain": "anomalib_ot.explain.explanation",
    "image_scores": "anomalib_ot.explain.evidence",
    "pictures_of": "anomalib_ot.drawing.pictures",
    "save": "anomalib_ot.drawing.figures",
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
