"""Where jobs run: on this machine, or on a Ray cluster."""

import os
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from importlib.util import find_spec
from queue import SimpleQueue
from threading import TIMEOUT_MAX, Event
from typing import Any, Generic, TypeVar

import torch

ENGINES = ("processes", "ray")

J = TypeVar("J")
R = TypeVar("R")


class Engine(Generic[J, R]):
    """Runs jobs."""

    def run(self, job: J) -> R:
        """Run a job and return its result."""
        raise NotImplementedError

    def give_up(self) -> None:
        """Stop the jobs that have begun."""
        raise NotImplementedError


class LocalEngine(Engine[J, R]):
    """Runs jobs on this machine. If there are several GPUs, the workers share them.

    Args:
        workers: Number of jobs at a time.
        work: Runs a job on a GPU, named as in ``CUDA_VISIBLE_DEVICES``, or None, until the event is set.
    """

    def __init__(self, workers: int, work: Callable[[J, str | None, Event], R]) -> None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
        devices = visible.split(",") if torch.cuda.device_count() else [None]
        self._free: SimpleQueue[str | None] = SimpleQueue()
        for worker in range(workers):
            self._free.put(devices[worker % len(devices)])
        self._work = work
        self._given_up = Event()

    def run(self, job: J) -> R:
        """Run a job when a worker is free."""
        device = self._free.get()
        try:
            return self._work(job, device, self._given_up)
        finally:
            self._free.put(device)

    def give_up(self) -> None:
        """Let the current jobs stop."""
        self._given_up.set()


class RayEngine(Engine[J, R]):
    """Runs jobs on a Ray cluster. If a machine is lost, its job runs again on another one.

    Args:
        threads: Cores of each job.
        accelerator: Accelerator of each job, as of Lightning's trainer.
        work: Runs a job.

    Attributes:
        errors: The base class of Ray's errors.

    Raises:
        ImportError: If Ray is not installed.
    """

    def __init__(self, threads: int, accelerator: str, work: Callable[[J], R]) -> None:
        require_installed("ray", "ray")
        import ray  # noqa: PLC0415 - an extra

        if not ray.is_initialized():
            ray.init(log_to_driver=False, include_dashboard=False)
        wants_gpu = accelerator == "auto" and ray.cluster_resources().get("GPU", 0) > 0
        gpus = int(accelerator in {"gpu", "cuda"} or wants_gpu)
        self.errors = ray.exceptions.RayError
        self._ray = ray
        self._remote = ray.remote(num_cpus=threads, num_gpus=gpus, max_retries=2)(work)
        self._begun: list[Any] = []

    def run(self, job: J) -> R:
        """Run a job when the cluster has free cores."""
        begun = self._remote.remote(job)
        self._begun.append(begun)
        result: R = self._ray.get(begun)
        return result

    def give_up(self) -> None:
        """Cancel the jobs."""
        for each in self._begun:
            with suppress(self.errors):
                self._ray.cancel(each, force=True)


def run_all(jobs: Sequence[J], engine: Engine[J, R], workers: int, until: float) -> Generator[tuple[J, R], None, None]:
    """Run jobs, and yield each with its result when it ends.

    Args:
        jobs: The jobs.
        engine: Where they run.
        workers: Number of jobs at a time.
        until: When to stop, on the clock of ``time.monotonic``.

    Yields:
        The jobs that end in time, in the order in which they end. When the iteration is over or closed, the engine
        gives up the others.
    """
    if not jobs:
        return
    with ThreadPoolExecutor(workers) as pool:
        futures: dict[Future[R], J] = {pool.submit(engine.run, job): job for job in jobs}
        late = {*futures}
        try:
            while late and (left := until - time.monotonic()) > 0:
                done, _ = wait(late, min(left, TIMEOUT_MAX), FIRST_COMPLETED)
                for future in done:
                    late.remove(future)
                    yield futures[future], future.result()
        finally:
            if late:
                pool.shutdown(wait=False, cancel_futures=True)
                # Their results would not be used.
                engine.give_up()


def require_installed(module: str, extra: str) -> None:
    """Check that the package of an extra is installed.

    Raises:
        ImportError: If it is not.
    """
    if not find_spec(module):
        msg = f'{module} is not installed: pip install "anomalib-ot[{extra}]"'
        raise ImportError(msg)
