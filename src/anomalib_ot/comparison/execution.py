"""Run the missing runs of a comparison, in local processes or on Ray, and store each run when it ends."""

import csv
import io
import json
import logging
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

import torch

from anomalib_ot.files import claim, require_ours, write_text
from anomalib_ot.settings import require

from .engines import ENGINES, Engine, LocalEngine, RayEngine, require_installed, run_all
from .ensemble import ensemble_runs
from .job import failed_run
from .plan import Job, Plan, members
from .record import Key, Record, by_key, read_record, run_folders, unpack_record
from .supervision import run_job

logger = logging.getLogger(__name__)

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
    require(workers >= 1, "workers", "at least 1", workers)
    require(engine in ENGINES, "engine", ENGINES, engine)
    require(threads is None or threads >= 1, "threads", "at least 1", threads)
    for name, minutes in (("time_limit", time_limit), ("total_time_limit", total_time_limit)):
        require(minutes is None or minutes > 0, name, "above 0", minutes)
    until = time.monotonic() + 60 * (total_time_limit or math.inf)
    if openvino:
        require_installed("openvino", "openvino")
    threads = threads or max(1, torch.get_num_threads() // workers)
    jobs = plan.jobs(accelerator=accelerator, threads=threads, openvino=openvino, time_limit=time_limit)
    runs = output / "runs"
    kept = _kept(runs)
    missing = [job for job in jobs if not _is_there(kept, job)]
    _check_places(output, missing, plan, kept)
    _check_data(missing)
    claim(output, *_TABLES)
    logger.info("%d of %d runs are already finished", len(jobs) - len(missing), len(jobs))
    runner: Engine[Job, _Files]
    runner = RayEngine(threads, accelerator, run_job) if engine == "ray" else LocalEngine(workers, run_job)
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
    jobs: Sequence[Job], runner: Engine[Job, _Files], workers: int, output: Path, kept: dict[Key, Record], until: float
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
    start = time.monotonic()
    late = {job.key: job for job in jobs}
    with closing(run_all(jobs, runner, workers, until)) as ended:
        for number, (job, files) in enumerate(ended, start=1):
            record = unpack_record(output / "runs", job.key, files)
            kept[record.key] = record
            del late[record.key]
            _write_tables(output, kept.values())
            elapsed = time.monotonic() - start
            left = elapsed / number * (len(jobs) - number) / 60
            logger.info("[%d/%d] %s; about %.0f min left", number, len(jobs), _summary(record), left)
    return [*late.values()]


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
