"""Readings of memory while something runs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Thread


@contextmanager
def watched(memory: Callable[[], float], every: float) -> Iterator[list[float]]:
    """Readings of a process's memory, one before and then one every so many seconds, while the context lasts."""
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
