"""Metrics of anomaly maps against defects of which each counts alike."""

from .au_spro import AUSPRO, PROCurve

__all__ = ["AUSPRO", "PROCurve"]
