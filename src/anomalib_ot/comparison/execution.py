"""Run a comparison: what is missing of it, on processes here or through Ray, each run kept as it ends."""

import csv
import io
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import asdict, replace
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from queue import SimpleQueue

import torch

from anomalib_ot.components.files import write_text

from .ensemble import ensemble_runs
from .job import cores, run_job
from .plan import Job, Plan
from .record import Key, Record, by_key, read_record, run_folders, unpack_record

logger = logging.getLogger(__name__)

ENGINES = ("processes", "ray")


def compare(
    plan: Plan,
    output: Path,
    workers: int = 1,
    engine: str = "processes",
    accelerator: str = "auto",
    threads: int | None = None,
    openvino: bool = False,
    time_limit: float | None = None,
) -> list[Record]:
    """Fit and test every model of a plan on all its data with all its seeds.

    Each run has a process of its own and is kept as soon as it ends. Runs that are there already are not repeated,
    those that failed are. A model that fails does not stop the others.

    Args:
        plan: What to compare.
        output: Folder of the results: ``runs``, ``results.csv`` and ``results.json``.
        workers: Number of runs at a time.
        engine: ``processes`` on this machine, or ``ray``, on the cluster that ``RAY_ADDRESS`` names or on this machine;
            all machines must find data and backbone at the same paths.
        accelerator: Where to run, as the trainer's.
        threads: Threads of each run; by default the processor's cores shared among the workers.
        openvino: Whether to time the models in OpenVINO too.
        time_limit: Minutes after which a run is given up and counts as failed.

    Returns:
        The runs of the plan and its ensembles, failed ones included.

    Raises:
        ValueError: If the data has no normal or no anomalous test images, or ``output`` holds a run of the same name
            with other settings.
        ImportError: If Ray or OpenVINO is asked for and not installed.
        OSError: If results cannot be written; those written before are kept.
    """
    if workers < 1 or engine not in ENGINES:
        msg = f"workers must be at least 1 and engine one of {', '.join(ENGINES)}, not {workers} and {engine!r}"
        raise ValueError(msg)
    if openvino:
        _require("openvino", "openvino")
    threads = threads or max(1, cores() // workers)
    jobs = plan.jobs(accelerator=accelerator, threads=threads, openvino=openvino, time_limit=time_limit)
    runs = output / "runs"
    kept = _kept(runs)
    missing = [job for job in jobs if not _is_there(kept, job)]
    _check_data(missing)
    logger.info("%d of %d runs are there already", len(jobs) - len(missing), len(jobs))
    call = _ray_call(threads, accelerator) if engine == "ray" else _local_call(workers)
    _run_all(missing, call, len(missing) if engine == "ray" else workers, output, kept)
    kept |= {record.key: record for record in ensemble_runs(runs, plan)}
    _write_tables(output, kept.values())
    models = [*plan.models, *plan.ensembles]
    return [kept[Key(category, model, shots, seed)] for (category, shots, seed), model in product(plan.draws(), models)]


def _kept(runs: Path) -> dict[Key, Record]:
    """The runs of the folder, but those that cannot be read, which run again if the plan has them."""
    return {record.key: record for folder in run_folders(runs) if (record := _readable(folder))}


def _readable(folder: Path) -> Record | None:
    try:
        return read_record(folder)
    except ValueError as error:
        logger.warning("%s", error)
        return None


def _is_there(kept: Mapping[Key, Record], job: Job) -> bool:
    record = kept.get(job.key)
    if record is None or record.failed:
        return False
    if record.config != json.loads(json.dumps(job.config)):
        msg = (
            f"{record.folder} holds {record.key} with other settings than the plan's; "
            "choose another output, or delete this folder to run it again"
        )
        raise ValueError(msg)
    return True


def _check_data(jobs: Sequence[Job]) -> None:
    """Make the data and look whether it can be tested on, once for each category and before anything is fitted."""
    for job in {(job.key.category, job.training_images): job for job in jobs}.values():
        data = job.create_data()
        data.prepare_data()
        data.setup()
        labels = {*data.test_data.samples["label_index"].tolist()}
        if absent := [name for label, name in ((0, "normal"), (1, "anomalous")) if label not in labels]:
            msg = f"{job.key.category} has no {absent[0]} test images; a comparison needs normal and anomalous ones"
            raise ValueError(msg)


def _run_all(
    jobs: Sequence[Job],
    call: Callable[[Job], dict[str, bytes]],
    workers: int,
    output: Path,
    kept: dict[Key, Record],
) -> None:
    """Run the jobs, and add each run to those kept as it ends."""
    if not jobs:
        return
    start = time.monotonic()
    with ThreadPoolExecutor(workers) as pool:
        futures: dict[Future[dict[str, bytes]], Job] = {pool.submit(call, job): job for job in jobs}
        try:
            for number, future in enumerate(as_completed(futures), start=1):
                record = unpack_record(output / "runs", futures[future].key, future.result())
                kept[record.key] = record
                _write_tables(output, kept.values())
                elapsed = time.monotonic() - start
                left = elapsed / number * (len(jobs) - number) / 60
                logger.info("[%d/%d] %s; about %.0f min left", number, len(jobs), _summary(record), left)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _summary(record: Record) -> str:
    if record.failed:
        return f"{record.key}: FAILED, {record.message}"
    return f"{record.key}: image AUROC {record.metrics['image_AUROC']:.1f}, fitted in {record.costs['fit_s']:.0f} s"


def _local_call(workers: int) -> Callable[[Job], dict[str, bytes]]:
    """What runs a job here; with several graphics processors the workers take turns at them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    devices = visible.split(",") if torch.cuda.device_count() else [None]
    free: SimpleQueue[str | None] = SimpleQueue()
    for worker in range(workers):
        free.put(devices[worker % len(devices)])

    def call(job: Job) -> dict[str, bytes]:
        device = free.get()
        try:
            return run_job(job, device)
        finally:
            free.put(device)

    return call


def _ray_call(threads: int, accelerator: str) -> Callable[[Job], dict[str, bytes]]:
    """What runs a job somewhere in a Ray cluster; a job whose machine is lost runs again elsewhere."""
    _require("ray", "ray")
    import ray  # noqa: PLC0415 - an extra

    if not ray.is_initialized():
        ray.init(log_to_driver=False, include_dashboard=False)
    gpus = int(accelerator in {"gpu", "cuda"} or (accelerator == "auto" and ray.cluster_resources().get("GPU", 0) > 0))
    remote = ray.remote(num_cpus=threads, num_gpus=gpus, max_retries=2)(run_job)
    return lambda job: ray.get(remote.remote(job))


def _require(module: str, extra: str) -> None:
    if not find_spec(module):
        msg = f'{module} is not installed: pip install "anomalib-ot[{extra}]"'
        raise ImportError(msg)


def _write_tables(output: Path, runs: Iterable[Record]) -> None:
    """All runs as one CSV and one JSON file."""
    records = sorted(runs, key=by_key)
    rows = [_row(record) for record in records]
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, list(dict.fromkeys(name for row in rows for name in row)), restval="")
    writer.writeheader()
    writer.writerows(rows)
    content = [asdict(replace(record, folder=None)) for record in records]
    write_text(output / "results.csv", table.getvalue())
    write_text(output / "results.json", json.dumps(content, indent=1))


def _row(record: Record) -> dict[str, object]:
    numbers = {name: f"{value:.4f}" for name, value in {**record.metrics, **record.costs}.items()}
    environment = {name: record.environment.get(name, "") for name in ("revision", "threads", "accelerator", "time")}
    return {**asdict(record.key), **numbers, **environment, "error": record.message}
