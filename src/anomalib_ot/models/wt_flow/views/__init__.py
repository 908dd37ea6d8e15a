"""Views of the model."""
