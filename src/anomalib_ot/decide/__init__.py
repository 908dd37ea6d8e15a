"""Decisions with a promised rate of false alarms: thresholds and p-values from the scores of good images.

The public names are imported on first use, because :mod:`anomalib_ot.decide.conformal` needs NumPy alone.
"""

from anomalib_ot.first_use import on_first_use

_PUBLIC = {
    "ConformalPostProcessor": "anomalib_ot.decide.post_processor",
    "ConformalScale": "anomalib_ot.decide.conformal",
    "Decision": "anomalib_ot.decide.decision",
    "DriftMonitor": "anomalib_ot.decide.drift",
    "DriftState": "anomalib_ot.decide.drift",
    "benjamini_hochberg": "anomalib_ot.decide.conformal",
    "p_values": "anomalib_ot.decide.conformal",
    "supported_rate": "anomalib_ot.decide.conformal",
    "threshold": "anomalib_ot.decide.conformal",
}
__all__ = sorted(_PUBLIC)  # noqa: PLE0605 - a list all the same
__getattr__, __dir__ = on_first_use(__name__, _PUBLIC, globals())
