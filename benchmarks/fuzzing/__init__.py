"""What :mod:`benchmarks.fuzz` feeds to whatever reads it, and how it tells a finding."""
