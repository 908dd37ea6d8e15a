"""Detected shares of known scores."""

from anomalib_ot.selection import Detected
from anomalib_ot.selection.detection import detected_shares


def test_shares_are_of_all_kinds():
    labels = [("blur", 0.1, 1.0), ("stain", 0.1, 1.0), ("blur", 0.1, 0.5)]
    assert detected_shares(labels, [True, False, True]) == [Detected(0.1, 0.5, 1.0, 1), Detected(0.1, 1.0, 0.5, 2)]
