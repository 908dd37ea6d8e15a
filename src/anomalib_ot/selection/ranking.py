"""The order of the candidates after their trials."""

from collections.abc import Sequence

from .trial import Trial

MARGIN = 0.0
"""Points of mean synthetic AUROC by which a candidate must exceed the default to be chosen instead of it."""


def rank(trials: Sequence[Trial], default: str, margin: float = MARGIN) -> list[Trial]:
    """Order trials, the chosen one first.

    Args:
        trials: The trials.
        default: Name of the default candidate.
        margin: Points by which another candidate must exceed it.

    Returns:
        The trials by mean synthetic AUROC, highest first. The default moves to the front if none exceeds it by the
        margin.
    """
    ordered = sorted(trials, key=lambda trial: trial.mean, reverse=True)
    own = next((trial for trial in ordered if trial.candidate.name == default), None)
    if own is None or ordered[0].mean > own.mean + margin:
        return ordered
    return [own, *(trial for trial in ordered if trial is not own)]
