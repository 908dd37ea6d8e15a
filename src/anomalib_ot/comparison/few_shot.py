"""The few-shot protocol: several models, numbers of shots and draws, as in FOCT's table 1."""

import csv
import logging
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import yaml
from anomalib.data import AnomalibDataModule
from anomalib.metrics import AUROC, AnomalibMetric, Evaluator, F1Max
from anomalib.models.components import AnomalibModule
from jsonargparse import ArgumentParser, Namespace

from anomalib_ot.components.backbones import resize_and_normalize
from anomalib_ot.data import FewShot

from .measure import measure

logger = logging.getLogger(__name__)

METRICS = ("image_AUROC", "image_F1Max", "pixel_AUROC", "pixel_F1Max")
COLUMNS = ("category", "model", "shots", "seed", *METRICS, "fit_s", "ms_per_image")
_FIELDS = {"image": ["pred_score", "gt_label"], "pixel": ["anomaly_map", "gt_mask"]}


class FewShotPlan:
    """What to compare, read from a YAML file.

    ``data`` is a data module and ``models`` maps a label to each model, both as ``class_path`` and ``init_args`` like
    in anomalib's own configurations. ``image_size``, [336, 336] by default, is that of all models.

    Args:
        path: The file.
        backbone: Backbone to give to all models instead of the file's.

    Raises:
        ValueError: If the file lacks a part.
    """

    def __init__(self, path: Path, backbone: str | None = None) -> None:
        plan = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(plan, dict) or not plan.get("data") or not plan.get("models"):
            msg = f"{path} must have data and models, with a class_path each"
            raise ValueError(msg)
        self.image_size: tuple[int, int] = tuple(plan.get("image_size", (336, 336)))
        self._data: dict[str, Any] = plan["data"]
        self._models: dict[str, dict[str, Any]] = plan["models"]
        if backbone:
            for model in self._models.values():
                model.setdefault("init_args", {})["backbone"] = backbone

    def data(self) -> AnomalibDataModule:
        """A new data module."""
        return _build(AnomalibDataModule, self._data)

    def models(self) -> dict[str, Callable[[], AnomalibModule]]:
        """For each label, what makes a new model."""
        return {label: partial(self._model, config) for label, config in self._models.items()}

    def _model(self, config: dict[str, Any]) -> AnomalibModule:
        backbone = config.get("init_args", {}).get("backbone")
        return with_same_metrics(_build(AnomalibModule, config), self.image_size, backbone)


def protocol_metrics() -> list[AnomalibMetric]:
    """The metrics of :data:`METRICS`, those of pixels only where there are masks."""
    return [
        metric(fields=_FIELDS[level], prefix=f"{level}_", strict=False)
        for metric in (AUROC, F1Max)
        for level in _FIELDS
    ]


def with_same_metrics(model: AnomalibModule, image_size: tuple[int, int], backbone: str | None) -> AnomalibModule:
    """Give a model the metrics of the protocol and, with a backbone, the size and statistics of all models."""
    model.evaluator = Evaluator(test_metrics=protocol_metrics())
    model.visualizer = None
    if backbone:
        model.pre_processor = resize_and_normalize(image_size, backbone)
    return model


def compare_few_shot(
    data: Callable[[], AnomalibDataModule],
    models: Mapping[str, Callable[[], AnomalibModule]],
    shots: Sequence[int],
    seeds: int,
    output: Path,
    accelerator: str = "cpu",
) -> list[dict[str, str]]:
    """Fit and test every model on the same draws of support images.

    Each result is written as soon as it is there; a comparison that was broken off goes on where it stopped.

    Args:
        data: Makes the data module that support images are drawn from.
        models: For each label, what makes a model, with the metrics of :func:`with_same_metrics`.
        shots: Numbers of support images.
        seeds: Number of draws for each, with the seeds 0, 1, ….
        output: CSV file to add the results to.
        accelerator: Where to run, as the trainer's.

    Returns:
        A row for each result of this data module, with :data:`COLUMNS`; what cannot be measured is empty.

    Raises:
        ValueError: If there is nothing to compare, or the file holds something else.
    """
    if not models or not shots or seeds < 1:
        msg = f"a comparison needs models, shots and at least one seed, not {list(models)}, {list(shots)} and {seeds}"
        raise ValueError(msg)
    rows = _read(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", extrasaction="ignore")
        if not rows:
            writer.writeheader()
        for k in shots:
            for seed in range(seeds):
                few = FewShot(data(), k, seed)
                category = few.category or few.datamodule.name
                for label, build in models.items():
                    key = {"category": category, "model": label, "shots": str(k), "seed": str(seed)}
                    if any(key.items() <= row.items() for row in rows):
                        continue
                    _, result = measure(build, few, seed, accelerator)
                    row = key | {name: f"{value:.2f}" for name, value in result.items() if value == value}  # noqa: PLR0124
                    rows.append(row)
                    writer.writerow(row)
                    file.flush()
                    logger.info("%s", ", ".join(f"{name} {value}" for name, value in row.items()))
    return [row for row in rows if row["category"] == category]


def summarise(rows: Sequence[Mapping[str, str]]) -> str:
    """Mean ± standard deviation over the draws, a line for each category, number of shots and model.

    Args:
        rows: As :func:`compare_few_shot` returns them.

    Returns:
        A table in Markdown, metrics in percent.
    """
    groups = defaultdict(list)
    for row in rows:
        groups[row["category"], row["shots"], row["model"]].append(row)
    header = ("category", "shots", "model", "draws", *METRICS, "ms_per_image")
    lines = [header, ["---"] * len(header)]
    for key, group in groups.items():
        lines.append([*key, str(len(group)), *(_spread(group, name) for name in (*METRICS, "ms_per_image"))])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _spread(rows: Sequence[Mapping[str, str]], name: str) -> str:
    values = [float(row[name]) for row in rows if row.get(name)]
    if not values:
        return ""
    return f"{fmean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def _read(output: Path) -> list[dict[str, str]]:
    if not output.exists() or not output.stat().st_size:
        return []
    with output.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            msg = f"{output} holds something else than few-shot results; choose another output"
            raise ValueError(msg)
        return list(reader)


def _build(kind: type, config: dict[str, Any]) -> Any:
    """The object of a configuration with ``class_path`` and ``init_args``."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--it", type=kind)
    return parser.instantiate_classes(parser.parse_object(Namespace(it=config))).it
