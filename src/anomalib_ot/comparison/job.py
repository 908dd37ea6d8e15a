"""Fit, test and time one model in a process of its own, so that its memory is its own and its end harms nothing else.

Run as ``python -m anomalib_ot.comparison.job JOB FOLDER PARENT`` by :func:`run_job`.
"""

import json
import math
import os
import platform
import resource
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
from contextlib import suppress
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
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

from .evaluation import evaluate
from .measurement import QUIET, median_seconds, seconds_per_image
from .plan import Job
from .record import Predictions, Record, pack_record, write_folder

_MIB = 2**20
_PACKAGES = ("anomalib-ot", "anomalib", "torch", "torchvision", "lightning", "timm", "POT", "openvino", "numpy")
_TRIES = 2
# Seconds between two looks whether a process has ended.
_PATIENCE = 0.1


def run_job(job: Job, device: str | None = None, given_up: threading.Event | None = None) -> dict[str, bytes]:
    """Run a job in a process of its own; if the process is killed, once more.

    Args:
        job: What to run.
        device: The graphics processor that it may see, as in ``CUDA_VISIBLE_DEVICES``; None for what this process sees.
        given_up: Ends the run when it is set.

    Returns:
        The files of the run, as :func:`~anomalib_ot.comparison.record.pack_record` gives them; of a failed one if the
        model failed, was killed twice, or took longer than the job's time limit, or if the run was given up.
    """
    for _ in range(_TRIES):
        with TemporaryDirectory() as folder:
            error, is_killed = _run_process(job, Path(folder), device, given_up or threading.Event())
            if files := {path.name: path.read_bytes() for path in Path(folder, "run").glob("[!.]*")}:
                return files
        if not is_killed:
            break
    return failed_run(job, error)


def _run_process(job: Job, folder: Path, device: str | None, given_up: threading.Event) -> tuple[str, bool]:
    """Run the job; its files lie in ``folder/run`` afterwards, or else the text says why not, in its last line.

    Returns:
        The text, and whether the process was killed.
    """
    (folder / "job.json").write_text(json.dumps(job.to_dict()), encoding="utf-8")
    settings = {"OMP_NUM_THREADS": job.threads, "CUDA_VISIBLE_DEVICES": device}
    given = {name: str(value) for name, value in settings.items() if value is not None}
    command = [sys.executable, "-m", __name__, str(folder / "job.json"), str(folder / "run"), str(os.getpid())]
    with (folder / "log.txt").open("w+", encoding="utf-8") as log:
        process = subprocess.Popen(  # noqa: S603 - this Python, this module, two files of our own
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=os.environ | given
        )
        if why := _broken_off(process, 60 * (job.time_limit or math.inf), given_up):
            return why, False
        log.seek(0)
        tail = "".join(log.readlines()[-20:])
    if process.returncode == -signal.SIGINT:
        # By the user, who waits for the comparison to end.
        return f"{tail}\ninterrupted", False
    if process.returncode < 0:
        return f"{tail}\nkilled {_TRIES} times by signal {-process.returncode}; is there enough memory?", True
    return f"{tail}\nthe process ended with status {process.returncode} and no result", False


def _broken_off(process: "subprocess.Popen[bytes]", seconds: float, given_up: threading.Event) -> str:
    """Wait for a process to end, and say why if it was made to."""
    start = time.monotonic()
    try:
        while process.poll() is None:
            if given_up.wait(_PATIENCE):
                return "given up"
            if time.monotonic() - start > seconds:
                return f"not done after {seconds / 60:g} minutes, the time limit"
        return ""
    finally:
        # Whatever breaks the wait off.
        process.kill()
        process.wait()


def main(job_file: Path, folder: Path, parent: int) -> None:
    """Run the job of a file and write the files of the run to a new folder, for a process that waits for it."""
    warnings.simplefilter("ignore")
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    job = Job.from_dict(json.loads(job_file.read_text(encoding="utf-8")))
    try:
        files = pack_record(*_run(job))
    except Exception:  # noqa: BLE001 - whatever a model raises is its result
        files = failed_run(job, traceback.format_exc())
    write_folder(folder, files)


def failed_run(job: Job, error: str) -> dict[str, bytes]:
    """The files of a run that failed."""
    return pack_record(Record(job.key, job.config, overrides=job.overrides, environment=environment(job), error=error))


def _end_with(parent: int) -> None:
    """End this process soon after the one that started it, however that ended: nobody would read the result."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _run(job: Job) -> tuple[Record, Predictions]:
    seed_everything(job.key.seed, workers=True, verbose=False)
    model, data = job.create_model(), job.create_data()
    recorder = _Recorder()
    with TemporaryDirectory() as root:
        # One run, one device: several would split the batches, and the models' results would depend on the machine.
        trainer = {**QUIET, "devices": 1, **job.trainer}
        engine = Engine(
            default_root_dir=root, accelerator=job.accelerator, logger=False, callbacks=[recorder], **trainer
        )
        start = time.perf_counter()
        engine.fit(model, datamodule=data)
        device = engine.trainer.strategy.root_device
        costs = {"fit_s": time.perf_counter() - start, **_costs(model, device, Path(root))}
        # What the models say before normalisation, which clips.
        post_processor, model.post_processor = model.post_processor, None
        engine.test(model, datamodule=data, verbose=False)
        model.post_processor = post_processor
        if job.openvino:
            costs["openvino_ms_per_image"] = _openvino_ms(engine, model, job, Path(root))
    predictions = recorder.predictions(post_processor)
    metrics, curves = evaluate(predictions)
    ran = environment(job, device)
    return Record(job.key, job.config, metrics, curves, costs, job.overrides, ran), predictions


class _Recorder(Callback):
    """Keeps what a model says of the test images, not the images."""

    def __init__(self) -> None:
        self._batches: list[dict[str, Any]] = []

    def on_test_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *args: Any) -> None:
        del trainer, pl_module, args
        if outputs.pred_score is None:
            outputs.pred_score = outputs.anomaly_map.flatten(1).amax(1)
        # Some models keep a dimension of one score or one channel.
        batch = {name: _flat(getattr(outputs, name), 1) for name in ("pred_score", "gt_label")}
        batch |= {name: _flat(getattr(outputs, name), 3) for name in ("anomaly_map", "gt_mask")}
        self._batches.append({**batch, "image": [str(path) for path in outputs.image_path]})

    def predictions(self, scale: Any) -> Predictions:
        """All of it, in the order of the paths, on the scale of a post-processor."""
        images = [path for batch in self._batches for path in batch["image"]]
        order = sorted(range(len(images)), key=images.__getitem__)
        labels = self._all("gt_label", order).astype(np.int64)
        maps, truth = self._all("anomaly_map", order), self._all("gt_mask", order)
        return Predictions(
            images=[images[index] for index in order],
            kinds=[
                Path(images[index]).parent.name if label else "good" for index, label in zip(order, labels, strict=True)
            ],
            labels=labels,
            scores=_unclipped(self._all("pred_score", order), scale, "image"),
            maps=None if maps is None else _unclipped(maps, scale, "pixel"),
            truth=None if truth is None else truth.astype(bool),
        )

    def _all(self, name: str, order: list[int]) -> Any:
        parts = [batch[name] for batch in self._batches]
        return None if any(part is None for part in parts) else torch.cat(parts).numpy()[order]


def _flat(values: torch.Tensor | None, dims: int) -> torch.Tensor | None:
    """Values (N, …) with so many dimensions, on the CPU."""
    return None if values is None else values.detach().cpu().reshape(-1, *values.shape[values.ndim - dims + 1 :])


def _unclipped(values: NDArray[Any], scale: Any, level: str) -> NDArray[np.float32]:
    """As the post-processor normalises, without its bounds 0 and 1."""
    low, high, threshold = (
        float(getattr(scale, name, math.nan)) for name in (f"{level}_min", f"{level}_max", f"{level}_threshold")
    )
    if not high > low:
        return values.astype(np.float32)
    if math.isnan(threshold):
        threshold = (low + high) / 2
    return ((values - threshold) / (high - low) + 0.5).astype(np.float32)


def _costs(model: AnomalibModule, device: torch.device, folder: Path) -> dict[str, float]:
    """What the model costs that was fitted on a device; the peak of memory is that of fitting and scoring one image."""
    state = folder / "state.pt"
    torch.save(model.model.state_dict(), state)
    costs = {
        "ms_per_image": 1000 * seconds_per_image(model, device),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "linux" else _MIB),
        "size_mib": state.stat().st_size / _MIB,
        "parameters": sum(each.numel() for each in model.model.parameters()),
    }
    # Not all that torch computes on count their memory.
    if peak := getattr(torch.get_device_module(device), "max_memory_allocated", None):
        costs["device_peak_mib"] = peak(device) / _MIB
    return costs


def _openvino_ms(engine: Engine, model: AnomalibModule, job: Job, root: Path) -> float:
    """Median time of the exported model, with its pre- and post-processing, on one image."""
    import openvino  # noqa: PLC0415 - an extra

    path = engine.export(model, ExportType.OPENVINO, export_root=root, input_size=job.image_size)
    settings = dict(FLOAT32)
    if job.threads:
        settings["INFERENCE_NUM_THREADS"] = str(job.threads)
    compiled = openvino.Core().compile_model(path, "CPU", settings)
    image = np.random.default_rng(0).random((1, 3, *job.image_size), dtype=np.float32)
    return 1000 * median_seconds(lambda: compiled(image))


def environment(job: Job, device: torch.device | None = None) -> dict[str, Any]:
    """Where and with what a job runs.

    Args:
        job: The job.
        device: Where the trainer put the model; None if it did not come to that, for where it most likely would have.
    """
    device = device or _likely_device(job.accelerator)
    return {
        "packages": {name: found for name in _PACKAGES if (found := _version(name))},
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": cores(),
        "device": _device_name(device),
        "threads": torch.get_num_threads(),
        # What was asked for may be "auto".
        "accelerator": device.type,
        "revision": _revision(),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def cores() -> int:
    """Number of the processor's cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _likely_device(accelerator: str) -> torch.device:
    found = None if accelerator == "cpu" else torch.accelerator.current_accelerator(check_available=True)
    return found or torch.device("cpu")


def _device_name(device: torch.device) -> str:
    """What a device calls itself, or its type where it has no name."""
    name = getattr(torch.get_device_module(device), "get_device_name", None)
    return str(name(device)) if name else device.type


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _revision() -> str:
    """Revision of the source tree that this file is part of; empty for an installed package."""
    here = Path(__file__)
    with suppress(OSError):
        if not _git(here.parent, "ls-files", "--error-unmatch", here.name).returncode:
            return _git(here.parent, "describe", "--always", "--dirty", "--exclude=*").stdout.strip()
    return ""


def _git(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False)  # noqa: S603, S607


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
