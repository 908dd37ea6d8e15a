"""Comparison of models on the same images with the same metrics."""

from .bootstrap import Difference, paired_bootstrap
from .evaluation import evaluate
from .execution import compare
from .measurement import measure, median_seconds, seconds_per_image
from .plan import Job, Plan
from .plan_file import read_plan
from .record import Key, Predictions, Record, read_records, write_record
from .report.page import REPORT_FILES, write_report
from .verdicts import Verdicts

__all__ = [
    "REPORT_FILES",
    "Difference",
    "Job",
    "Key",
    "Plan",
    "Predictions",
    "Record",
    "Verdicts",
    "compare",
    "evaluate",
    "measure",
    "median_seconds",
    "paired_bootstrap",
    "read_plan",
    "read_records",
    "seconds_per_image",
    "write_record",
    "write_report",
]
