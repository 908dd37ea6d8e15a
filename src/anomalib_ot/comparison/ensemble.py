"""Ensembles: the mean of several models' normalised scores and maps, as one more model."""

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from itertools import product
from pathlib import Path

import numpy as np

from .evaluation import evaluate
from .plan import Plan, members
from .record import Key, Predictions, Record, read_record, write_record

_SUMS = ("fit_s", "ms_per_image", "openvino_ms_per_image", "size_mib", "parameters")


def ensemble_runs(runs: Path, plan: Plan) -> list[Record]:
    """Make the plan's ensembles of the runs that are there, and keep each as a run of its own.

    An ensemble whose member failed has failed too; one made of the same runs before is left.

    Args:
        runs: Folder of all runs.
        plan: What was compared.

    Returns:
        The ensembles' runs.

    Raises:
        ValueError: If a run cannot be read.
    """
    made = []
    for label, (category, shots, seed) in product(plan.ensembles, plan.draws()):
        parts = [read_record(runs / Key(category, each, shots, seed).folder) for each in members(label)]
        config = {
            "ensemble": {part.key.model: {"config": part.config, "time": part.environment["time"]} for part in parts}
        }
        record = Record(Key(category, label, shots, seed), config, environment=parts[0].environment)
        made.append(_there(runs, record) or write_record(runs, *_ensemble(record, parts)))
    return made


def _there(runs: Path, record: Record) -> Record | None:
    """The same ensemble of the same runs, if it was made before."""
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
        name: sum(part.costs[name] for part in parts) for name in _SUMS if all(name in part.costs for part in parts)
    }
    costs["peak_mib"] = max(part.costs["peak_mib"] for part in parts)
    return replace(record, metrics=metrics, curves=curves, costs=costs), predictions


def _predictions(part: Record) -> Predictions:
    if part.failed:
        msg = f"{part.key} failed: {part.message}"
        raise ValueError(msg)
    return part.predictions


def average(parts: Sequence[tuple[Key, Predictions]]) -> Predictions:
    """Mean of the scores and maps of several models, each on the scale where 0.5 is its threshold.

    Args:
        parts: Each run's key and what it says of the same N test images.

    Returns:
        Scores (N,), and maps (N, H, W) where all models make some.

    Raises:
        ValueError: If the test sets differ, or the sizes of the maps.
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
        # One after the other, as all maps at once in single precision may not fit into memory.
        maps=reduce(np.add, (each.astype(np.float32) / len(parts) for each in maps))
        if len(maps) == len(parts)
        else None,
    )
