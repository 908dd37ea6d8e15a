"""A look at a folder of good images before a training: what cannot be used, and what is unlike the rest.

The public names are imported on first use, because :mod:`anomalib_ot.inspection.look` does not need torch.
"""

from anomalib_ot.first_use import on_first_use

_PUBLIC = {
    "Finding": "anomalib_ot.inspection.look",
    "Inspection": "anomalib_ot.inspection.look",
    "Suspect": "anomalib_ot.inspection.contamination",
    "find_groups": "anomalib_ot.inspection.contamination",
    "find_suspects": "anomalib_ot.inspection.contamination",
    "inspect_images": "anomalib_ot.inspection.look",
}
__all__ = sorted(_PUBLIC)  # noqa: PLE0605 - a list all the same
__getattr__, __dir__ = on_first_use(__name__, _PUBLIC, globals())
