"""The table of predictions that ``anomalib predict`` and ``anomalib-ot predict`` write."""

TABLE = "predictions.csv"
"""Name of the table."""

COLUMNS = ("path", "score", "threshold", "label", "score_raw", "p_value")
"""Its columns."""
