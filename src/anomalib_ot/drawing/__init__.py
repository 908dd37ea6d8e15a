"""What figures and pages are drawn with, whatever they show."""
