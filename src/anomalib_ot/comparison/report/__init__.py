"""What a comparison found, as a page to look at and a text to paste."""

from .page import REPORT_FILES, write_report

__all__ = ["REPORT_FILES", "write_report"]
