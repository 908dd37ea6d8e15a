"""Groups of runs that can be compared: those of one category and one number of training images."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from anomalib_ot.comparison.bootstrap import Difference, paired_bootstrap
from anomalib_ot.comparison.record import Key, Predictions, Record, name_of


@dataclass(frozen=True)
class Group:
    """The runs of one category and number of training images.

    Args:
        category: Label of the category.
        shots: Number of training images, or None for all.
        seeds: Seeds that any model has.
        runs: Successful runs of each model, by seed; empty if all failed or did not start.
    """

    category: str
    shots: int | None
    seeds: list[int]
    runs: dict[str, list[Record]] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """Name of the group."""
        return name_of(self.category, self.shots)

    @property
    def averages(self) -> list[str]:
        """Names of the averages that the group is part of: that of its data set, if it has categories, and of all."""
        data, separator, _ = self.category.rpartition("/")
        return [name_of(each, self.shots) for each in ("average", *[f"{data}/average"] * bool(separator))]

    def values(self, model: str, metric: str) -> list[float]:
        """A metric of a model in percent, for the seeds that have it."""
        return [run.metrics[metric] for run in self.runs[model] if metric in run.metrics]

    def costs(self, model: str, cost: str) -> list[float]:
        """A cost of a model in its unit, for the seeds that have it."""
        return [run.costs[cost] for run in self.runs[model] if cost in run.costs]

    def note(self, model: str) -> str:
        """Number of seeds with results, if some are missing; otherwise empty."""
        done = len(self.runs[model])
        if not done:
            return "no result"
        return "" if done == len(self.seeds) else f"{done} of {len(self.seeds)} seeds"

    def missing(self) -> list[str]:
        """A sentence for each model without results for all seeds."""
        lines = []
        for model, runs in self.runs.items():
            absent = sorted(set(self.seeds) - {run.key.seed for run in runs})
            if absent and not runs:
                lines.append(f"{model} has no result on {self.title}")
            elif absent:
                seeds = f"seed{'s' * (len(absent) > 1)} {', '.join(map(str, absent))}"
                lines.append(
                    f"{model} on {self.title} has results for {self.note(model)}; {seeds} failed or did not run"
                )
        return lines

    @cached_property
    def scores(self) -> dict[Key, Predictions]:
        """Predictions of all runs, without maps, which might not fit into memory together."""
        return {run.key: _scores(run) for runs in self.runs.values() for run in runs}

    def unscored(self) -> list[str]:
        """A sentence for each run with scores that are NaN."""
        counts = {key: int(np.isnan(predictions.scores).sum()) for key, predictions in self.scores.items()}
        return [
            f"{key}: {count} of {len(self.scores[key].scores)} scores are NaN, so the run has no interval"
            for key, count in counts.items()
            if count
        ]

    def differences(self, baseline: str) -> dict[str, Difference]:
        """Difference in image AUROC to the baseline for each other model for which it can be computed."""
        measured = {model: self._measured(model) for model in self.runs}
        theirs = measured.get(baseline, {})
        seeds = {key.seed for key in theirs}
        return {
            model: paired_bootstrap(ours, theirs)
            for model, ours in measured.items()
            if model != baseline and seeds & {key.seed for key in ours}
        }

    def _measured(self, model: str) -> Mapping[Key, Predictions]:
        runs = {run.key: self.scores[run.key] for run in self.runs[model] if "image_AUROC" in run.metrics}
        return {key: predictions for key, predictions in runs.items() if not np.isnan(predictions.scores).any()}


def group_records(records: Sequence[Record]) -> list[Group]:
    """Sort the runs into groups, in their order.

    A model that ran on one category is expected on all categories with the same number of training images.

    Raises:
        ValueError: If two runs of a group were tested on different images.
    """
    by_group: dict[tuple[str, int | None], list[Record]] = defaultdict(list)
    models: dict[int | None, dict[str, None]] = defaultdict(dict)
    for record in records:
        by_group[record.key.category, record.key.shots].append(record)
        models[record.key.shots][record.key.model] = None
    groups = []
    for (category, shots), members in by_group.items():
        done = [record for record in members if not record.failed]
        _check_test_sets(done)
        runs = {
            model: sorted((record for record in done if record.key.model == model), key=lambda record: record.key.seed)
            for model in models[shots]
        }
        groups.append(Group(category, shots, sorted({record.key.seed for record in members}), runs))
    return groups


def _check_test_sets(records: Sequence[Record]) -> None:
    for record in records:
        if record.test_set != records[0].test_set:
            msg = (
                f"{records[0].key} and {record.key} were tested on different images or labels and cannot be "
                f"compared; run one of them again on the data of the other, or report them separately"
            )
            raise ValueError(msg)


def _scores(record: Record) -> Predictions:
    # The copy reads the files, so that the caller's record does not keep the maps in memory.
    return replace(replace(record).predictions, maps=None, truth=None)
