"""The order of the candidates after their trials."""

from collections.abc import Sequence

from .trial import Trial

MARGIN = 1.0
"""Points of mean synthetic AUROC by which a candidate must exceed the default to be chosen instead of it.

On real defects of nine categories, this is better than always the default, see ``benchmarks/selection.py``.
"""


def rank(trials: Sequence[Trial], default: str, margin: float = MARGIN) -> list[Trial]:
    """Order trials, the chosen one first.

    Args:
        trials: The trials.
        default: Name of the default candidate.
        margin: Points by which another candidate on the default's backbone, at its image size, must exceed it. Others
            are information only: larger images show small synthetic defects better. This was not measured on real
            ones.

    Returns:
        The chosen trial, and the others by mean synthetic AUROC, highest first. Without a trial of the default, that of
        the highest mean is chosen.
    """
    ordered = sorted(trials, key=lambda trial: trial.mean, reverse=True)
    own = next((trial for trial in ordered if trial.candidate.name == default), None)
    if own is None:
        return ordered
    same = next(trial for trial in ordered if _setting(trial) == _setting(own))
    chosen = same if same.mean > own.mean + margin else own
    return [chosen, *(trial for trial in ordered if trial is not chosen)]


def _setting(trial: Trial) -> tuple[str, tuple[int, int]]:
    return trial.candidate.backbone, trial.candidate.image_size
