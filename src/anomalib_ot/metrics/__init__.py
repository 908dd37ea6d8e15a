"""Metrics of anomaly maps in which all defects have equal weight."""

from .au_spro import AUSPRO, PROCurve

__all__ = ["AUSPRO", "PROCurve"]
