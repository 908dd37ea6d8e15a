"""Run the missing runs of a comparison, in local processes or on Ray, and store each run when it ends."""

import csv
import io
import json
import logging
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import asdict, replace
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from queue import SimpleQueue
from threading import TIMEOUT_MAX, Event
from typing import Any, Protocol

import torch

from anomalib_ot.files import claim, require_ours, write_text
from anomalib_ot.settings import require

from .ensemble import ensemble_runs
from .job import failed_run
from .plan import Job, Plan, members
from .record import Key, Record, by_key, read_record, run_folders, unpack_record
from .supervision import run_job

logger = logging.getLogger(__name__)

ENGINES = ("processes", "ray")
_TABLES = ("results.csv", "results.json")
_Files = dict[str, bytes]


def compare(
    plan: Plan,
    output: Path,
    workers: int = 1,
    engine: str = "processes",
    accelerator: str = "auto",
    threads: int | None = None,
    openvino: bool = False,
    time_limit: float | None = None,
    total_time_limit: float | None = None,
) -> list[Record]:
    """Fit and test every model of a plan on all its data with all its seeds.

    Each run has its own process and is stored when it ends. Finished runs are not repeated; failed runs are. If a model
    fails, the comparison continues with the others.

    Args:
        plan: Models, data and settings to compare.
        output: Folder of the results: ``runs``, ``results.csv`` and ``results.json``.
        workers: Number of runs at a time.
        engine: ``processes`` on this machine, or ``ray`` on the cluster in ``RAY_ADDRESS``, or on this machine if it is
            not set. Data and backbone must have the same paths on all machines.
        accelerator: Accelerator of the trainer.
        threads: Threads of each run. The default is torch's number of threads, which depends on ``OMP_NUM_THREADS`` and
            the cores that are available to this process, divided by the number of workers.
        openvino: Whether to time the models in OpenVINO as well.
        time_limit: Time limit of a single run in minutes. A run that exceeds it counts as failed.
        total_time_limit: Time limit of the comparison in minutes. Unfinished runs count as failed; the same comparison
            runs them the next time.

    Returns:
        The runs of the plan and its ensembles, including failed ones.

    Raises:
        ValueError: If the data has no normal or no anomalous test images, or ``output`` contains a run of the same name
            with other settings.
        ImportError: If Ray or OpenVINO is requested and not installed.
        OSError: If results cannot be written. Results written before are kept, and current runs are stopped.
        FileExistsError: If results would replace files that a comparison did not write.
    """
    if workers < 1 or engine not in ENGINES:
        msg = f"workers must be at least 1 and engine one of {', '.join(ENGINES)}, not {workers} and {engine!r}"
        raise ValueError(msg)
    require(threads is None or threads >= 1, "threads", "at least 1", threads)
    for name, minutes in (("time_limit", time_limit), ("total_time_limit", total_time_limit)):
        require(minutes is None or minutes > 0, name, "above 0", minutes)
    until = time.monotonic() + 60 * (total_time_limit or math.inf)
    if openvino:
        _require_installed("openvino", "openvino")
    threads = threads or max(1, torch.get_num_threads() // workers)
    jobs = plan.jobs(accelerator=accelerator, threads=threads, openvino=openvino, time_limit=time_limit)
    runs = output / "runs"
    kept = _kept(runs)
    missing = [job for job in jobs if not _is_there(kept, job)]
    _check_places(output, missing, plan, kept)
    _check_data(missing)
    claim(output, *_TABLES)
    logger.info("%d of %d runs are already finished", len(jobs) - len(missing), len(jobs))
    runner = _Ray(threads, accelerator) if engine == "ray" else _Processes(workers)
    late = _run_all(missing, runner, len(missing) if engine == "ray" else workers, output, kept, until)
    _keep_late(late, output / "runs", kept, total_time_limit)
    kept |= {record.key: record for record in ensemble_runs(runs, plan)}
    _write_tables(output, kept.values())
    models = [*plan.models, *plan.ensembles]
    return [kept[Key(category, model, shots, seed)] for (category, shots, seed), model in product(plan.draws(), models)]


def _kept(runs: Path) -> dict[Key, Record]:
    """The readable runs of the folder. Unreadable runs of the plan run again."""
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
            f"{record.folder} holds {record.key} with settings that differ from the plan; "
            "choose another output, or delete this folder to run it again"
        )
        raise ValueError(msg)
    return True


def _check_places(output: Path, jobs: Sequence[Job], plan: Plan, kept: Mapping[Key, Record]) -> None:
    """Refuse outputs that could not be written, before any run."""
    require_ours(output, *_TABLES)
    missing = {job.key for job in jobs}
    ensembles = {
        Key(category, label, shots, seed)
        for label, (category, shots, seed) in product(plan.ensembles, plan.draws())
        if any(Key(category, each, shots, seed) in missing for each in members(label))
    }
    owners = {record.key.folder: record.key for record in kept.values()}
    for key in sorted(missing | ensembles, key=str):
        folder = output / "runs" / key.folder
        if owners.get(key.folder, key) != key:
            msg = f"{folder} holds {owners[key.folder]}; rename the label, or choose another output"
            raise ValueError(msg)
        require_ours(folder)


def _check_data(jobs: Sequence[Job]) -> None:
    """Set up the data of each category, and check that it has normal and anomalous test images, before any run."""
    for job in {(job.key.category, job.training_images): job for job in jobs}.values():
        data = job.create_data()
        data.prepare_data()
        data.setup()
        labels = {*data.test_data.samples["label_index"].tolist()}
        if absent := [name for label, name in ((0, "normal"), (1, "anomalous")) if label not in labels]:
            msg = f"{job.key.category} has no {absent[0]} test images; a comparison needs normal and anomalous ones"
            raise ValueError(msg)


def _run_all(
    jobs: Sequence[Job], runner: "_Runner", workers: int, output: Path, kept: dict[Key, Record], until: float
) -> list[Job]:
    """Run the jobs, and store each run when it ends.

    Args:
        jobs: The jobs.
        runner: Runs the jobs.
        workers: Number of jobs at a time.
        output: Folder of the results.
        kept: The runs so far; new runs are added.
        until: When to stop, on the clock of ``time.monotonic``.

    Returns:
        The jobs that did not finish in time.
    """
    if not jobs:
        return []
    start = time.monotonic()
    late = {job.key: job for job in jobs}
    with ThreadPoolExecutor(workers) as pool:
        futures: dict[Future[_Files], Job] = {pool.submit(runner.run, job): job for job in jobs}
        try:
            for number, future in enumerate(_ended(futures, until), start=1):
                record = unpack_record(output / "runs", futures[future].key, future.result())
                kept[record.key] = record
                del late[record.key]
                _write_tables(output, kept.values())
                elapsed = time.monotonic() - start
                left = elapsed / number * (len(jobs) - number) / 60
                logger.info("[%d/%d] %s; about %.0f min left", number, len(jobs), _summary(record), left)
        finally:
            if late:
                pool.shutdown(wait=False, cancel_futures=True)
                # Their results would not be stored.
                runner.give_up()
    return [*late.values()]


def _ended(futures: Iterable[Future[_Files]], until: float) -> Iterator[Future[_Files]]:
    """The futures that end in time, in the order in which they end."""
    waiting = {*futures}
    while waiting and (left := until - time.monotonic()) > 0:
        done, waiting = wait(waiting, min(left, TIMEOUT_MAX), FIRST_COMPLETED)
        yield from done


def _keep_late(jobs: Sequence[Job], runs: Path, kept: dict[Key, Record], minutes: float | None) -> None:
    """Store the jobs that exceeded the total time limit as failed runs."""
    for job in jobs:
        files = failed_run(job, f"not finished within the total time limit of {minutes:g} minutes")
        kept[job.key] = unpack_record(runs, job.key, files)
    if jobs:
        logger.warning(
            "%d runs did not finish within %g minutes in total; repeat the command to run them",
            len(jobs),
            minutes,
        )


def _summary(record: Record) -> str:
    if record.failed:
        return f"{record.key}: FAILED, {record.message}"
    return f"{record.key}: image AUROC {record.metrics['image_AUROC']:.1f}, fitted in {record.costs['fit_s']:.0f} s"


class _Runner(Protocol):
    """Runs jobs."""

    def run(self, job: Job) -> dict[str, bytes]:
        """Run a job and return the files of the run."""

    def give_up(self) -> None:
        """Stop the current jobs and all later ones."""


class _Processes:
    """Runs jobs on this machine. If there are several GPUs, the workers share them."""

    def __init__(self, workers: int) -> None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
        devices = visible.split(",") if torch.cuda.device_count() else [None]
        self._free: SimpleQueue[str | None] = SimpleQueue()
        for worker in range(workers):
            self._free.put(devices[worker % len(devices)])
        self._given_up = Event()

    def run(self, job: Job) -> dict[str, bytes]:
        device = self._free.get()
        try:
            return run_job(job, device, self._given_up)
        finally:
            self._free.put(device)

    def give_up(self) -> None:
        self._given_up.set()


class _Ray:
    """Runs jobs on a Ray cluster. If a machine is lost, its job runs again on another one."""

    def __init__(self, threads: int, accelerator: str) -> None:
        _require_installed("ray", "ray")
        import ray  # noqa: PLC0415 - an extra

        if not ray.is_initialized():
            ray.init(log_to_driver=False, include_dashboard=False)
        wants_gpu = accelerator == "auto" and ray.cluster_resources().get("GPU", 0) > 0
        gpus = int(accelerator in {"gpu", "cuda"} or wants_gpu)
        self._ray = ray
        self._remote = ray.remote(num_cpus=threads, num_gpus=gpus, max_retries=2)(run_job)
        self._begun: list[Any] = []

    def run(self, job: Job) -> dict[str, bytes]:
        begun = self._remote.remote(job)
        self._begun.append(begun)
        return self._ray.get(begun)

    def give_up(self) -> None:
        for each in self._begun:
            with suppress(self._ray.exceptions.RayError):
                self._ray.cancel(each, force=True)


def _require_installed(module: str, extra: str) -> None:
    if not find_spec(module):
        msg = f'{module} is not installed: pip install "anomalib-ot[{extra}]"'
        raise ImportError(msg)


def _write_tables(output: Path, runs: Iterable[Record]) -> None:
    """Write all runs to one CSV and one JSON file."""
    records = sorted(runs, key=by_key)
    rows = [_row(record) for record in records]
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, list(dict.fromkeys(name for row in rows for name in row)), restval="")
    writer.writeheader()
    writer.writerows(rows)
    content = [asdict(replace(record, folder=None)) for record in records]
    for name, text in zip(_TABLES, (table.getvalue(), json.dumps(content, indent=1)), strict=True):
        write_text(output / name, text)


def _row(record: Record) -> dict[str, object]:
    numbers = {name: f"{value:.4f}" for name, value in {**record.metrics, **record.costs}.items()}
    environment = {name: record.environment.get(name, "") for name in ("revision", "threads", "accelerator", "time")}
    verdicts = asdict(record.verdicts) if record.verdicts else {}
    return {**asdict(record.key), **numbers, **verdicts, **environment, "error": record.message}
