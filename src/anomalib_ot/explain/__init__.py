"""Views of what a model has learned and of why it flagged a picture.

The public names are imported on first use: the visualizer is imported whenever anomalib is, and draws later, if at all.
"""

_PUBLIC = {
    "Evidence": "evidence",
    "ExplainingVisualizer": "visualizer",
    "NormalScores": "evidence",
    "Picture": "pictures",
    "conformal_p_value": "evidence",
    "draw_all_assignments": "assignments",
    "draw_assignments": "assignments",
    "draw_evidence": "evidence",
    "draw_flow": "flow",
    "draw_foreground": "memory",
    "draw_growth": "memory",
    "draw_projection": "projection",
    "draw_prototypes": "prototypes",
    "draw_restoration": "restoration",
    "draw_transport": "memory",
    "evidence_of": "evidence",
    "explain": "explanation",
    "find_support": "memory",
    "image_scores": "evidence",
    "memory_growth": "memory",
    "nearest_patches": "prototypes",
    "pictures_of": "pictures",
    "save": "drawing",
    "ways_of": "flow",
    "write_page": "page",
}
__all__ = sorted(_PUBLIC)  # noqa: PLE0605 - a list all the same


def __getattr__(name: str) -> object:
    if name in _PUBLIC:
        from importlib import import_module  # noqa: PLC0415

        return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
