"""Memory readings while other code runs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Thread


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
