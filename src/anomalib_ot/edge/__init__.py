"""Exported models on an edge device, with OpenVINO, NumPy and Pillow alone.

Neither this package nor what it imports needs torch, anomalib or Lightning.
"""

from anomalib_ot.first_use import on_first_use

_PUBLIC = {
    "EdgeInferencer": "anomalib_ot.edge.inferencer",
    "Prediction": "anomalib_ot.edge.inferencer",
    "overlay": "anomalib_ot.edge.drawing",
}
__all__ = sorted(_PUBLIC)  # noqa: PLE0605 - a list all the same
__getattr__, __dir__ = on_first_use(__name__, _PUBLIC, globals())
