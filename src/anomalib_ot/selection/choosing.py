"""The choice of a model for a folder of good images, within a time budget."""

import json
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from anomalib_ot.features.backbones import backbone_name
from anomalib_ot.features.image_extractor import ImageExtractor
from anomalib_ot.files import write_text
from anomalib_ot.images.folder import state_of
from anomalib_ot.settings import require

from .candidates import CANDIDATES, Candidate
from .ranking import rank
from .trial import Trial, run_trial
from .trial_features import SYNTHETIC, TrialFeatures, TrialImages, trial_images

logger = logging.getLogger(__name__)

# Of ten good images, two may look bad and be left out before.
_FEWEST = 8
# Of the file; a new one starts the trials again.
_FORMAT = 1

Progress = Callable[[list[Trial], Candidate | None], None]


def _show_nothing(trials: list[Trial], trying: Candidate | None) -> None:
    del trials, trying


def choose(
    paths: Sequence[Path],
    backbone: str | Path,
    *,
    minutes: float,
    state: Path,
    progress: Progress = _show_nothing,
    candidates: Sequence[Candidate] = CANDIDATES,
    seed: int = 0,
) -> list[Trial]:
    """Try candidates on good images and synthetic anomalies, and order them, the chosen one first.

    Each candidate is fitted on up to 60 of the images. It scores up to 40 others, and synthetic images made from
    these. The default, which is the first candidate, is always tried. Another trial starts only if one as long as the
    longest so far would end within the time budget.

    Args:
        paths: Files of good images.
        backbone: Backbone of all candidates, as in :func:`~anomalib_ot.features.backbones.backbone_name`.
        minutes: Time budget of this call.
        state: JSON file of the finished trials. A call with the same images, backbone and seed continues it; the
            trials of other images are replaced.
        progress: Called before each trial with the finished ones, in order, and the next candidate, and at the end with
            None.
        candidates: The candidates, with different names.
        seed: Seed of all random numbers.

    Returns:
        The finished trials in the order of :func:`~anomalib_ot.selection.ranking.rank`.

    Raises:
        ValueError: If there are fewer than 8 images, no time, or no candidates, or if an image cannot be read or is
            too small for synthetic defects.
        RuntimeError: If all trials failed.
    """
    end = time.monotonic() + 60 * minutes
    require(minutes > 0, "minutes", "above 0", minutes)
    names = [each.name for each in candidates]
    require(0 < len({*names}) == len(names), "candidates", "at least one, with different names", names)
    if len(paths) < _FEWEST:
        msg = f"choosing a model needs at least {_FEWEST} good images, got {len(paths)}; add images"
        raise ValueError(msg)
    record = _Record(state, _key(paths, backbone, seed), candidates)
    longest = max((trial.fit_s for trial in record.trials), default=0.0)
    images: TrialImages | None = None
    features: TrialFeatures | None = None
    errors = []
    for candidate in record.waiting():
        if record.trials and time.monotonic() + longest > end:
            logger.info("The time is used: %d of %d candidates were tried.", len(record.trials), len(candidates))
            break
        progress(record.ranked(), candidate)
        start = time.monotonic()
        if features is None or features.image_size != candidate.image_size:
            # Release those of the former size before those of the next are extracted.
            features = None
            images = images or trial_images(paths, seed)
            features = TrialFeatures.extracted(images, extractor_at(candidate.image_size, candidates, backbone))
        try:
            record.add(run_trial(candidate, features, seed).trial(features))
        except Exception as error:  # noqa: BLE001 - another candidate may be fitted
            errors.append(f"{candidate.name}: {error}")
            logger.warning("%s is left out, as its trial failed: %r", candidate.name, error)
        longest = max(longest, time.monotonic() - start)
    if not record.trials:
        msg = f"no candidate could be fitted: {'; '.join(errors)}"
        raise RuntimeError(msg)
    progress(record.ranked(), None)
    return record.ranked()


def extractor_at(image_size: tuple[int, int], candidates: Sequence[Candidate], backbone: str | Path) -> ImageExtractor:
    """Extracts all features that the candidates of an image size need."""
    models: list[Any] = [each.untrained(backbone) for each in candidates if each.image_size == image_size]
    layers = sorted({layer for model in models for layer in model.model.feature_extractor.layers})
    return ImageExtractor(backbone_name(backbone), image_size, layers, SYNTHETIC)


class _Record:
    """The finished trials, in a file that is complete after each of them.

    Args:
        path: The file; missing folders are created.
        key: What the trials depend on. Trials with another key are forgotten.
        candidates: The candidates; trials of others stay in the file.

    Attributes:
        trials: The finished trials of the candidates.
    """

    def __init__(self, path: Path, key: dict[str, Any], candidates: Sequence[Candidate]) -> None:
        self._path, self._key, self._candidates = path, key, candidates
        self._all = _read(path, key)

    @property
    def trials(self) -> list[Trial]:
        return [trial for trial in self._all if trial.candidate in self._candidates]

    def waiting(self) -> list[Candidate]:
        """The candidates without a trial."""
        done = [trial.candidate for trial in self._all]
        return [each for each in self._candidates if each not in done]

    def ranked(self) -> list[Trial]:
        """The trials, the chosen one first."""
        return rank(self.trials, self._candidates[0].name)

    def add(self, trial: Trial) -> None:
        self._all.append(trial)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        content = {"key": self._key, "trials": [each.to_dict() for each in self._all]}
        write_text(self._path, json.dumps(content, indent=1))


def _read(path: Path, key: dict[str, Any]) -> list[Trial]:
    """The trials in a file; none if it is missing or damaged, or has another key."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["key"] == key:
            return [Trial.from_dict(each) for each in content["trials"]]
        logger.info("The trials in %s are of other images or settings, and start again.", path)
    except FileNotFoundError:
        pass
    except (KeyError, TypeError, ValueError) as error:
        logger.warning("The trials in %s cannot be read (%s), and start again.", path, error)
    return []


def _key(paths: Sequence[Path], backbone: str | Path, seed: int) -> dict[str, Any]:
    states = {str(path): [*state_of(path)] for path in sorted(paths)}
    return {"format": _FORMAT, "backbone": backbone_name(backbone), "seed": seed, "images": states}
