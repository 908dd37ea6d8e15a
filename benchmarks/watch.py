"""Time and memory of other code."""

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import TypeVar

import torch

T = TypeVar("T")


def timed(function: Callable[[], T]) -> tuple[T, float]:
    """Result of a function and its wall time in seconds, including pending work of the GPU."""
    start = time.perf_counter()
    result = function()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


def peak_memory(device: str = "cpu") -> float:
    """Peak resident memory of this process, or its peak memory on a GPU, in GB."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def added_memory(function: Callable[[], object], device: str = "cpu") -> float:
    """Peak memory of this process, or of torch on a GPU, during a call less that before it, in MB; Linux only.

    Memory that a process freed may still be resident, and is then not counted when it is used again. The C library
    returns all blocks of more than 64 kB at once if the process was started with ``MALLOC_MMAP_THRESHOLD_=65536``.
    """
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    Path("/proc/self/clear_refs").write_text("5")  # the peak becomes the present value
    before = _resident("VmRSS")
    function()
    return _resident("VmHWM") - before


def _resident(name: str) -> float:
    """Resident memory of this process (VmRSS) or its peak (VmHWM), in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024 / 1e6


@contextmanager
def watched(memory: Callable[[], float], every: float) -> Iterator[list[float]]:
    """List of memory readings: one at the start, then one every ``every`` seconds while the context is active."""
    readings, done = [memory()], Event()

    def watch() -> None:
        while not done.wait(every):
            readings.append(memory())

    watcher = Thread(target=watch)
    watcher.start()
    try:
        yield readings
    finally:
        done.set()
        watcher.join()
