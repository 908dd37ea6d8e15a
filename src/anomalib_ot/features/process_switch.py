"""Settings of the whole process that several threads change."""

from collections.abc import Callable
from threading import Lock
from types import TracebackType

Undo = Callable[[], None]


class ProcessSwitch:
    """A context that changes a setting of the whole process while at least one thread is inside.

    The first thread to enter changes the setting, and the last one to leave restores it. If each thread changed and
    restored it, a thread that leaves early would reset the setting for the others, and a thread that enters late would
    restore the changed value.

    Args:
        switch: Changes the setting and returns a function that undoes the change, or None if no change is needed.

    Example:
        >>> values = ["usual"]
        >>> def switch():
        ...     values.append("switched")
        ...     return values.pop
        >>> context = ProcessSwitch(switch)
        >>> with context, context:
        ...     values[-1]
        'switched'
        >>> values
        ['usual']
    """

    def __init__(self, switch: Callable[[], Undo | None]) -> None:
        self._switch = switch
        self._lock = Lock()
        self._within = 0
        self._undo: Undo | None = None

    def __enter__(self) -> None:
        with self._lock:
            # The setting may have been changed since the first thread entered.
            if self._undo is None:
                self._undo = self._switch()
            self._within += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._within -= 1
            if self._within == 0 and self._undo is not None:
                self._undo()
                self._undo = None
