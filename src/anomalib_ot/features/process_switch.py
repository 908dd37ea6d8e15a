"""Settings of the whole process that several threads switch."""

from collections.abc import Callable
from threading import Lock
from types import TracebackType

Undo = Callable[[], None]


class ProcessSwitch:
    """A context that switches a setting of the whole process as long as any thread is within.

    The first thread that needs it switches the setting, the last one to leave switches it back: a thread that leaves
    earlier would take the setting from the others, and one that comes later would keep the switched one for the usual.

    Args:
        switch: Switches the setting and returns what undoes that; None where there is nothing to switch.

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
            # Someone may have changed the setting since the first thread came.
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
