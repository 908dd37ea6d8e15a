"""The choice of a model for a folder of good images, within a time budget."""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import cached_property, partial
from math import inf
from pathlib import Path
from typing import Any

from anomalib_ot.comparison.engines import ENGINES, RayEngine, run_all
from anomalib_ot.features.file_features import FileFeatures
from anomalib_ot.features.image_extractor import ImageExtractor
from anomalib_ot.images.reading import ValueRange
from anomalib_ot.settings import require
from anomalib_ot.synthetic.images import read_reduced

from .candidates import Candidate
from .record import TrialRecord, trial_key
from .trial import Trial, run_trial
from .trial_features import SYNTHETIC, TrialFeatures, TrialSet, trial_set

logger = logging.getLogger(__name__)

# Of ten good images, two may look bad and be left out before.
_FEWEST = 8

_Job = tuple[Candidate, TrialFeatures, int]
Progress = Callable[[list[Trial], Candidate | None], None]


def _show_nothing(trials: list[Trial], trying: Candidate | None) -> None:
    del trials, trying


def choose(
    paths: Sequence[Path],
    candidates: Sequence[Candidate],
    *,
    minutes: float,
    state: Path,
    progress: Progress = _show_nothing,
    engine: str = "processes",
    known: FileFeatures | None = None,
    seed: int = 0,
    value_range: ValueRange | None = None,
) -> list[Trial]:
    """Try candidates on good images and synthetic anomalies, and order them, the chosen one first.

    Each candidate is fitted on up to 60 of the images. It scores up to 40 others, and synthetic images made from
    these. The default, which is the first candidate, is always tried. Another trial starts only if one as long as the
    longest so far would end within the time budget. If the images are too small for synthetic defects, the default is
    tried alone.

    Args:
        paths: Files of good images.
        candidates: The candidates, with different names, see
            :func:`~anomalib_ot.selection.candidates.on_backbones`.
        minutes: Time budget of this call.
        state: JSON file of the finished trials. A call with the same images and seed continues it; the trials of other
            images are replaced.
        progress: Called before each trial with the finished ones, in order, and the next candidate, and at the end with
            None.
        engine: ``processes`` tries one candidate after another in this process. ``ray`` tries those of a backbone and
            an image size at the same time on a cluster, as :func:`~anomalib_ot.comparison.execution.compare`; trials
            that exceed the time budget are cancelled.
        known: Features that are extracted already.
        seed: Seed of all random numbers.
        value_range: Values that map to black and white in images with more than 8 bits per channel.

    Returns:
        The finished trials in the order of :func:`~anomalib_ot.selection.ranking.rank`.

    Raises:
        ValueError: If there are fewer than 8 images, no time, or no candidates, or if an image cannot be read.
        ImportError: If Ray is requested and not installed.
        RuntimeError: If all trials failed.
    """
    end = time.monotonic() + 60 * minutes
    require(minutes > 0, "minutes", "above 0", minutes)
    require(engine in ENGINES, "engine", ENGINES, engine)
    names = [each.name for each in candidates]
    require(0 < len({*names}) == len(names), "candidates", "at least one, with different names", names)
    if len(paths) < _FEWEST:
        msg = f"choosing a model needs at least {_FEWEST} good images, got {len(paths)}; add images"
        raise ValueError(msg)
    record = TrialRecord(state, trial_key(paths, seed, value_range), candidates)
    trials = _Trials(paths, record, known, progress, seed, value_range)
    if engine == "ray":
        _at_once(trials, end)
    else:
        _one_by_one(trials, end)
    if late := [each for each in record.waiting() if each.name not in trials.errors]:
        why = "The time is used" if trials.tell_apart else "No synthetic defects tell models apart"
        logger.info("%s: %d of %d candidates were tried.", why, len(candidates) - len(late), len(candidates))
    if not record.trials:
        errors = "; ".join(f"{name}: {error}" for name, error in trials.errors.items())
        msg = f"no candidate could be fitted: {errors}"
        raise RuntimeError(msg)
    progress(record.ranked(), None)
    return record.ranked()


class _Trials:
    """What the trials of a call share.

    Args:
        paths: As for :func:`choose`, like ``known``, ``progress``, ``seed`` and ``value_range``.
        record: The finished trials.
        known: Features that are extracted already.
        progress: Shows what is known so far.
        seed: Seed of all random numbers.
        value_range: Values that map to black and white.

    Attributes:
        record: The finished trials.
        errors: Why trials failed, by the names of the candidates.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        record: TrialRecord,
        known: FileFeatures | None,
        progress: Progress,
        seed: int,
        value_range: ValueRange | None,
    ) -> None:
        self.record = record
        self.errors: dict[str, str] = {}
        self._paths, self._known, self._progress, self._seed = paths, known, progress, seed
        self._value_range = value_range
        self._features: TrialFeatures | None = None

    @cached_property
    def images(self) -> TrialSet:
        """The images of all trials."""
        return trial_set(self._paths, self._seed, self._value_range)

    @property
    def tell_apart(self) -> bool:
        """Whether trials tell candidates apart, as there are synthetic defects."""
        return bool(self.images.labels)

    def may_end(self, following: Candidate) -> bool:
        """Whether the trials may end before a candidate: not before the default, and not without a trial."""
        return bool(self.record.trials) and following != self.record.candidates[0]

    def job(self, candidate: Candidate) -> _Job:
        """The trial of a candidate, which is shown, and whose features are extracted."""
        self._progress(self.record.ranked(), candidate)
        if self._features is None or not _same_input(candidate, self._features):
            # Release those of the former size before those of the next are extracted.
            self._features = None
            same = [each for each in self.record.candidates if _same_input(candidate, each)]
            self._features = TrialFeatures.extracted(self.images, files_for(same, self._known, self._value_range))
        return candidate, self._features, self._seed

    def keep(self, candidate: Candidate, tried: Trial | str) -> None:
        """Keep a trial, or why it failed."""
        if isinstance(tried, Trial):
            self.record.add(tried)
            return
        self.errors[candidate.name] = tried
        logger.warning("%s is left out, as its trial failed: %s", candidate.name, tried)


class _Cluster(RayEngine[_Job, Trial | str]):
    """Tries candidates on a cluster. If it cannot end a trial, as its machine lacks memory, that trial has failed."""

    def run(self, job: _Job) -> Trial | str:
        """Run a trial when the cluster has free cores."""
        try:
            return super().run(job)
        except self.errors as error:
            return str(error) or repr(error)


def _one_by_one(trials: _Trials, end: float) -> None:
    longest = max((trial.fit_s for trial in trials.record.trials), default=0.0)
    for candidate in trials.record.waiting():
        if trials.may_end(candidate) and (time.monotonic() + longest > end or not trials.tell_apart):
            return
        start = time.monotonic()
        trials.keep(candidate, _tried(trials.job(candidate)))
        longest = max(longest, time.monotonic() - start)


def _at_once(trials: _Trials, end: float) -> None:
    # A core for each, which a machine of any size has.
    cluster = _Cluster(1, "cpu", _tried)

    def run(jobs: Sequence[_Job], until: float) -> None:
        with closing(run_all(jobs, cluster, len(jobs), until)) as ended:
            for (candidate, *_), tried in ended:
                trials.keep(candidate, tried)

    waiting, default = trials.record.waiting(), trials.record.candidates[0]
    while waiting:
        is_late = time.monotonic() > end or not trials.tell_apart
        if is_late and trials.may_end(waiting[0]):
            return
        # If it is late, the default alone, or one that replaces it.
        group = waiting[:1] if is_late else [each for each in waiting if _same_input(waiting[0], each)]
        jobs = [trials.job(each) for each in group]
        run(jobs, inf if is_late else end)
        if default in group and default in trials.record.waiting() and default.name not in trials.errors:
            run(jobs[:1], inf)
        waiting = [each for each in waiting if each not in group]


def _tried(job: _Job) -> Trial | str:
    """A trial, or why it failed."""
    candidate, features, seed = job
    try:
        return run_trial(candidate, features, seed).trial(features)
    except Exception as error:  # noqa: BLE001 - another candidate may be fitted
        return str(error) or repr(error)


def _same_input(one: Candidate | TrialFeatures, other: Candidate | TrialFeatures) -> bool:
    return (one.backbone, one.image_size) == (other.backbone, other.image_size)


def files_for(
    candidates: Sequence[Candidate], known: FileFeatures | None = None, value_range: ValueRange | None = None
) -> FileFeatures:
    """Features for all of some candidates of the same backbone and image size; the known ones if they suffice."""
    first, layers = candidates[0], layers_needed(candidates)
    if known is not None and known.suits(first.backbone, first.image_size, layers):
        return known
    extractor = ImageExtractor(first.backbone, first.image_size, layers, SYNTHETIC)
    return FileFeatures(extractor, partial(read_reduced, value_range=value_range))


def layers_needed(candidates: Sequence[Candidate]) -> list[str]:
    """Layers that candidates of the same backbone need."""
    models: list[Any] = [each.untrained() for each in candidates]
    return sorted({layer for model in models for layer in model.model.feature_extractor.layers})
