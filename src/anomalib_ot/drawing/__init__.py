"""Tools to draw figures and pages, independent of their content."""
