import os
import re
import signal
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from zlib import crc32

import pytest

from anomalib_ot.offline import offline_backbone

_LEFT_OUT = pytest.StashKey[int]()


def pytest_configure(config):
    config.stash[_LEFT_OUT] = 0


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark as slow what a quick run leaves out of the products of tests marked ``in_turn``."""
    products = {}
    for item in items:
        if item.get_closest_marker("in_turn"):
            products.setdefault((item.parent.nodeid, item.originalname), []).append((item, _factors(item)))
    for (_, name), product in products.items():
        values = [list(dict.fromkeys(column)) for column in zip(*(factors for _, factors in product), strict=True)]
        longest = max(range(len(values)), key=lambda place: len(values[place]))
        # Each test has pairs of its own.
        shift = crc32(name.encode())
        for item, factors in product:
            indices = [known.index(value) for known, value in zip(values, factors, strict=True)]
            wanted = [(indices[longest] + shift) % len(known) for known in values]
            wanted[longest] = indices[longest]
            if indices != wanted:
                item.add_marker(pytest.mark.slow)


def _factors(item):
    """The value of each parameter of a test, as text. Names that are parametrized together are one parameter."""
    values = {name: repr(value) for name, value in item.callspec.params.items()}
    together = [
        re.split(r",\s*", names) if isinstance(names := mark.args[0], str) else names
        for mark in item.iter_markers("parametrize")
    ]
    factors = [tuple(values.pop(name) for name in names) for names in together]
    return [*factors, *values.values()]


def pytest_deselected(items):
    """Count the slow tests that ``-m "not slow"`` leaves out."""
    config, slow = items[0].config, sum(item.get_closest_marker("slow") is not None for item in items)
    config.stash[_LEFT_OUT] += slow
    if hasattr(config, "workeroutput"):
        config.workeroutput["left_out"] = config.stash[_LEFT_OUT]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """Take the count from a process of pytest-xdist: each of them collects all tests."""
    node.config.stash[_LEFT_OUT] = getattr(node, "workeroutput", {}).get("left_out", 0)


def pytest_terminal_summary(terminalreporter, config):
    left_out = config.stash[_LEFT_OUT]
    if left_out and config.option.markexpr == "not slow":
        terminalreporter.write_line(f"{left_out} slow tests were left out; make test-all runs them too", yellow=True)


@pytest.fixture(scope="session")
def backbone(tmp_path_factory):
    """A backbone with ImageNet weights that needs no download."""
    return offline_backbone(tmp_path_factory.mktemp("backbones"))


@pytest.fixture
def kill_jobs():
    """Kills the first jobs of a comparison that this process starts, each as soon as it runs."""

    @contextmanager
    def killing(times):
        killed, done = [], threading.Event()
        killer = threading.Thread(target=_kill, args=(times, killed, done))
        killer.start()
        try:
            yield killed
        finally:
            done.set()
            killer.join()
        assert len(killed) == times

    return killing


def _kill(times, killed, done):
    while len(killed) < times and not done.is_set():
        for children in Path("/proc/self/task").glob("*/children"):
            for pid in children.read_text().split():
                command = Path(f"/proc/{pid}/cmdline")
                is_job = command.exists() and b"anomalib_ot.comparison.job" in command.read_bytes()
                if is_job and pid not in killed and len(killed) < times:
                    os.kill(int(pid), signal.SIGKILL)
                    killed.append(pid)
        time.sleep(0.05)
