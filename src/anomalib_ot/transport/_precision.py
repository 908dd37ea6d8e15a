"""Limits of the solver's arithmetic, shared by its torch code and its compiled loops."""

# A float32 sum below this counts as underflowed.
TINY = 1e-30
# Rounded similarities are integers from -LEVELS to LEVELS, in 16 bits.
LEVELS = 32767
