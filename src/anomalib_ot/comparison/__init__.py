"""Models side by side, on the same images and by the same metrics."""

from .few_shot import FewShotPlan, compare_few_shot, summarise
from .measure import measure, median_seconds, seconds_per_image

__all__ = ["FewShotPlan", "compare_few_shot", "measure", "median_seconds", "seconds_per_image", "summarise"]
