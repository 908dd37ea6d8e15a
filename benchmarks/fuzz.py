"""Mutated pictures, settings, plans, labels, checkpoints, folders and runs, fed to whatever reads or replaces them.

Run as ``python -m benchmarks.fuzz --minutes 60``, on Linux. Each case has a result or is refused in words: by an error
that a user is meant to read, which names the file where one is to blame. All else is a finding, among it what ends the
process, hangs, takes too much memory, or loses a file of others; ``--target picture --case 1234`` with the same seed
repeats one. Cases run in another process, which is started anew after one that ended it.
"""

import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from jsonargparse import auto_cli

from .fuzzing.worker import TARGETS, Worker

# How often each is tried; a case of the slowest takes seconds.
WEIGHTS = {"picture": 30, "mask": 15, "defects": 20, "checkpoint": 10, "host_config": 1, "plan": 6, "fit": 1}


def main(
    minutes: float = 60.0,
    seed: int = 0,
    target: str | None = None,
    case: int | None = None,
) -> None:
    """Print each kind of finding when it is first met, and all counts at the end; exit with 1 if there are any.

    Args:
        minutes: How long to try.
        seed: Seed of everything random.
        target: Try this alone.
        case: Try this case alone, and print its traceback.
    """
    counts: Counter[tuple[str, str]] = Counter()
    findings: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder, Worker(Path(folder), seed) as worker:
        if case is not None and target is not None:
            print(worker.run(target, case))
            return
        started = time.monotonic()
        number = 0
        while time.monotonic() - started < 60 * minutes:
            names = [*TARGETS]
            weights = [WEIGHTS.get(name, 3) for name in names]
            name = target or random.Random(f"{seed} {number}").choices(names, weights)[0]  # noqa: S311
            kind, detail = worker.run(name, number)
            counts[name, kind] += 1
            if kind == "finding":
                _, _, key = detail.partition("\n")[0].partition(" ")
                findings[f"{name}: {key}"] += 1
                if findings[f"{name}: {key}"] == 1:
                    print(f"--seed {seed} --target {name} --case {number}\n{detail}\n", flush=True)
            number += 1
    for (name, kind), count in sorted(counts.items()):
        print(f"{name}: {count} {kind}")
    for key, count in findings.most_common():
        print(f"{count} times {key}")
    print(f"{number} cases in {(time.monotonic() - started) / 60:.0f} min, {len(findings)} kinds of findings")
    sys.exit(bool(findings))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
