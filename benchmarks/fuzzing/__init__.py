"""Inputs of :mod:`benchmarks.fuzz`, and the classification of outcomes."""
