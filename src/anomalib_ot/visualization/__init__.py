"""Views of what a model has learned and of why it flagged a picture."""
