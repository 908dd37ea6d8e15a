"""Results of long runs, kept as they come."""

import csv
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def appended(output: Path, columns: Sequence[str]) -> Iterator[Callable[[dict[str, str]], None]]:
    """Add rows to a CSV file and print them, each at once.

    Args:
        output: The file, made with its header where there is none.
        columns: Its columns; what a row lacks stays empty.

    Yields:
        What takes a row.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    is_new = not output.exists()
    with output.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        if is_new:
            writer.writeheader()

        def add(row: dict[str, str]) -> None:
            writer.writerow(row)
            file.flush()
            print(row, flush=True)

        yield add
