"""Speed, memory and accuracy, each module runnable as ``python -m benchmarks.NAME``."""
