"""The finished trials of a folder, in a file."""

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from anomalib_ot.comparison.environment import installed_versions
from anomalib_ot.features.backbone_sources import weights_state
from anomalib_ot.files import write_text
from anomalib_ot.images.folder import state_of
from anomalib_ot.images.reading import ValueRange

from .candidates import Candidate
from .ranking import rank
from .trial import Trial

logger = logging.getLogger(__name__)

# Of the file; a new one starts the trials again.
_FORMAT = 2


class TrialRecord:
    """The finished trials, in a file that is complete after each of them.

    Args:
        path: The file; missing folders are created.
        key: What the trials depend on. Trials with another key are forgotten.
        candidates: The candidates; trials of others stay in the file.

    Attributes:
        candidates: The candidates.
        trials: The finished trials of the candidates.
    """

    def __init__(self, path: Path, key: dict[str, Any], candidates: Sequence[Candidate]) -> None:
        self._path, self._key, self.candidates = path, key, candidates
        self._all = _read(path, key)

    @property
    def trials(self) -> list[Trial]:
        """The finished trials of the candidates, under their present names."""
        pairs = product(self._all, self.candidates)
        return [replace(trial, candidate=each) for trial, each in pairs if trial.candidate == each]

    def waiting(self) -> list[Candidate]:
        """The candidates without a trial."""
        done = [trial.candidate for trial in self._all]
        return [each for each in self.candidates if each not in done]

    def ranked(self) -> list[Trial]:
        """The trials, the chosen one first."""
        return rank(self.trials, self.candidates[0].name)

    def add(self, trial: Trial) -> None:
        """Keep a finished trial."""
        self._all.append(trial)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        trials = [{**each.to_dict(), "weights": weights_state(each.candidate.backbone)} for each in self._all]
        content = {"key": self._key, "trials": trials}
        write_text(self._path, json.dumps(content, indent=1))


def _read(path: Path, key: dict[str, Any]) -> list[Trial]:
    """The trials in a file; none if it is missing or damaged, or has another key."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["key"] == key:
            found = [(each.pop("weights"), Trial.from_dict(each)) for each in content["trials"]]
            return [trial for weights, trial in found if weights == weights_state(trial.candidate.backbone)]
        logger.info("The trials in %s are of other images or settings, and start again.", path)
    except FileNotFoundError:
        pass
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        logger.warning("The trials in %s cannot be read (%s), and start again.", path, error)
    return []


def trial_key(paths: Sequence[Path], seed: int, value_range: ValueRange | None = None) -> dict[str, Any]:
    """What the trials on some images depend on, besides their candidates."""
    states = {str(path): [*state_of(path)] for path in sorted(paths)}
    return {
        "format": _FORMAT,
        "seed": seed,
        "value_range": None if value_range is None else [*value_range],
        "versions": installed_versions(),
        "images": states,
    }
