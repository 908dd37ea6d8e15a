"""The choice of a model without labelled anomalies, by how well each candidate finds synthetic ones."""

from .candidates import CANDIDATES, Candidate, on_backbones
from .choosing import choose
from .detection import Detected
from .ranking import MARGIN, rank
from .trial import Trial

__all__ = ["CANDIDATES", "MARGIN", "Candidate", "Detected", "Trial", "choose", "on_backbones", "rank"]
