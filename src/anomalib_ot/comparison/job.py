"""Fit, test and time one model.

:mod:`~anomalib_ot.comparison.supervision` runs ``python -m anomalib_ot.comparison.job JOB FOLDER PARENT``.
"""

import json
import math
import os
import resource
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from anomalib.deploy import ExportType
from anomalib.engine import Engine
from anomalib.models.components import AnomalibModule
from lightning.pytorch import Callback, seed_everything
from numpy.typing import NDArray

from anomalib_ot.features.extraction import FLOAT32
from anomalib_ot.host.calibration import HasPValues

from .environment import environment
from .evaluation import evaluate
from .measurement import QUIET, median_seconds, seconds_per_image
from .plan import Job
from .record import Predictions, Record, pack_record, write_folder
from .verdicts import Verdicts

_MIB = 2**20


def main(job_file: Path, folder: Path, parent: int) -> None:
    """Run the job in a file and write the files of the run to a new folder. The parent process waits for them."""
    warnings.simplefilter("ignore")
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    job = Job.from_dict(json.loads(job_file.read_text(encoding="utf-8")))
    try:
        files = pack_record(*_run(job))
    except Exception:  # noqa: BLE001 - any error of a model is its result
        files = failed_run(job, traceback.format_exc())
    write_folder(folder, files)


def failed_run(job: Job, error: str) -> dict[str, bytes]:
    """The files of a failed run."""
    return pack_record(Record(job.key, job.config, overrides=job.overrides, environment=environment(job), error=error))


def _end_with(parent: int) -> None:
    """End this process soon after its parent has ended for any reason, because its result would not be read."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _run(job: Job) -> tuple[Record, Predictions]:
    seed_everything(job.key.seed, workers=True, verbose=False)
    model, data = job.create_model(), job.create_data()
    recorder = _Recorder()
    with TemporaryDirectory() as root:
        # One device for each run: several would split the batches, so that results would depend on the machine.
        trainer = {**QUIET, "devices": 1, **job.trainer}
        engine = Engine(
            default_root_dir=root, accelerator=job.accelerator, logger=False, callbacks=[recorder], **trainer
        )
        start = time.perf_counter()
        engine.fit(model, datamodule=data)
        device = engine.trainer.strategy.root_device
        costs = {"fit_s": time.perf_counter() - start, **_costs(model, device, Path(root))}
        # Scores are recorded before normalisation, which clips.
        post_processor, model.post_processor = model.post_processor, None
        engine.test(model, datamodule=data, verbose=False)
        model.post_processor = post_processor
        if job.openvino:
            costs["openvino_ms_per_image"] = _openvino_ms(engine, model, job, Path(root))
    predictions = recorder.predictions(post_processor)
    metrics, curves = evaluate(predictions)
    ran, verdicts = environment(job, device), recorder.verdicts(post_processor)
    return Record(job.key, job.config, metrics, curves, costs, job.overrides, ran, verdicts=verdicts), predictions


class _Recorder(Callback):
    """Records the predictions for the test images, without the images, and which good images were validated."""

    def __init__(self) -> None:
        self._batches: list[dict[str, Any]] = []
        self._validated: set[str] = set()

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *args: Any) -> None:
        del trainer, pl_module, outputs, args
        labels = zip(batch.image_path, batch.gt_label.tolist(), strict=True)
        self._validated |= {str(path) for path, label in labels if not label}

    def on_test_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *args: Any) -> None:
        del trainer, pl_module, args
        if outputs.pred_score is None:
            outputs.pred_score = outputs.anomaly_map.flatten(1).amax(1)
        # Some models have an additional dimension of size 1.
        batch = {name: _flat(getattr(outputs, name), 1) for name in ("pred_score", "gt_label")}
        batch |= {name: _flat(getattr(outputs, name), 3) for name in ("anomaly_map", "gt_mask")}
        self._batches.append({**batch, "image": [str(path) for path in outputs.image_path]})

    def predictions(self, scale: Any) -> Predictions:
        """All predictions, ordered by path, on the scale of a post-processor."""
        images = self._images()
        order = sorted(range(len(images)), key=images.__getitem__)
        scores = self._all("pred_score", order)
        labels = self._all("gt_label", order).astype(np.int64)
        maps, truth = self._all("anomaly_map", order), self._all("gt_mask", order)
        return Predictions(
            images=[images[index] for index in order],
            kinds=[
                Path(images[index]).parent.name if label else "good" for index, label in zip(order, labels, strict=True)
            ],
            labels=labels,
            scores=_unclipped(scores, scale, "image"),
            maps=None if maps is None else _unclipped(maps, scale, "pixel"),
            truth=None if truth is None else truth.astype(bool),
            p_values=_p_values(scores, scale),
        )

    def verdicts(self, processor: Any) -> Verdicts | None:
        """Verdicts of a post-processor; None if it promises no rate."""
        images = self._images()
        scores, labels = (self._all(name, range(len(images))) for name in ("pred_score", "gt_label"))
        return Verdicts.of(processor, torch.from_numpy(scores), labels, images, self._validated)

    def _images(self) -> list[str]:
        return [path for batch in self._batches for path in batch["image"]]

    def _all(self, name: str, order: Sequence[int]) -> Any:
        parts = [batch[name] for batch in self._batches]
        return None if any(part is None for part in parts) else torch.cat(parts).numpy()[order]


def _flat(values: torch.Tensor | None, dims: int) -> torch.Tensor | None:
    """Values (N, …) with ``dims`` dimensions, on the CPU."""
    return None if values is None else values.detach().cpu().reshape(-1, *values.shape[values.ndim - dims + 1 :])


def _unclipped(values: NDArray[Any], scale: Any, level: str) -> NDArray[np.float32]:
    """Normalise like the post-processor, but without clipping to [0, 1]."""
    low, high, threshold = (
        float(getattr(scale, name, math.nan)) for name in (f"{level}_min", f"{level}_max", f"{level}_threshold")
    )
    if not high > low:
        return values.astype(np.float32)
    if math.isnan(threshold):
        threshold = (low + high) / 2
    return ((values - threshold) / (high - low) + 0.5).astype(np.float32)


def _p_values(raw_scores: NDArray[Any], processor: Any) -> NDArray[np.float64] | None:
    """P-values of raw image scores (N,); None without calibration scores, or if a score is NaN."""
    if not isinstance(processor, HasPValues) or np.isnan(raw_scores).any():
        return None
    known = processor.p_values(torch.from_numpy(raw_scores))
    return None if known is None else np.array(known)


def _costs(model: AnomalibModule, device: torch.device, folder: Path) -> dict[str, float]:
    """Costs of a model that was fitted on a device. Peak memory covers fitting and scoring one image."""
    state = folder / "state.pt"
    torch.save(model.model.state_dict(), state)
    costs = {
        "ms_per_image": 1000 * seconds_per_image(model, device),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "linux" else _MIB),
        "size_mib": state.stat().st_size / _MIB,
        "parameters": sum(each.numel() for each in model.model.parameters()),
    }
    # Not all devices of torch count their memory.
    if peak := getattr(torch.get_device_module(device), "max_memory_allocated", None):
        costs["device_peak_mib"] = peak(device) / _MIB
    return costs


def _openvino_ms(engine: Engine, model: AnomalibModule, job: Job, root: Path) -> float:
    """Median time in milliseconds of the exported model on one image, with its pre- and post-processing."""
    import openvino  # noqa: PLC0415 - an extra

    path = engine.export(model, ExportType.OPENVINO, export_root=root, input_size=job.image_size)
    settings = dict(FLOAT32)
    if job.threads:
        settings["INFERENCE_NUM_THREADS"] = str(job.threads)
    compiled = openvino.Core().compile_model(path, "CPU", settings)
    image = np.random.default_rng(0).random((1, 3, *job.image_size), dtype=np.float32)
    return 1000 * median_seconds(lambda: compiled(image))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
