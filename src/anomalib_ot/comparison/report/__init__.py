"""The report of a comparison, as an HTML page and as Markdown."""

from .page import REPORT_FILES, write_report

__all__ = ["REPORT_FILES", "write_report"]
