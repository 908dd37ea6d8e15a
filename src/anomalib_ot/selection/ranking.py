"""The order of the candidates after their trials."""

from collections.abc import Sequence
from math import inf

from .trial import Trial

MARGIN = inf
"""Points of mean synthetic AUROC by which a candidate must exceed the default to be chosen instead of it.

It is infinite: the default is always chosen, and the other trials are information only. No finite margin was shown to
be better than a fixed model on real defects, see ``benchmarks/selection.py``.
"""


def rank(trials: Sequence[Trial], default: str, margin: float = MARGIN) -> list[Trial]:
    """Order trials, the chosen one first.

    Args:
        trials: The trials.
        default: Name of the default candidate.
        margin: Points by which another candidate must exceed it.

    Returns:
        The trials by mean synthetic AUROC, highest first. The default moves to the front if none exceeds it by more
        than the margin.
    """
    ordered = sorted(trials, key=lambda trial: trial.mean, reverse=True)
    own = next((trial for trial in ordered if trial.candidate.name == default), None)
    if own is None or ordered[0].mean > own.mean + margin:
        return ordered
    return [own, *(trial for trial in ordered if trial is not own)]
