"""Ensembles: the mean of the normalised scores and maps of several models, reported as an additional model."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import reduce
from itertools import product
from pathlib import Path

import numpy as np

from .evaluation import evaluate
from .plan import Plan, members
from .record import Key, Predictions, Record, read_record, write_record

# How the costs of the members add up to the cost of the ensemble.
_COSTS: dict[str, Callable[[Iterable[float]], float]] = {
    **dict.fromkeys(("fit_s", "ms_per_image", "openvino_ms_per_image", "size_mib", "parameters"), sum),
    "peak_mib": max,
}


def ensemble_runs(runs: Path, plan: Plan) -> list[Record]:
    """Compute the plan's ensembles from the finished runs, and write each as a run.

    An ensemble fails if one of its members failed. An ensemble of the same runs is not computed again.

    Args:
        runs: Folder of all runs.
        plan: The plan of the comparison.

    Returns:
        The runs of the ensembles.

    Raises:
        ValueError: If a run cannot be read.
    """
    made = []
    for label, (category, shots, seed) in product(plan.ensembles, plan.draws()):
        parts = [read_record(runs / Key(category, each, shots, seed).folder) for each in members(label)]
        config = {
            "ensemble": {
                part.key.model: {"config": part.config, "time": part.environment.get("time")} for part in parts
            }
        }
        record = Record(Key(category, label, shots, seed), config, environment=parts[0].environment)
        made.append(_there(runs, record) or write_record(runs, *_ensemble(record, parts)))
    return made


def _there(runs: Path, record: Record) -> Record | None:
    """The stored ensemble of the same runs, if there is one."""
    try:
        there = read_record(runs / record.key.folder)
    except ValueError:
        return None
    return None if there.failed or there.config != record.config else there


def _ensemble(record: Record, parts: Sequence[Record]) -> tuple[Record, Predictions | None]:
    try:
        predictions = average([(part.key, _predictions(part)) for part in parts])
        metrics, curves = evaluate(predictions)
    except ValueError as error:
        return replace(record, error=str(error)), None
    costs = {
        name: combine(part.costs[name] for part in parts)
        for name, combine in _COSTS.items()
        if all(name in part.costs for part in parts)
    }
    return replace(record, metrics=metrics, curves=curves, costs=costs), predictions


def _predictions(part: Record) -> Predictions:
    if part.failed:
        msg = f"{part.key} failed: {part.message}"
        raise ValueError(msg)
    return part.predictions


def average(parts: Sequence[tuple[Key, Predictions]]) -> Predictions:
    """Mean of the scores and maps of several models. Each model is on the scale on which 0.5 is its threshold.

    Args:
        parts: Key of each run, and its predictions for the same N test images.

    Returns:
        Scores (N,), and maps (N, H, W) if all models have maps.

    Raises:
        ValueError: If the test sets or the sizes of the maps differ.
    """
    (first, predictions), *others = parts
    for key, other in others:
        if other.fingerprint != predictions.fingerprint:
            msg = f"{key} and {first} were tested on different images; run them again on the same data"
            raise ValueError(msg)
    maps = [part.maps for _, part in parts if part.maps is not None]
    if len({each.shape for each in maps}) > 1:
        msg = f"the maps of {', '.join(str(key) for key, _ in parts)} differ in size; give the models one image_size"
        raise ValueError(msg)
    return replace(
        predictions,
        scores=np.mean([part.scores for _, part in parts], axis=0, dtype=np.float32),
        # Added one by one, because all maps in single precision may not fit into memory.
        maps=reduce(np.add, (each.astype(np.float32) / len(parts) for each in maps))
        if len(maps) == len(parts)
        else None,
        # The calibration scores of a member do not apply to the mean.
        p_values=None,
    )
