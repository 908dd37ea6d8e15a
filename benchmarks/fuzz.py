"""Fuzz the readers and writers of images, settings, plans, labels, checkpoints, folders and runs.

Run as ``python -m benchmarks.fuzz --minutes 60``, on Linux. Each case must give a result or an error message for users,
which names the file if a file is the cause. Everything else is a finding, including cases that end the process, hang,
use too much memory or lose a file of the user. ``--target picture --case 1234`` with the same seed repeats a case.
Cases run in a separate process, which is started again after a case that ends it.
"""

import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from jsonargparse import auto_cli

from .fuzzing.worker import TARGETS, Worker

# Relative frequency of the targets; a case of the slowest ones takes seconds.
WEIGHTS = {"picture": 30, "mask": 15, "defects": 20, "checkpoint": 10, "host_config": 1, "plan": 6, "fit": 1}


def main(
    minutes: float = 60.0,
    seed: int = 0,
    target: str | None = None,
    case: int | None = None,
) -> None:
    """Print the first finding of each kind, and all counts at the end; exit with 1 if there are findings.

    Args:
        minutes: Duration of the run.
        seed: Random seed.
        target: Run this target only.
        case: Run this case of the target only, and print its traceback.
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
