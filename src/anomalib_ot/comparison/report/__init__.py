"""What a comparison found, as a page to look at and a text to paste."""

from .page import write_report

__all__ = ["write_report"]
