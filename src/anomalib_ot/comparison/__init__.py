"""Models side by side, on the same images and by the same metrics."""

from .few_shot import METRICS, FewShotPlan, compare_few_shot, protocol_metrics, summarise
from .measure import measure, median_seconds, seconds_per_image

__all__ = [
    "METRICS",
    "FewShotPlan",
    "compare_few_shot",
    "measure",
    "median_seconds",
    "protocol_metrics",
    "seconds_per_image",
    "summarise",
]
