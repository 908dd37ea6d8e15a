"""Run each job in a process of its own, so that memory is measured for each run and a crash ends one run only."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from .job import failed_run
from .plan import Job

_MODULE = "anomalib_ot.comparison.job"
_TRIES = 2
# Seconds between two checks whether a process has ended.
_INTERVAL = 0.1


def run_job(job: Job, device: str | None = None, given_up: threading.Event | None = None) -> dict[str, bytes]:
    """Run a job in a separate process. If the process is killed, the job runs once more.

    Args:
        job: The job.
        device: Visible GPU, as in ``CUDA_VISIBLE_DEVICES``; None for the GPUs that this process sees.
        given_up: Stops the run when it is set.

    Returns:
        The files of the run, from :func:`~anomalib_ot.comparison.record.pack_record`. They are those of a failed run if
        the model failed, the process was killed twice, the run exceeded the job's time limit, or it was stopped.
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
    """Run the job once. The process writes its files to ``folder/run``.

    Returns:
        The end of the process's output with the reason why there are no files in its last line, and whether the process
        was killed. Both apply only if there are no files.
    """
    (folder / "job.json").write_text(json.dumps(job.to_dict()), encoding="utf-8")
    settings = {"OMP_NUM_THREADS": job.threads, "CUDA_VISIBLE_DEVICES": device}
    given = {name: str(value) for name, value in settings.items() if value is not None}
    command = [sys.executable, "-m", _MODULE, str(folder / "job.json"), str(folder / "run"), str(os.getpid())]
    with (folder / "log.txt").open("w+", encoding="utf-8") as log:
        process = subprocess.Popen(  # noqa: S603 - this Python, a module of ours, files of ours
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=os.environ | given
        )
        if why := _stopped(process, 60 * (job.time_limit or math.inf), given_up):
            return why, False
        log.seek(0)
        tail = "".join(log.readlines()[-20:])
    if process.returncode == -signal.SIGINT:
        # The user has interrupted the comparison; another try would delay its end.
        return f"{tail}\ninterrupted", False
    if process.returncode < 0:
        return f"{tail}\nkilled {_TRIES} times by signal {-process.returncode}; check the available memory", True
    return f"{tail}\nthe process ended with status {process.returncode} and without a result", False


def _stopped(process: "subprocess.Popen[bytes]", seconds: float, given_up: threading.Event) -> str:
    """Wait for a process to end. Return the reason if it was stopped, otherwise an empty text."""
    start = time.monotonic()
    try:
        while process.poll() is None:
            if given_up.wait(_INTERVAL):
                return "stopped before its end"
            if time.monotonic() - start > seconds:
                return f"not finished within the time limit of {seconds / 60:g} minutes"
        return ""
    finally:
        # Also if an exception ends the wait.
        process.kill()
        process.wait()
