"""Cost of the import hook for a Python process that does not import anomalib.

Run as ``python -m benchmarks.startup``. It starts the interpreter with and without the hook alternately.
"""

import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import anomalib_ot

SOURCE = Path(anomalib_ot.__file__).parents[1]
# Without site packages, the environment does not run the hook. os is imported because site imports it at each start.
WITHOUT = f"import os, sys; sys.path.insert(0, {str(SOURCE)!r})"
# Allow bytecode files, because an installation compiles the package.
COMPILED = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
WITH = f"{WITHOUT}; import anomalib_ot._autoload; anomalib_ot._autoload.install()"


def seconds(code: str) -> float:
    """Wall time of a new interpreter without site packages that runs some code."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-S", "-c", code], env=COMPILED, check=True)  # noqa: S603 - our own code
    return time.perf_counter() - start


def main(pairs: int = 50) -> None:
    """Print the medians and the median of the paired ratios."""
    times = [(seconds(WITHOUT), seconds(WITH)) for _ in range(pairs + 1)][1:]
    without, with_hook = (1000 * median(column) for column in zip(*times, strict=True))
    ratio = median(hook / plain for plain, hook in times)
    print(f"without {without:.1f} ms, with {with_hook:.1f} ms, ratio {ratio:.2f} (median of {pairs} pairs)")


if __name__ == "__main__":
    main()
