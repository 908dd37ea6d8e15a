"""The choice of a model without labelled anomalies, by how well each candidate finds synthetic ones."""

from .candidates import CANDIDATES, Candidate
from .choosing import choose
from .detection import Detected, detection_curve
from .ranking import MARGIN, rank
from .trial import Trial

__all__ = ["CANDIDATES", "MARGIN", "Candidate", "Detected", "Trial", "choose", "detection_curve", "rank"]
